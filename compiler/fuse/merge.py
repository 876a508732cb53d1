"""Linear layers that read the same input become one: q, k, v; gate and up with their SiLU·mul."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from llmc.graph import LLMC, Constant, Editor, Graph, Node, TensorType, same_dim
from llmc.match import fused, nodes, other, used_once
from llmc.schedules.formats import QuantizedWeight, concat_rows


def merge_linears(graph: Graph) -> Graph:
    edit = Editor(graph)
    for node in nodes(edit, "Attention", domain=LLMC):
        _qkv(edit, node)
    for node in nodes(edit, "Mul"):
        _gate_up(edit, node)
    return edit.finish()


def _plain(edit: Editor, name: str) -> Node | None:
    """The linear layer that makes a value read only here, with nothing but a bias after the product."""
    node = fused(edit, name, "Linear")
    if node is None or not used_once(edit, name) or node.attrs["activation"] != "none" or node.inputs[3]:
        return None
    return node


def _stack(edit: Editor, parts: list[Node]) -> tuple[str, str] | None:
    """(weight, bias) of layers laid over one another; None where formats, inputs or presence of a bias differ."""
    first = parts[0]
    same = all(p.inputs[0] == first.inputs[0] and bool(p.inputs[2]) == bool(first.inputs[2]) for p in parts)
    if not same or any(p.attrs["activations"] != first.attrs["activations"] for p in parts):
        return None
    values: list[Constant] = [edit.constants[p.inputs[1]] for p in parts]
    stacked: Constant
    if all(isinstance(v, np.ndarray) for v in values):
        stacked = np.concatenate([np.asarray(v) for v in values])
    elif all(isinstance(v, QuantizedWeight) for v in values):
        quantized = [v for v in values if isinstance(v, QuantizedWeight)]
        if len({(v.bits, v.group_size, v.K, v.outlier_channels) for v in quantized}) != 1:
            return None
        stacked = concat_rows(quantized)
    else:
        return None
    weight = edit.constant("+".join(p.inputs[1] for p in parts), stacked)
    bias = ""
    if first.inputs[2]:
        rows = [np.asarray(edit.constants[p.inputs[2]]) for p in parts]
        bias = edit.constant("+".join(p.inputs[2] for p in parts), np.concatenate(rows))
    return weight, bias


def _qkv(edit: Editor, node: Node) -> None:
    if not node.inputs[1] or len(set(node.inputs[:3])) != 3:
        return
    parts = [_plain(edit, name) for name in node.inputs[:3]]
    found = [p for p in parts if p is not None]
    stacked = _stack(edit, found) if len(found) == 3 else None
    if stacked is None:
        return
    out = edit.fresh(f"{node.outputs[0]}.qkv")
    type_ = edit.types[found[0].outputs[0]]
    width = sum(int(edit.types[p.inputs[1]].shape[0]) for p in found)
    edit.remove(node)
    edit.add(
        replace(found[0], inputs=(found[0].inputs[0], *stacked, ""), outputs=(out,)),
        [TensorType((*type_.shape[:-1], width), "float32")],
    )
    edit.add(replace(node, inputs=(out, "", "", *node.inputs[3:])))


def _gate_up(edit: Editor, node: Node) -> None:
    for name in node.inputs:
        silu = fused(edit, name, "Activation")
        if silu is None or silu.attrs["kind"] != "silu" or not used_once(edit, name):
            continue
        if not same_dim(edit.types[name].shape[-1], edit.types[other(node, name)].shape[-1]):
            continue
        gate, up = _plain(edit, silu.inputs[0]), _plain(edit, other(node, name))
        stacked = _stack(edit, [gate, up]) if gate is not None and up is not None else None
        if gate is None or up is None or stacked is None:
            continue
        edit.remove(node)
        attrs = {**gate.attrs, "activation": "silu_mul"}
        edit.add(Node("Linear", (gate.inputs[0], *stacked, ""), node.outputs, attrs, LLMC, gate.name, 1))
        return
