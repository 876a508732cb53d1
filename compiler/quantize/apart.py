"""Operators of onnxruntime's optimiser that hold a layer's weights or bias beside other things are taken apart, so that
the layer can be found."""

from __future__ import annotations

import numpy as np

from llmc.graph import Editor, Graph, Node, TensorType
from llmc.match import array, nodes, rank

MS = "com.microsoft"


def take_apart(graph: Graph) -> Graph:
    edit = Editor(graph)
    for node in nodes(edit, "Attention", domain=MS):
        _attention(edit, node)
    for node in nodes(edit, "SkipLayerNormalization", domain=MS):
        _skip(edit, node, 4)
    for node in nodes(edit, "SkipSimplifiedLayerNormalization", domain=MS):
        _skip(edit, node, 3)
    for node in nodes(edit, "BiasGelu", "FastGelu", domain=MS):
        _gelu(edit, node)
    return edit.finish()


def _attention(edit: Editor, node: Node) -> None:
    """Attention over x W + b, [queries, keys, values] side by side: three layers and a MultiHeadAttention."""
    x, weight, bias, mask = (node.input(i) for i in range(4))
    w, b = array(edit, weight), array(edit, bias)
    unusual = node.input(4) or any(node.inputs[6:]) or any(node.outputs[1:]) or node.attrs.get("do_rotary", 0)
    if unusual or w is None or b is None or w.dtype != "float32" or node.attrs.get("qkv_hidden_sizes"):
        return
    if mask and rank(edit, mask) != 2:
        return
    edit.remove(node)
    type_ = TensorType((*edit.types[x].shape[:-1], w.shape[1] // 3), "float32")
    parts = []
    for role, columns, row in zip("qkv", np.split(w, 3, axis=1), np.split(b, 3), strict=True):
        product, part = edit.fresh(f"{node.outputs[0]}.{role}.product"), edit.fresh(f"{node.outputs[0]}.{role}")
        matrix, added = edit.constant(f"{weight}.{role}", columns), edit.constant(f"{bias}.{role}", row)
        edit.add(Node("MatMul", (x, matrix), (product,), {}, "", f"{node.name}.{role}", 13), [type_])
        edit.add(Node("Add", (product, added), (part,), {}, "", f"{node.name}.{role}.bias", 14), [type_])
        parts.append(part)
    kept = {k: v for k, v in node.attrs.items() if k in ("num_heads", "scale", "unidirectional", "mask_filter_value")}
    edit.add(Node("MultiHeadAttention", (*parts, "", mask, node.input(5)), node.outputs, kept, MS, node.name, 1))


def _skip(edit: Editor, node: Node, at: int) -> None:
    """The row that a normalisation adds before anything else."""
    bias = node.input(at)
    if not bias:
        return
    edit.remove(node)
    whole = _sum(edit, node, node.inputs[0], bias)
    edit.add(Node(node.op, (whole, *node.inputs[1:at]), node.outputs, node.attrs, MS, node.name, node.version))


def _gelu(edit: Editor, node: Node) -> None:
    """GELU of x + bias."""
    x, bias = node.inputs[0], node.input(1)
    if not bias:
        return
    edit.remove(node)
    op = "Gelu" if node.op == "BiasGelu" else node.op
    edit.add(Node(op, (_sum(edit, node, x, bias),), node.outputs, {}, MS, node.name, node.version))


def _sum(edit: Editor, node: Node, x: str, bias: str) -> str:
    total = edit.fresh(f"{node.outputs[0]}.biased")
    edit.add(Node("Add", (x, bias), (total,), {}, "", f"{node.name}.bias", 14), [edit.types[x]])
    return total
