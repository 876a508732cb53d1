"""SmoothQuant (Xiao et al., arXiv:2211.10438): large channels of activations are divided by what their weights are
multiplied with, so that both can be rounded.

What divides them is at no cost in whoever makes them: the gain of a norm, or rows of the linear layer that is the
ungated half of a gated feed-forward layer. A value that something else reads too, as after BERT's norms, and one that
nobody divides stay as they are.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from llmc.graph import LLMC, Editor, Graph, Node
from llmc.match import array, fused, made_by, nodes, other, used_once
from llmc.quantize.observe import Statistics

_STRENGTH = 0.5  # 1: all of the difference between channels moves to the weights; 0: to the activations
_NORMS = {
    ("", "LayerNormalization"): (1, 2),
    ("", "RMSNormalization"): (1,),
    ("", "SimplifiedLayerNormalization"): (1,),
    ("com.microsoft", "SimplifiedLayerNormalization"): (1,),
    ("com.microsoft", "SkipLayerNormalization"): (2, 3),
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): (2,),
}  # where a normalisation has its gain, and a bias after it


def smooth(graph: Graph, statistics: Statistics) -> Graph:
    """A graph of linear layers with float weights, as the quantise stage finds them -> the same function with
    smoother inputs of these layers."""
    edit = Editor(graph)
    for x in dict.fromkeys(node.inputs[0] for node in nodes(edit, "Linear", domain=LLMC)):
        weights = _weights(edit, x) if x in statistics.largest else []
        if not weights:
            continue
        largest = statistics.largest[x]
        columns = np.max([np.abs(np.asarray(edit.constants[w])).max(0) for w in weights], axis=0)
        factor = np.ones_like(largest)
        used = (largest > 0) & (columns > 0)
        factor[used] = largest[used] ** _STRENGTH / columns[used] ** (1 - _STRENGTH)
        if _divide(edit, x, factor):
            for name in weights:
                edit.constants[name] = np.asarray(edit.constants[name]) * factor
    return edit.finish()


def _weights(edit: Editor, x: str) -> list[str]:
    """Names of the float weights that `x` is multiplied with, if nothing else reads it, or them."""
    readers = edit.consumers.get(x, [])
    if x in edit.graph.outputs or not all(n.op == "Linear" and n.domain == LLMC and n.inputs[0] == x for n in readers):
        return []
    names = list(dict.fromkeys(n.inputs[1] for n in readers))
    own = all(array(edit, w) is not None and all(n in readers for n in edit.consumers[w]) for w in names)
    return names if own else []


def _divide(edit: Editor, x: str, factor: np.ndarray) -> bool:
    """Have whoever makes `x` divide its channels by `factor`, float32 [K]; False if nobody can."""
    maker = edit.producer.get(x)
    if maker is None:
        return False
    at = _NORMS.get((maker.domain, maker.op))
    if at is not None and maker.outputs[0] == x and not any(maker.outputs[1:3]):
        return _divide_rows(edit, maker, [i for i in at if maker.input(i)], factor)
    if maker.op == "Add":  # of a bias, in the primitive spelling of a layer norm
        for i, name in enumerate(maker.inputs):
            inner = other(maker, name)
            if _is_row(edit, name, factor) and used_once(edit, inner) and made_by(edit, inner, "Mul"):
                return _divide(edit, inner, factor) and _divide_rows(edit, maker, [i], factor)
    if maker.op == "Mul":
        for i, name in enumerate(maker.inputs):
            if _is_row(edit, name, factor):
                return _divide_rows(edit, maker, [i], factor)
        return any(_divide_linear(edit, name, factor) for name in maker.inputs)
    return False


def _is_row(edit: Editor, name: str, factor: np.ndarray) -> bool:
    row = array(edit, name)
    return row is not None and row.shape == factor.shape and row.dtype == np.float32


def _divide_rows(edit: Editor, node: Node, at: list[int], factor: np.ndarray) -> bool:
    """Divide these inputs of a node, all constant rows."""
    if not all(_is_row(edit, node.inputs[i], factor) for i in at):
        return False
    inputs = list(node.inputs)
    for i in at:
        inputs[i] = edit.constant(f"{inputs[i]}.smooth", np.asarray(edit.constants[inputs[i]]) / factor)
    edit.remove(node)
    edit.add(replace(node, inputs=tuple(inputs)))
    return True


def _divide_linear(edit: Editor, name: str, factor: np.ndarray) -> bool:
    """Divide the rows of the layer that makes a value read only here, and its bias."""
    layer = fused(edit, name, "Linear")
    weight = array(edit, layer.inputs[1]) if layer is not None and used_once(edit, name) else None
    if layer is None or weight is None or len(weight) != len(factor):
        return False
    bias = layer.inputs[2]
    rows = edit.constant(f"{layer.inputs[1]}.smooth", weight / factor[:, None])
    if bias:
        bias = edit.constant(f"{bias}.smooth", np.asarray(edit.constants[bias]) / factor)
    edit.remove(layer)
    edit.add(replace(layer, inputs=(layer.inputs[0], rows, bias, *layer.inputs[3:])))
    return True
