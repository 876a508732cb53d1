"""What stands between the product of queries and keys and the softmax, as one factor and one mask.

Exporters scale before or after they mask, add ALiBi's bias and the mask one after the other, or write a very negative
number over what must not be seen. The mask of such a chain is what it makes of scores that are all zero.
"""

from __future__ import annotations

import numpy as np

from llmc.graph import Dim, Editor, Node, TensorType, same_dim
from llmc.match import made_by, peel_scale, scalar

_HIDDEN_BELOW = -1e4
_LONGEST = 8  # steps of a chain

_Step = tuple[Node, int]  # a node, and which of its inputs carries the scores


def split_mask(edit: Editor, name: str) -> tuple[float, str, str]:
    """(factor, scores, mask) of factor * scores + mask; (1, name, "") where nothing is added."""
    chain = _chain(edit, name, _LONGEST)
    if not chain:
        return 1.0, name, ""
    factor, mask = 1.0, ""
    for node, carrier in reversed(chain):
        if node.op in ("Mul", "Div"):
            number = scalar(edit, node.inputs[1 - carrier])
            assert number is not None
            factor = factor * number if node.op == "Mul" else factor / number
        if node.op == "Add" and not mask:
            mask = node.inputs[1 - carrier]
        elif node.op == "Where" or mask:
            mask = _of_zeros(edit, node, carrier, mask)
    last, carrier = chain[-1]
    return factor, last.inputs[carrier], mask


def _chain(edit: Editor, name: str, most: int) -> list[_Step] | None:
    """From the softmax inwards; [] for scores as they come, None where there are none."""
    if made_by(edit, peel_scale(edit, name)[1], "MatMul", "Tanh") is not None:
        return []
    node = made_by(edit, name, "Add", "Where", "Mul", "Div")
    if node is None or most == 0:
        return None
    for carrier in _carriers(edit, node):
        inner = _chain(edit, node.inputs[carrier], most - 1)
        if inner is not None:
            return [(node, carrier), *inner]
    return None


def _carriers(edit: Editor, node: Node) -> list[int]:
    """Inputs that may carry scores: the others are a mask, or a number that scales or hides."""
    if node.op == "Add":
        return [0, 1]
    numbers = [scalar(edit, i) for i in node.inputs]
    if node.op == "Where":
        return [i for i in (1, 2) if (low := numbers[3 - i]) is not None and low < _HIDDEN_BELOW]
    return [i for i in ((0, 1) if node.op == "Mul" else (0,)) if numbers[1 - i]]


def _of_zeros(edit: Editor, node: Node, carrier: int, mask: str) -> str:
    """What the step makes of `mask`, or of zero where there is none yet. Layers that share their masks share this."""
    if not mask:
        mask = "scores.zero"
        if mask not in edit.types:
            edit.constant(mask, np.zeros((), np.float32))
    inputs = [mask if i == carrier else x for i, x in enumerate(node.inputs)]
    name = f"{node.op}({','.join(inputs)})"
    if name not in edit.types:
        shape: tuple[Dim, ...] = ()
        for x in inputs:
            shape = _broadcast(shape, edit.types[x].shape)
        edit.add(
            Node(node.op, tuple(inputs), (name,), node.attrs, "", node.name, node.version),
            [TensorType(shape, "float32")],
        )
    return name


def _broadcast(a: tuple[Dim, ...], b: tuple[Dim, ...]) -> tuple[Dim, ...]:
    n = max(len(a), len(b))
    pairs = zip((1,) * (n - len(a)) + a, (1,) * (n - len(b)) + b, strict=True)
    return tuple(y if same_dim(x, 1) else x for x, y in pairs)
