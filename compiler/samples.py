"""Random inputs that make sense to a model: ids inside the vocabulary, masks of ones, positions that count on."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence

import numpy as np

from llmc.errors import OptionError
from llmc.package.manifest import ArraySpec

# Sizes given to the symbols of a case, in order: all different, so that exchanged dimensions show.
_SIZES = ((1, 1, 1, 1, 1), (5, 7, 11, 3, 2), (33, 64, 17, 9, 13))


def cases(symbols: Mapping[str, Sequence[int | None]], given: Mapping[str, int]) -> list[dict[str, int]]:
    """Several assignments of sizes to symbols, within their ranges [low, high or None]; `given` ones are kept.

    A batch stays small, and a past is empty in the first case.
    """
    out: list[dict[str, int]] = []
    for i, sizes in enumerate(_SIZES):
        dims = {}
        for k, (name, (low, high)) in enumerate(symbols.items()):
            size = i + 1 if "batch" in name else 0 if "past" in name and i == 0 else sizes[k % len(sizes)]
            dims[name] = given.get(name, max(low or 0, size if high is None else min(size, high)))
        if dims not in out:
            out.append(dims)
    return out


def make(
    inputs: Sequence[ArraySpec], dims: Mapping[str, int], rng: np.random.Generator, vocabulary: int
) -> dict[str, np.ndarray]:
    """One array for each of a function's `inputs`, with the symbols in their shapes bound to `dims`.

    Ids are drawn below `vocabulary`. Raises OptionError where a shape has a symbol that `dims` lacks.
    """
    shapes = {i.name: tuple(size(d, dims) for d in i.shape) for i in inputs}
    past = max((s[2] for name, s in shapes.items() if name.startswith("past") and len(s) == 4), default=0)
    return {i.name: _array(i.name, i.dtype, shapes[i.name], past, rng, vocabulary) for i in inputs}


def size(dim: int | str, dims: Mapping[str, int]) -> int:
    """A dimension as a number: an int, a symbol, or a sum, difference or product of them."""
    if isinstance(dim, int):
        return dim
    try:
        return _evaluate(ast.parse(dim, mode="eval").body, dims)
    except KeyError as missing:
        raise OptionError(f"no size given for dimension {missing}", hint=f"add --dim {missing.args[0]}=...") from None


def _evaluate(node: ast.expr, dims: Mapping[str, int]) -> int:
    if isinstance(node, ast.Name):
        return dims[node.id]
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.BinOp):
        left, right = _evaluate(node.left, dims), _evaluate(node.right, dims)
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        if isinstance(node.op, ast.Mult):
            return left * right
        if isinstance(node.op, ast.FloorDiv):
            return left // right
    raise OptionError(f"cannot compute the dimension '{ast.unparse(node)}'")


def _array(
    name: str, dtype: str, shape: tuple[int, ...], past: int, rng: np.random.Generator, vocabulary: int
) -> np.ndarray:
    kind = np.dtype(dtype)
    if "mask" in name:
        return _padded(shape, rng, past).astype(kind)
    if "position" in name:
        return np.broadcast_to(np.arange(past, past + shape[-1]), shape).astype(kind)
    if "token_type" in name:
        return np.zeros(shape, kind)
    if kind == np.bool_:
        return rng.integers(0, 2, shape).astype(kind)
    if kind.kind in "iu":
        return rng.integers(0, min(vocabulary, np.iinfo(kind).max), shape).astype(kind)
    return rng.standard_normal(shape).astype(kind)


def _padded(shape: tuple[int, ...], rng: np.random.Generator, past: int) -> np.ndarray:
    """Ones; without a past, rows after the first end in some zeros, as in a padded batch."""
    mask = np.ones(shape)
    if len(shape) == 2 and not past:
        for row in mask[1:]:
            row[rng.integers(1, len(row) + 1) :] = 0
    return mask
