"""RMS and layer normalisation, however they are spelled, become `Norm`."""

from __future__ import annotations

from llmc.graph import LLMC, Editor, Graph, Node
from llmc.match import array, is_scalar, made_by, nodes, other, rank, scalar

_SIMPLIFIED = ("SimplifiedLayerNormalization", "RMSNormalization")
_SKIP = {"SkipLayerNormalization": "layer", "SkipSimplifiedLayerNormalization": "rms"}


def fuse_norms(graph: Graph) -> Graph:
    edit = Editor(graph)
    for domain in ("", "com.microsoft"):
        for node in nodes(edit, "LayerNormalization", *_SIMPLIFIED, domain=domain):
            _one_node(edit, node)
    for node in nodes(edit, *_SKIP, domain="com.microsoft"):
        _skip(edit, node)
    for node in nodes(edit, "Mul"):
        _primitive_rms(edit, node)
    for node in nodes(edit, "Add"):
        _primitive_layer(edit, node)
    for node in nodes(edit, "Add"):
        _moments(edit, node)
    return edit.finish()


def _norm(
    edit: Editor, like: Node, inputs: tuple[str, ...], outputs: tuple[str, ...], kind: str, epsilon: float
) -> None:
    if rank(edit, inputs[0]) != rank(edit, outputs[0]):
        return  # one of the constants has more dimensions than x
    attrs = {"kind": kind, "epsilon": epsilon}
    edit.add(Node("Norm", inputs, outputs, attrs, LLMC, like.name, 1))


def _over_last_axis(edit: Editor, x: str, weight: str) -> bool:
    """Is `weight` a constant row over the last axis of `x`?"""
    row = array(edit, weight)
    return row is not None and row.ndim == 1 and row.dtype == "float32" and edit.types[x].shape[-1] == row.size


def _one_node(edit: Editor, node: Node) -> None:
    x, weight, bias = node.inputs[0], node.inputs[1], node.input(2)
    axis = node.attrs.get("axis", -1)
    if axis not in (-1, rank(edit, x) - 1) or not _over_last_axis(edit, x, weight) or any(node.outputs[1:]):
        return
    if bias and not _over_last_axis(edit, x, bias):
        return
    kind = "rms" if node.op in _SIMPLIFIED else "layer"
    _norm(edit, node, (x, weight, bias, ""), (node.outputs[0], ""), kind, node.attrs.get("epsilon", 1e-5))


def _skip(edit: Editor, node: Node) -> None:
    kind = _SKIP[node.op]
    x, skip, weight = node.inputs[:3]
    beta, bias = (node.input(3), node.input(4)) if kind == "layer" else ("", node.input(3))
    if bias or any(node.outputs[1:3]) or not _over_last_axis(edit, x, weight):
        return
    if edit.types[x].shape != edit.types[skip].shape or (beta and not _over_last_axis(edit, x, beta)):
        return
    total = node.outputs[3] if len(node.outputs) > 3 else ""
    _norm(edit, node, (x, weight, beta, skip), (node.outputs[0], total), kind, node.attrs.get("epsilon", 1e-5))


# -- primitive spellings ----------------------------------------------------------------------------------------------
def _mean(edit: Editor, name: str) -> str | None:
    """What is averaged over the last axis, axis kept."""
    node = made_by(edit, name, "ReduceMean", "GlobalAveragePool")
    if node is not None and node.op == "GlobalAveragePool":
        return node.inputs[0] if rank(edit, node.inputs[0]) == 3 else None
    if node is None or node.attrs.get("keepdims", 1) != 1:
        return None
    axes = node.attrs.get("axes")
    if axes is None and node.input(1):
        stored = array(edit, node.input(1))
        axes = stored.reshape(-1).tolist() if stored is not None else None
    x = node.inputs[0]
    return x if axes is not None and list(axes) in ([-1], [rank(edit, x) - 1]) else None


def _square(edit: Editor, name: str) -> str | None:
    node = made_by(edit, name, "Pow", "Mul")
    if node is None:
        return None
    if node.op == "Pow":
        return node.inputs[0] if is_scalar(edit, node.inputs[1], 2.0) else None
    return node.inputs[0] if node.inputs[0] == node.inputs[1] else None


def _root_mean_square(edit: Editor, name: str) -> tuple[str, float] | None:
    """(x, epsilon) where `name` is mean(x**2) + epsilon."""
    add = made_by(edit, name, "Add")
    if add is None:
        return None
    for mean, eps in (add.inputs, add.inputs[::-1]):
        epsilon, squared = scalar(edit, eps), _mean(edit, mean)
        x = _square(edit, squared) if squared is not None else None
        if epsilon is not None and x is not None:
            return x, epsilon
    return None


def _inverse_root(edit: Editor, name: str) -> tuple[str, float] | None:
    """(x, epsilon) where `name` is 1 / sqrt(mean(x**2) + epsilon)."""
    node = made_by(edit, name, "Div", "Reciprocal", "Pow")
    if node is None:
        return None
    if node.op == "Pow":
        return _root_mean_square(edit, node.inputs[0]) if is_scalar(edit, node.inputs[1], -0.5) else None
    if node.op == "Div" and not is_scalar(edit, node.inputs[0], 1.0):
        return None
    return _root(edit, node.inputs[-1])


def _root(edit: Editor, name: str) -> tuple[str, float] | None:
    node = made_by(edit, name, "Sqrt")
    return _root_mean_square(edit, node.inputs[0]) if node is not None else None


def _normalised(edit: Editor, name: str) -> tuple[str, float] | None:
    """(x, epsilon) where `name` is x / sqrt(mean(x**2) + epsilon)."""
    node = made_by(edit, name, "Mul", "Div")
    if node is None:
        return None
    pairs = [node.inputs] if node.op == "Div" else [node.inputs, node.inputs[::-1]]
    for x, factor in pairs:
        found = _root(edit, factor) if node.op == "Div" else _inverse_root(edit, factor)
        if found is not None and found[0] == x:
            return found
    return None


def _scaled(edit: Editor, node: Node) -> tuple[str, str, float] | None:
    """(x, weight, epsilon) where `node` is weight * x / sqrt(mean(x**2) + epsilon)."""
    for weight, inner in (node.inputs, node.inputs[::-1]):
        found = _normalised(edit, inner)
        if found is not None and _over_last_axis(edit, found[0], weight):
            return found[0], weight, found[1]
    return None


def _primitive_rms(edit: Editor, node: Node) -> None:
    found = _scaled(edit, node)
    if found is not None and not _centred(edit, found[0]):
        x, weight, epsilon = found
        _norm(edit, node, (x, weight, "", ""), (node.outputs[0], ""), "rms", epsilon)


def _centred(edit: Editor, name: str) -> str | None:
    """x where `name` is x - mean(x)."""
    sub = made_by(edit, name, "Sub")
    return sub.inputs[0] if sub is not None and _mean(edit, sub.inputs[1]) == sub.inputs[0] else None


def _primitive_layer(edit: Editor, node: Node) -> None:
    for bias in node.inputs:
        product = made_by(edit, other(node, bias), "Mul") if array(edit, bias) is not None else None
        found = _scaled(edit, product) if product is not None else None
        x = _centred(edit, found[0]) if found is not None else None
        if found is not None and x is not None and _over_last_axis(edit, x, bias):
            _norm(edit, node, (x, found[1], bias, ""), (node.outputs[0], ""), "layer", found[2])
            return


def _moments(edit: Editor, node: Node) -> None:
    """x * s + (bias - mean(x) * s), where s = weight / sqrt(variance + epsilon): TensorFlow's spelling."""
    for scaled, shift in (node.inputs, node.inputs[::-1]):
        product, difference = made_by(edit, scaled, "Mul"), made_by(edit, shift, "Sub")
        lowered = made_by(edit, difference.inputs[1], "Mul") if difference is not None else None
        if product is None or difference is None or lowered is None or array(edit, difference.inputs[0]) is None:
            continue
        for x, s in (product.inputs, product.inputs[::-1]):
            factors = made_by(edit, s, "Mul")
            if factors is None or s not in lowered.inputs or _mean(edit, other(lowered, s)) != x:
                continue
            for weight in factors.inputs:
                found = _inverse_root(edit, other(factors, weight))
                if found is not None and _centred(edit, found[0]) == x and _over_last_axis(edit, x, weight):
                    if not _over_last_axis(edit, x, difference.inputs[0]):
                        return
                    _norm(edit, node, (x, weight, difference.inputs[0], ""), (node.outputs[0], ""), "layer", found[1])
                    return
