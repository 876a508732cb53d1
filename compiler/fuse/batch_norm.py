"""BatchNormalization is a scale and a shift of each channel: a convolution before it takes them into its weights."""

from __future__ import annotations

import numpy as np

from llmc.graph import Editor, Graph, Node
from llmc.match import array, made_by, nodes, used_once


def fuse_batch_norms(graph: Graph) -> Graph:
    edit = Editor(graph)
    for node in nodes(edit, "BatchNormalization"):
        _fold(edit, node)
    return edit.finish()


def scale_and_shift(edit: Editor, node: Node) -> tuple[np.ndarray, np.ndarray] | None:
    """(scale, shift), both [C], where y = scale x + shift; None where the statistics are not constant."""
    parts = [array(edit, name) for name in node.inputs[1:5]]
    if node.attrs.get("training_mode", 0) or any(node.outputs[1:]) or len(node.inputs) != 5:
        return None
    if any(part is None for part in parts):
        return None
    gamma, beta, mean, variance = (np.asarray(part, np.float64) for part in parts)
    scale = gamma / np.sqrt(variance + node.attrs.get("epsilon", 1e-5))
    return scale, beta - mean * scale


def _fold(edit: Editor, node: Node) -> None:
    conv = made_by(edit, node.inputs[0], "Conv")
    if conv is None or not used_once(edit, node.inputs[0]) or edit.types[node.inputs[0]].dtype != "float32":
        return
    weight, found = array(edit, conv.inputs[1]), scale_and_shift(edit, node)
    bias = array(edit, conv.inputs[2]) if conv.input(2) else np.zeros(1)
    if weight is None or found is None or bias is None:
        return
    scale, shift = found
    scaled = (weight * scale.reshape(-1, *[1] * (weight.ndim - 1))).astype(np.float32)
    names = (
        edit.constant(f"{conv.inputs[1]}.scaled", scaled),
        edit.constant(f"{conv.inputs[1]}.shift", (bias * scale + shift).astype(np.float32)),
    )
    edit.remove(conv)
    edit.add(Node("Conv", (conv.inputs[0], *names), (node.outputs[0],), conv.attrs, "", conv.name, conv.version))
