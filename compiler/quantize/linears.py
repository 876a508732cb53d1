"""Finds the linear layers: every way that exporters write y = x Wᵀ + b becomes `Linear`, every lookup `Embedding`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from llmc.graph import LLMC, Constant, Editor, Graph, Node
from llmc.match import array, made_by, nodes, only_user, other, rank, stored
from llmc.schedules.formats import QuantizedWeight

_FLOATS = (np.float32, np.float16)  # in which a layer's weights may be stored


def find_linears(graph: Graph) -> Graph:
    """Rewrites MatMul and Gemm with a constant matrix, the Add of a constant row after it, and Gather of rows."""
    edit = Editor(graph)
    weights = _Transposed(edit)
    for node in nodes(edit, "MatMul"):
        _matmul(edit, weights, node)
    for node in nodes(edit, "Gemm"):
        _gemm(edit, weights, node)
    for node in nodes(edit, "Linear", domain=LLMC):
        _bias(edit, node)
    for node in nodes(edit, "Gather"):
        _embedding(edit, node)
    return edit.finish()


class _Transposed:
    """[N, K] views of [K, N] constants. A weight that is already stored the other way round (tied embeddings) is
    found again by the memory it lives in, so that one stored copy serves both uses."""

    def __init__(self, edit: Editor) -> None:
        self.edit = edit
        self.known = {_memory(v): k for k, v in edit.constants.items() if isinstance(v, np.ndarray) and v.ndim == 2}

    def of(self, name: str) -> str | None:
        """Name of the constant's transpose; None where `name` is no float matrix."""
        transposed = made_by(self.edit, name, "Transpose")
        source = stored(self.edit, transposed.inputs[0]) if transposed is not None else ""
        if array(self.edit, source) is not None:
            return source if rank(self.edit, source) == 2 else None
        name = stored(self.edit, name)
        value = array(self.edit, name)
        if value is None or value.ndim != 2 or value.dtype not in _FLOATS:
            return None
        view = value.T
        key = _memory(view)
        if key not in self.known:
            self.known[key] = self.edit.constant(f"{name}.T", view)
        return self.known[key]


def _memory(value: np.ndarray) -> tuple[object, ...]:
    return (value.__array_interface__["data"][0], value.shape, value.strides, value.dtype.str)


def linear(
    edit: Editor, like: Node, x: str, weight: str, *, bias: str = "", output: str = "", activations: str = "a32"
) -> Node:
    """Put a `Linear` in the place of `like`, with `like`'s name. Weights in float16 say what x may be rounded to."""
    if edit.types[weight].dtype == "float16":
        activations = "f16"
    attrs = {"activation": "none", "activations": activations}
    out = output or like.outputs[0]
    return edit.add(Node("Linear", (x, weight, bias, ""), (out,), attrs, LLMC, like.name, 1))


def _matmul(edit: Editor, weights: _Transposed, node: Node) -> None:
    x, w = node.inputs
    if array(edit, stored(edit, x)) is not None or rank(edit, x) < 2:
        return
    weight = weights.of(w)
    if weight is not None:
        linear(edit, node, x, weight)


def _gemm(edit: Editor, weights: _Transposed, node: Node) -> None:
    x, w, bias = node.inputs[0], stored(edit, node.inputs[1]), node.input(2)
    plain = (
        node.attrs.get("alpha", 1.0) == 1.0 and node.attrs.get("beta", 1.0) == 1.0 and not node.attrs.get("transA", 0)
    )
    value = array(edit, w)
    if not plain or value is None or value.dtype not in _FLOATS:
        return
    weight = w if node.attrs.get("transB", 0) else weights.of(w)
    row = bias_row(edit, bias, weight) if weight is not None else None
    if weight is not None and row is not None:
        linear(edit, node, x, weight, bias=row)


def bias_row(edit: Editor, name: str, weight: str) -> str | None:
    """A constant with one number for each output, as a row; "" where there is none, None where it is anything else."""
    n, value = edit.types[weight].shape[0], array(edit, name)
    if not name:
        return ""
    if value is None or value.size != n or value.shape[-1:] != (n,) or value.dtype != np.float32:
        return None
    return name if value.ndim == 1 else edit.constant(f"{name}.row", value.reshape(-1))


def _bias(edit: Editor, node: Node) -> None:
    """A constant row added right after is the layer's bias."""
    add = only_user(edit, node.outputs[0], "Add")
    if add is None or node.inputs[2]:
        return
    bias = bias_row(edit, other(add, node.outputs[0]), node.inputs[1])
    if bias is None:
        return
    edit.remove(node)
    edit.remove(add)
    edit.add(Node("Linear", (node.inputs[0], node.inputs[1], bias, ""), add.outputs, node.attrs, LLMC, node.name, 1))


def _embedding(edit: Editor, node: Node) -> None:
    name = stored(edit, node.inputs[0])
    table: Constant | None = edit.constants.get(name)
    if node.attrs.get("axis", 0) != 0 or table is None or rank(edit, name) != 2:
        return
    if isinstance(table, QuantizedWeight) or (table.dtype in _FLOATS and table.shape[1] >= 16):
        if edit.types[node.outputs[0]].dtype != "float32":
            return
        ids, type_ = node.inputs[1], edit.types[node.inputs[1]]
        if type_.dtype not in ("int32", "int64"):
            return
        if type_.dtype == "int32":
            ids = edit.fresh(f"{ids}.int64")
            edit.add(Node("Cast", (node.inputs[1],), (ids,), {"to": 7}, version=13), [replace(type_, dtype="int64")])
        edit.remove(node)
        edit.add(Node("Embedding", (name, ids), node.outputs, {}, LLMC, node.name, 1))
