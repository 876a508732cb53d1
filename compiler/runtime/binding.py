"""Checking what a caller passes against what a function takes: names, dtypes, ranks and sizes."""

from __future__ import annotations

import ast
import difflib
import operator
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np

from llmc.errors import InputError
from llmc.package.manifest import ArraySpec, FunctionSpec
from llmc.runtime.arrays import numpy_dtype

_SHOWN = 6  # inputs that a message lists: a decoder has two for every layer
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}


def describe(spec: ArraySpec) -> str:
    """`int64 [batch, seq]`."""
    return f"{spec.dtype} [{', '.join(map(str, spec.shape))}]"


def bind(spec: FunctionSpec, inputs: Mapping[str, Any]) -> list[np.ndarray]:
    """Arrays in the function's order, of exactly the stated dtypes.

    Raises InputError, naming the input and what was expected, unless names, dtypes and ranks are right, a symbol has
    one size in all inputs and within its range, and dimensions that are sums or products of symbols agree with them.
    """
    _check_names(spec, inputs)
    arrays = [_convert(wanted, inputs[wanted.name]) for wanted in spec.inputs]
    sizes: dict[str, tuple[int, str]] = {}  # of each symbol, and the input that bound it
    for wanted, array in zip(spec.inputs, arrays, strict=True):
        for axis, (dim, size) in enumerate(zip(wanted.shape, array.shape, strict=True)):
            where = f"input {wanted.name!r}"
            if isinstance(dim, int) and size != dim:
                raise InputError(f"dimension {axis} is {size}, expected {dim} ({describe(wanted)})", where=where)
            if isinstance(dim, str) and dim.isidentifier():
                bound, by = sizes.setdefault(dim, (size, wanted.name))
                if bound != size:
                    raise InputError(
                        f"dimension {axis} ({dim}) is {size}, but input {by!r} has {dim} = {bound}", where=where
                    )
                low, high = spec.symbols.get(dim, (0, None))
                if size < low or (high is not None and size > high):
                    allowed = f"at least {low}" if high is None else f"from {low} to {high}"
                    raise InputError(f"dimension {axis} ({dim}) is {size}, must be {allowed}", where=where)
    _check_expressions(spec, arrays, {symbol: size for symbol, (size, _) in sizes.items()})
    return arrays


def _check_names(spec: FunctionSpec, inputs: Mapping[str, Any]) -> None:
    known = [wanted.name for wanted in spec.inputs]
    if inputs.keys() == set(known):
        return
    described = [f"{wanted.name}: {describe(wanted)}" for wanted in spec.inputs[:_SHOWN]]
    if len(known) > _SHOWN:
        described.append(f"and {len(known) - _SHOWN} more, which llmc inspect shows")
    signature = "the inputs are " + ", ".join(described)
    for name in inputs:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"the model has no such input{meant}", where=f"input {name!r}", hint=signature)
    missing = [name for name in known if name not in inputs]
    if missing:
        raise InputError("is missing", where=f"input {missing[0]!r}", hint=signature)


def _convert(wanted: ArraySpec, value: Any) -> np.ndarray:
    dtype, where = numpy_dtype(wanted.dtype), f"input {wanted.name!r}"
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise InputError(f"is not an array: {error}", where=where) from None
    if array.dtype != dtype:
        # Python numbers have no dtype of their own; an array has, and means it.
        if hasattr(value, "dtype") or not np.can_cast(array.dtype, dtype, "same_kind"):
            hint = f"convert it: array.astype('{wanted.dtype}')"
            raise InputError(f"has dtype {array.dtype}, expected {describe(wanted)}", where=where, hint=hint)
        array = array.astype(dtype)
    if array.ndim != len(wanted.shape):
        raise InputError(f"has shape {list(array.shape)}, expected {describe(wanted)}", where=where)
    return array


def _check_expressions(spec: FunctionSpec, arrays: list[np.ndarray], sizes: Mapping[str, int]) -> None:
    """Dimensions such as `past + seq`. One with a symbol that no input bound is left to the compiled code."""
    for wanted, array in zip(spec.inputs, arrays, strict=True):
        for axis, (dim, size) in enumerate(zip(wanted.shape, array.shape, strict=True)):
            if isinstance(dim, int) or dim.isidentifier():
                continue
            expected = _evaluate(_parse(dim), sizes)
            if expected is not None and expected != size:
                used = ", ".join(f"{symbol} = {n}" for symbol, n in sizes.items() if symbol in dim)
                raise InputError(
                    f"dimension {axis} ({dim}) is {size}, expected {expected} ({used})", where=f"input {wanted.name!r}"
                )


@cache
def _parse(dim: str) -> ast.expr | None:
    try:
        return ast.parse(dim, mode="eval").body
    except (SyntaxError, ValueError, RecursionError):
        return None


def _evaluate(node: ast.expr | None, sizes: Mapping[str, int]) -> int | None:
    """An integer expression over symbols; None if it holds anything else."""
    if isinstance(node, ast.Name):
        return sizes.get(node.id)
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _evaluate(node.left, sizes), _evaluate(node.right, sizes)
        if left is None or right is None or (isinstance(node.op, ast.FloorDiv) and right == 0):
            return None
        return int(_OPERATORS[type(node.op)](left, right))
    return None
