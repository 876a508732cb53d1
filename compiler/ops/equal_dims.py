"""What makes two dimensions equal where neither is a symbol: past_a + seq == past_b + seq says that two pasts are one.

A model whose picture has to shrink to one row, (height - 33) // 48 + 1 == 1, takes every height from 33 to 80.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

from llmc.graph import Dim, as_dim, same_dim
from llmc.tvm_shim import Analyzer, Expr, substitute, tirx, tvm


def solve(a: Dim, b: Dim) -> tuple[Expr, Dim] | None:
    """(symbol, its value) where a == b has one solution for a symbol, in terms of the others; None where it has not."""
    analyzer = Analyzer()
    difference = analyzer.simplify(a - b)
    for symbol in _symbols(difference):
        for value in (symbol - difference, symbol + difference):
            value = as_dim(analyzer.simplify(value))
            if symbol not in _symbols(value) and not _divides(value):
                return symbol, value
    return None


def _symbols(dim: Dim) -> list[Any]:
    return [] if isinstance(dim, int) else list(tvm.tirx.analysis.undefined_vars(dim))


def _divides(dim: Dim) -> bool:
    """Is there a division in it? A size that was rounded says little about what it was rounded from."""
    if isinstance(dim, int):
        return False
    parts = [as_dim(getattr(dim, part)) for part in ("a", "b") if hasattr(dim, part)]
    return isinstance(dim, (tirx.FloorDiv, tirx.FloorMod)) or any(map(_divides, parts))


def sizes_where_equal(analyzer: Any, a: Dim, b: Dim) -> tuple[Expr, int, int] | None:
    """(symbol, least, greatest): a == b for these sizes of the symbol, of those that `analyzer` knows, and no others.

    None where that cannot be said: one side has to be a number once common factors are gone, and the other a function
    of one symbol that never falls.
    """
    a, b = _without_common_factors(a, b)
    value, number = (a, b) if isinstance(b, int) else (b, a)
    if isinstance(value, int) or not isinstance(number, int):
        return None
    found = _symbols(value)
    if len(found) != 1:
        return None
    (symbol,), bound = found, analyzer.const_int_bound(found[0])
    simplifier = Analyzer()

    def at(size: int) -> int:
        return int(as_dim(simplifier.simplify(substitute(value, {symbol: size}))))

    end = bound.max_value + 1
    least = _first(bound.min_value, end, lambda size: at(size) >= number)
    greatest = _first(least, end, lambda size: at(size) > number) - 1
    if greatest < least or (least, greatest) == (bound.min_value, bound.max_value):
        return None
    proof = Analyzer()
    proof.bind(symbol, tvm.ir.Range(least, greatest + 1))
    return (symbol, least, greatest) if proof.can_prove_equal(value, number) else None


def _first(low: int, end: int, holds: Callable[[int], bool]) -> int:
    """The first size from `low` on for which a condition holds that never ceases to hold; `end` where there is none."""
    while low < end:
        middle = (low + end) // 2
        low, end = (low, middle) if holds(middle) else (middle + 1, end)
    return low


def same_polynomial(a: Dim, b: Dim) -> bool:
    """Are two dimensions equal once their products are multiplied out? TVM does that for no two symbols."""
    return _terms(a) == _terms(b)


def _terms(dim: Dim) -> dict[tuple[str, ...], int]:
    """Coefficients by the sorted symbols of their term; what is no sum or product counts as a symbol."""
    if isinstance(dim, int):
        return {(): dim} if dim else {}
    if not isinstance(dim, tirx.Add | tirx.Sub | tirx.Mul):
        return {(str(dim),): 1}
    left, right = _terms(as_dim(dim.a)), _terms(as_dim(dim.b))
    total: dict[tuple[str, ...], int] = {}
    if isinstance(dim, tirx.Mul):
        for (one, c), (other, d) in product(left.items(), right.items()):
            key = tuple(sorted((*one, *other)))
            total[key] = total.get(key, 0) + c * d
    else:
        sign = -1 if isinstance(dim, tirx.Sub) else 1
        for terms, factor in ((left, 1), (right, sign)):
            for key, c in terms.items():
                total[key] = total.get(key, 0) + factor * c
    return {key: c for key, c in total.items() if c}


def quotient(dividend: Sequence[Dim], divisor: Sequence[Dim]) -> Dim:
    """The product of some dimensions over that of others, which divides it."""
    over, under = _cancelled(
        [f for dim in dividend for f in _factors(dim)], [f for dim in divisor for f in _factors(dim)]
    )
    number = math.prod(d for d in under if isinstance(d, int))
    fixed = math.prod(d for d in over if isinstance(d, int))
    common = math.gcd(number, fixed)
    top = _product([fixed // common, *(d for d in over if not isinstance(d, int))])
    bottom = _product([number // common, *(d for d in under if not isinstance(d, int))])
    return top if isinstance(bottom, int) and bottom == 1 else as_dim(Analyzer().simplify(top // bottom))


def _without_common_factors(a: Dim, b: Dim) -> tuple[Dim, Dim]:
    left, right = _cancelled(_factors(a), _factors(b))
    return _product(left), _product(right)


def _cancelled(left: list[Dim], right: list[Dim]) -> tuple[list[Dim], list[Dim]]:
    """Two lists of factors without those that both have."""
    kept = []
    right = list(right)
    for factor in left:
        match = next((k for k, other in enumerate(right) if same_dim(factor, other)), None)
        if match is None:
            kept.append(factor)
        else:
            del right[match]
    return kept, right


def _factors(dim: Dim) -> list[Dim]:
    return [*_factors(as_dim(dim.a)), *_factors(as_dim(dim.b))] if isinstance(dim, tirx.Mul) else [dim]


def _product(factors: list[Dim]) -> Dim:
    result: Dim = 1
    for factor in factors:
        result = result * factor
    return as_dim(Analyzer().simplify(result)) if not isinstance(result, int) else result
