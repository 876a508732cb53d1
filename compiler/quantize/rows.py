"""Layers on flattened rows take the tensor as it was: TensorFlow makes rows before a layer, and a tensor after it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from llmc.graph import Editor, Graph, Node, TensorType, same_dim
from llmc.match import array, made_by, nodes, rank, stored


def lift_rows(graph: Graph) -> Graph:
    edit = Editor(graph)
    for node in nodes(edit, "MatMul"):
        _lift(edit, node)
    return edit.finish()


def _lift(edit: Editor, node: Node) -> None:
    rows, weight = node.inputs
    flat, value = made_by(edit, rows, "Reshape"), array(edit, stored(edit, weight))
    readers = edit.consumers.get(node.outputs[0], [])
    if (
        flat is None
        or value is None
        or value.ndim != 2
        or rank(edit, rows) != 2
        or node.outputs[0] in edit.graph.outputs
    ):
        return
    *leading, width = edit.types[flat.inputs[0]].shape
    if len(leading) < 2 or not same_dim(width, value.shape[0]) or not all(_splits(edit, r) for r in readers):
        return
    whole = edit.fresh(f"{node.outputs[0]}.rows")
    type_ = TensorType((*leading, value.shape[1]), edit.types[node.outputs[0]].dtype)
    edit.remove(node)
    edit.add(replace(node, inputs=(flat.inputs[0], weight), outputs=(whole,)), [type_])
    for reader in readers:
        edit.remove(reader)
        made = edit.types[reader.outputs[0]]
        if len(made.shape) == len(type_.shape) and all(map(same_dim, made.shape, type_.shape)):
            edit.replace_uses(reader.outputs[0], whole)
        else:
            edit.add(replace(reader, inputs=(whole, reader.inputs[1])))


def _splits(edit: Editor, node: Node) -> bool:
    """Is it a Reshape to sizes that are known, and of which none is copied from what it reads?"""
    if node.op != "Reshape":
        return False
    made = edit.producer.get(node.inputs[1])
    sizes = made.attrs["value"] if made is not None and made.op == "ShapeValue" else array(edit, node.inputs[1])
    return sizes is not None and not any(isinstance(d, (int, np.integer)) and d == 0 for d in sizes.flat)
