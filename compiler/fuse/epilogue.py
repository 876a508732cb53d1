"""Activations and residual additions move into the linear layer or convolution before them, where they cost nothing.

A linear layer adds its residual after its activation, as transformers do; a convolution before it, as ResNets do.
"""

from __future__ import annotations

from dataclasses import replace

from llmc.graph import LLMC, Editor, Graph, Node, same_dim
from llmc.match import made_by, nodes, other, used_once


def fuse_epilogues(graph: Graph) -> Graph:
    edit = Editor(graph)
    for node in nodes(edit, "Activation", domain=LLMC):
        _activation(edit, node)
    for node in nodes(edit, "Add"):
        _residual(edit, node)
    for node in nodes(edit, "Activation", domain=LLMC):
        _activation(edit, node)
    for node in nodes(edit, "Norm", domain=LLMC):
        _skip_norm(edit, node)
    return edit.finish()


def _layer(edit: Editor, name: str, *ops: str) -> Node | None:
    """The layer that makes a value which is read only once."""
    layer = made_by(edit, name, *ops, domain=LLMC)
    return layer if layer is not None and used_once(edit, name) else None


def _activation(edit: Editor, node: Node) -> None:
    layer = _layer(edit, node.inputs[0], "Linear", "Conv", "Window")
    if layer is None or layer.attrs["activation"] != "none" or (layer.op == "Linear" and layer.inputs[3]):
        return
    edit.remove(layer)
    edit.add(replace(layer, outputs=node.outputs, attrs={**layer.attrs, "activation": node.attrs["kind"]}))


def _takes_residual(edit: Editor, name: str, residual: str) -> Node | None:
    """The layer that makes a value read only here and can add `residual` itself."""
    layer = _layer(edit, name, "Linear", "Conv")
    if layer is None or layer.inputs[3] or residual in edit.constants:
        return None
    if layer.op == "Conv" and layer.attrs["activation"] != "none":
        return None
    here, there = edit.types[name], edit.types[residual]
    same = len(here.shape) == len(there.shape) and all(map(same_dim, here.shape, there.shape))
    same = same and there.dtype == "float32"
    return layer if same and not _depends(edit, residual, layer) else None


def _depends(edit: Editor, name: str, node: Node) -> bool:
    """Does `node` make `name` itself? Nothing else can come after it: its value has one reader."""
    return edit.producer.get(name) is node


def _residual(edit: Editor, node: Node) -> None:
    for name in node.inputs[::-1]:
        layer = _takes_residual(edit, name, other(node, name))
        if layer is not None:
            edit.remove(layer)
            edit.add(replace(layer, inputs=(*layer.inputs[:3], other(node, name)), outputs=node.outputs))
            return


def _skip_norm(edit: Editor, node: Node) -> None:
    """x + residual before a norm: the layer that makes one of them adds the other, and its output is the sum."""
    x, weight, bias, residual = node.inputs
    for name, rest in ((residual, x), (x, residual)):
        layer = _takes_residual(edit, name, rest) if residual else None
        if layer is not None:
            total = node.outputs[1] or edit.fresh(f"{name}.sum")
            edit.remove(layer)
            edit.add(replace(layer, inputs=(*layer.inputs[:3], rest), outputs=(total,)), [edit.types[name]])
            edit.add(replace(node, inputs=(total, weight, bias, ""), outputs=(node.outputs[0], "")))
            return
