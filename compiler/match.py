"""The few questions that every rewrite asks of a graph under edit."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from llmc.graph import LLMC, Editor, Node


def nodes(edit: Editor, *ops: str, domain: str = "") -> Iterator[Node]:
    """The nodes of these operators that are still there when their turn comes."""
    for node in list(edit.nodes.values()):
        if node.op in ops and node.domain == domain and id(node) in edit.nodes:
            yield node


def made_by(edit: Editor, name: str, *ops: str, domain: str = "") -> Node | None:
    """The node that makes a value, if it is one of `ops`."""
    node = edit.producer.get(name)
    return node if node is not None and node.op in ops and node.domain == domain else None


def fused(edit: Editor, name: str, op: str) -> Node | None:
    """The fused operator `op` that makes a value, if it does."""
    return made_by(edit, name, op, domain=LLMC)


def array(edit: Editor, name: str) -> np.ndarray | None:
    """A constant of numbers."""
    value = edit.constants.get(name)
    return value if isinstance(value, np.ndarray) else None


def stored(edit: Editor, name: str) -> str:
    """The float16 constant that a Cast makes float32 of, or else the value itself."""
    cast = made_by(edit, name, "Cast")
    value = array(edit, cast.inputs[0]) if cast is not None else None
    wide = value is not None and value.dtype == np.float16 and edit.types[name].dtype == "float32"
    return cast.inputs[0] if cast is not None and wide else name


def scalar(edit: Editor, name: str) -> float | None:
    """A constant of one element, as a Python float."""
    value = array(edit, name)
    return float(value.reshape(-1)[0]) if value is not None and value.size == 1 else None


def is_scalar(edit: Editor, name: str, value: float) -> bool:
    """Is this the constant `value`, up to what storing it in 8 bits does to it?"""
    stored = scalar(edit, name)
    return stored is not None and math.isclose(stored, value, rel_tol=1e-4)


def ints(edit: Editor, name: str) -> list[int] | None:
    """A small constant of integers, flattened."""
    value = array(edit, name)
    return [int(v) for v in value.reshape(-1)] if value is not None and value.dtype.kind in "iu" else None


def used_once(edit: Editor, name: str) -> bool:
    """Has the value one reader, and is it no output of the graph?"""
    return len(edit.consumers.get(name, ())) == 1 and name not in edit.graph.outputs


def only_user(edit: Editor, name: str, *ops: str, domain: str = "") -> Node | None:
    """The single reader of a value, if it is one of `ops` and the value is no output."""
    if not used_once(edit, name):
        return None
    node = edit.consumers[name][0]
    return node if node.op in ops and node.domain == domain else None


def other(node: Node, name: str) -> str:
    """The other input of a binary node."""
    return node.inputs[1] if node.inputs[0] == name else node.inputs[0]


def rank(edit: Editor, name: str) -> int:
    return len(edit.types[name].shape)


def unsqueezed(edit: Editor, name: str) -> str:
    """The value behind any Unsqueeze, Squeeze or Identity."""
    while (node := made_by(edit, name, "Unsqueeze", "Squeeze", "Identity")) is not None:
        name = node.inputs[0]
    return name


def peel_scale(edit: Editor, name: str) -> tuple[float, str]:
    """(c, x) where the value is c * x: all scalar factors and divisors in front of x taken off."""
    factor = 1.0
    while (node := made_by(edit, name, "Mul", "Div")) is not None:
        left, right = (scalar(edit, i) for i in node.inputs)
        if node.op == "Div" and right:
            factor, name = factor / right, node.inputs[0]
        elif node.op == "Mul" and (left is not None or right is not None):
            constant = left if left is not None else right
            assert constant is not None
            factor, name = factor * constant, node.inputs[1 if left is not None else 0]
        else:
            break
    return factor, name
