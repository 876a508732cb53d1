"""Axes that are known at run time alone.

Small kernels find which axes are named, and the extents that follow; these become dimensions (`Context.measured`). The
rank of a result must not depend on data, so where it follows from how many axes there are, that number is known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from operator import mul
from typing import Any

from llmc.graph import Dim
from llmc.ops.context import Context
from llmc.ops.scalar import select
from llmc.ops.shape_data import i64, tabled
from llmc.ops.tensor import compute, index_of, product, reshape, shape_of
from llmc.tvm_shim import Expr, te, tirx


def flat(ctx: Context, x: Expr) -> Expr:
    """x [n], or a scalar, as a tensor of one dimension."""
    return x if shape_of(x) else reshape(ctx, x, [1])


def count_of(ctx: Context, i: int) -> int:
    """How many elements input `i` holds. Raises UnsupportedError where only the run knows."""
    count = product(ctx.shape(i))
    if not isinstance(count, int):
        ctx.fail(f"input {i} ('{ctx.node.input(i)}') decides the result's rank, and how long it is, {count}, varies")
    return count


def entries(ctx: Context, axes: Expr, rank: int) -> Expr:
    """int64 [rank]: which element of `axes` names each axis, a negative number where none does."""
    axes = flat(ctx, axes)

    def body(axes: Any, count: Any) -> Any:
        r = te.reduce_axis((0, count), "r")

        def entry(i: Any) -> Any:
            named = axes(r).astype("int64")
            hit = tirx.any(named == i, named + i64(rank) == i)
            return te.max(select(hit, r.astype("int64"), i64(-1)), axis=r)

        return te.compute((rank,), entry, name="entries")

    return compute(ctx, "entries", body, axes, shape_of(axes)[0])


def spread(ctx: Context, values: Expr, entry: Expr, default: int) -> Expr:
    """int64 [rank]: values[entry[i]] for each axis i, `default` for one that is not named."""

    def body(values: Any, entry: Any, out: list[Any]) -> Any:
        def element(i: Any) -> Any:
            missing = tirx.any(entry(i) < i64(0), entry(i) >= values.shape[0])
            return te.if_then_else(missing, i64(default), values(entry(i)).astype("int64"))

        return te.compute(out, element, name="spread")

    return compute(ctx, "spread", body, values, entry, list(shape_of(entry)))


def halved_extents(ctx: Context, x: Expr, axes: Expr, *, all_of_none: bool) -> tuple[list[Dim], list[Dim]]:
    """(shape of x with 1 for each axis that is named, shape of x with 1 for each other); `all_of_none`: no axes mean
    all."""
    rank, dims = len(shape_of(x)), list(shape_of(x))

    def body(entry: Any, dims: list[Any]) -> Any:
        named = _named(entry, rank, all_of_none)
        one = [select(n, i64(1), i64(1) * d) for n, d in zip(named, dims, strict=True)]
        other = [select(n, i64(1) * d, i64(1)) for n, d in zip(named, dims, strict=True)]
        return tabled("extents", [*one, *other])

    extents = ctx.measured(compute(ctx, "extents", body, entries(ctx, axes, rank), dims), 2 * rank)
    return extents[:rank], extents[rank:]


def _named(entry: Any, rank: int, all_of_none: bool) -> list[Any]:
    """Is it named, for each axis?"""
    named = [entry(i64(i)) >= i64(0) for i in range(rank)]
    return [tirx.any(n, tirx.Not(tirx.any(*named))) for n in named] if all_of_none else named


def squeezed_extents(ctx: Context, x: Expr, axes: Expr, left: int) -> list[Dim]:
    """The shape of x without the named axes, `left` dimensions."""
    rank, dims = len(shape_of(x)), list(shape_of(x))
    if left <= 0:
        return []

    def body(entry: Any, dims: list[Any]) -> Any:
        before, kept = i64(0), [i64(1)] * left
        for named, d in zip(_named(entry, rank, False), dims, strict=True):
            kept = [select(tirx.all(tirx.Not(named), before == i64(j)), i64(1) * d, k) for j, k in enumerate(kept)]
            before = before + select(named, i64(0), i64(1))
        return tabled("extents", kept)

    return ctx.measured(compute(ctx, "extents", body, entries(ctx, axes, rank), dims), left)


def unsqueezed_extents(ctx: Context, x: Expr, axes: Expr, rank: int) -> list[Dim]:
    """The shape of x with a 1 at each named axis of the result, which has `rank` dimensions."""

    def body(entry: Any, dims: list[Any]) -> Any:
        at, sizes = i64(0), []
        for i in range(rank):
            own = reduce(lambda other, n: select(at == i64(n), i64(1) * dims[n], other), range(len(dims)), i64(1))
            is_new = entry(i64(i)) >= i64(0)
            sizes.append(select(is_new, i64(1), own))
            at = at + select(is_new, i64(0), i64(1))
        return tabled("extents", sizes)

    return ctx.measured(compute(ctx, "extents", body, entries(ctx, axes, rank), list(shape_of(x))), rank)


def around(ctx: Context, axis: Expr, shape: Sequence[Dim]) -> tuple[Dim, Dim, Dim]:
    """(elements before an axis, its extent, elements behind it) of a tensor of that shape."""

    def body(axis: Any, dims: list[Any]) -> Any:
        at = index_of(axis(i64(0)).astype("int64"), i64(len(dims)))

        def elements(belongs: Callable[[Any], Any]) -> Any:
            counted = (select(belongs(i64(i)), i64(1) * d, i64(1)) for i, d in enumerate(dims))
            return reduce(mul, counted, i64(1))

        return tabled("around", [elements(lambda i: i < at), elements(lambda i: i == at), elements(lambda i: i > at)])

    before, extent, behind = ctx.measured(compute(ctx, "around", body, flat(ctx, axis), list(shape)), 3)
    return before, extent, behind


def with_extent(ctx: Context, axis: Expr, shape: Sequence[Dim], extent: Dim) -> list[Dim]:
    """The shape, with another extent at an axis."""

    def body(axis: Any, dims: list[Any], extent: Any) -> Any:
        at = index_of(axis(i64(0)).astype("int64"), i64(len(dims)))
        return tabled("extents", [select(at == i64(i), i64(1) * extent, i64(1) * d) for i, d in enumerate(dims)])

    return ctx.measured(compute(ctx, "extents", body, flat(ctx, axis), list(shape), extent), len(shape))
