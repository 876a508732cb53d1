"""Gates and activations get names: x·sigmoid(x) becomes silu, the spellings of GELU and of hard swish become one.

`epilogue` then moves them into the linear layer or the convolution before them.
"""

from __future__ import annotations

import math

from llmc.graph import LLMC, Editor, Graph, Node
from llmc.match import is_scalar, made_by, nodes, other, rank, scalar

_CONTRIB = {"FastGelu": "gelu_tanh", "Gelu": "gelu"}


def fuse_activations(graph: Graph) -> Graph:
    edit = Editor(graph)
    for node in nodes(edit, "Mul"):
        _silu(edit, node)
    for node in nodes(edit, "Mul"):
        _gelu(edit, node)
    for node in nodes(edit, "Mul", "Div"):
        _hard_swish(edit, node)
    for node in nodes(edit, "Clip"):
        if _limits(edit, node) == (0.0, 6.0):
            _activation(edit, node, node.inputs[0], "relu6")
    for node in nodes(edit, "HardSwish"):
        _activation(edit, node, node.inputs[0], "hard_swish")
    for node in nodes(edit, "Relu"):
        _activation(edit, node, node.inputs[0], "relu")
    for node in nodes(edit, "Gelu"):
        _activation(edit, node, node.inputs[0], "gelu_tanh" if node.attrs.get("approximate") == "tanh" else "gelu")
    for node in nodes(edit, "Swish"):
        if node.attrs.get("alpha", 1.0) == 1.0:
            _activation(edit, node, node.inputs[0], "silu")
    for node in nodes(edit, "FastGelu", "Gelu", domain="com.microsoft"):
        if len(node.inputs) == 1:
            _activation(edit, node, node.inputs[0], _CONTRIB[node.op])
    return edit.finish()


def _activation(edit: Editor, like: Node, x: str, kind: str) -> None:
    if rank(edit, x) != rank(edit, like.outputs[0]):
        return  # one of the spelling's constants has more dimensions than x
    edit.add(Node("Activation", (x,), (like.outputs[0],), {"kind": kind}, LLMC, like.name, 1))


def _silu(edit: Editor, node: Node) -> None:
    for x in node.inputs:
        gate = made_by(edit, other(node, x), "Sigmoid")
        if gate is not None and gate.inputs[0] == x:
            _activation(edit, node, x, "silu")
            return


def _limits(edit: Editor, node: Node) -> tuple[float | None, float | None]:
    """The least and greatest value that a Clip of float32 leaves, where they are known."""
    if edit.types[node.outputs[0]].dtype != "float32":
        return None, None
    if node.version < 11:
        return node.attrs.get("min"), node.attrs.get("max")
    least, most = (scalar(edit, node.input(i)) for i in (1, 2))
    return least, most


def _hard_swish(edit: Editor, node: Node) -> None:
    """x · clip(x + 3, 0, 6) / 6, its factors in any order; and x · HardSigmoid(x) with slope 1/6 and offset 1/2."""
    found = _product(edit, node.outputs[0])
    if found is None or len(found[1]) != 2 or edit.types[node.outputs[0]].dtype != "float32":
        return
    factor, tensors = found
    for x, gate in (tensors, tensors[::-1]):
        sigmoid, clip = made_by(edit, gate, "HardSigmoid"), made_by(edit, gate, "Clip")
        if sigmoid is not None and sigmoid.inputs[0] == x and math.isclose(factor, 1):
            slope, offset = sigmoid.attrs.get("alpha", 0.2), sigmoid.attrs.get("beta", 0.5)
            if math.isclose(slope, 1 / 6, rel_tol=1e-5) and math.isclose(offset, 0.5):
                _activation(edit, node, x, "hard_swish")
            return
        if clip is not None and _limits(edit, clip) == (0.0, 6.0) and math.isclose(factor, 1 / 6, rel_tol=1e-5):
            add = made_by(edit, clip.inputs[0], "Add")
            if add is not None and x in add.inputs and is_scalar(edit, other(add, x), 3.0):
                _activation(edit, node, x, "hard_swish")
            return


def _product(edit: Editor, name: str) -> tuple[float, list[str]] | None:
    """(the product of all scalar factors, the tensors multiplied) of a tree of Mul and Div by scalars."""
    factor, tensors, stack = 1.0, [], [name]
    while stack:
        value = stack.pop()
        node = made_by(edit, value, "Mul", "Div")
        divisor = scalar(edit, node.inputs[1]) if node is not None and node.op == "Div" else None
        constant = scalar(edit, value)
        if constant is not None:
            factor *= constant
        elif node is not None and node.op == "Mul":
            stack += node.inputs
        elif node is not None and divisor:
            factor /= divisor
            stack.append(node.inputs[0])
        else:
            tensors.append(value)
    return factor, tensors


def _gelu(edit: Editor, node: Node) -> None:
    """0.5 · x · (1 + erf(x / sqrt 2)), its factors in any order; and the tanh approximation."""
    found = _product(edit, node.outputs[0])
    if found is None or not math.isclose(found[0], 0.5, rel_tol=1e-4) or len(found[1]) != 2:
        return
    for x, gate in (found[1], found[1][::-1]):
        add = made_by(edit, gate, "Add")
        ones = [is_scalar(edit, i, 1.0) for i in add.inputs] if add is not None else []
        if add is None or not any(ones):
            continue
        inner = add.inputs[1] if ones[0] else add.inputs[0]
        if _is_erf(edit, inner, x):
            _activation(edit, node, x, "gelu")
            return
        if _is_tanh(edit, inner, x):
            _activation(edit, node, x, "gelu_tanh")
            return


def _is_erf(edit: Editor, name: str, x: str) -> bool:
    erf = made_by(edit, name, "Erf")
    found = _product(edit, erf.inputs[0]) if erf is not None else None
    return found is not None and found[1] == [x] and math.isclose(found[0], math.sqrt(0.5), rel_tol=1e-4)


def _is_tanh(edit: Editor, name: str, x: str) -> bool:
    """tanh(sqrt(2/pi) · (x + 0.044715 x³))."""
    tanh = made_by(edit, name, "Tanh")
    found = _product(edit, tanh.inputs[0]) if tanh is not None else None
    if found is None or len(found[1]) != 1 or not math.isclose(found[0], math.sqrt(2 / math.pi), rel_tol=1e-4):
        return False
    add = made_by(edit, found[1][0], "Add")
    if add is None or x not in add.inputs:
        return False
    cubic = _product(edit, other(add, x))
    if cubic is None or not math.isclose(cubic[0], 0.044715, rel_tol=1e-4):
        return False
    power = made_by(edit, cubic[1][0], "Pow") if len(cubic[1]) == 1 else None
    return cubic[1] == [x, x, x] or (
        power is not None and power.inputs[0] == x and is_scalar(edit, power.inputs[1], 3.0)
    )
