"""Slices, pads and splits whose bounds are known at run time alone.

A small kernel turns the bounds into places and extents; the extents become dimensions (`Context.measured`), the places
are read by the kernel that moves the elements. Whatever the bounds are, only elements of the tensor are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

from llmc.graph import Dim
from llmc.ops.context import Context
from llmc.ops.scalar import select
from llmc.ops.tensor import compute, shape_of
from llmc.tvm_shim import Expr, te, tirx


def i64(value: int) -> Any:
    return te.const(value, "int64")


def tabled(name: str, values: Sequence[Any]) -> Any:
    """A TE tensor of scalars, at least one."""

    def element(i: Any) -> Any:
        return reduce(lambda other, n: select(i == n, values[n], other), range(1, len(values)), values[0])

    return te.compute((len(values),), element, name=name)


def slice_of_data(
    ctx: Context, x: Expr, starts: Expr, ends: Expr, axes: Sequence[int], steps: Expr | Sequence[int]
) -> Expr:
    """x[start:end:step] along each of `axes`, clamped as numpy does; a step of 0 is read as 1."""
    shape = list(shape_of(x))
    given, known = ([], list(steps)) if isinstance(steps, (list, tuple)) else ([steps], None)

    def step_of(n: int, steps: list[Any]) -> Any:
        if known is not None:
            return i64(known[n])
        step = steps[0](i64(n)).astype("int64")
        return select(step == i64(0), i64(1), step)

    def bounds(dims: list[Any], starts: Any, ends: Any, steps: list[Any]) -> list[tuple[Any, Any]]:
        """(first place, count) for each axis."""
        found = []
        for n, d in enumerate(dims):
            step = step_of(n, steps)
            low, high = select(step > 0, i64(0), i64(-1)), select(step > 0, i64(1) * d, i64(1) * d - 1)
            first, last = (
                te.max(te.min(select(b < 0, b + d, b), high), low)
                for b in (t(i64(n)).astype("int64") for t in (starts, ends))
            )
            span = select(step > 0, last - first, first - last)
            count = te.max(te.floordiv(span + te.abs(step) - 1, te.abs(step)), i64(0))
            found.append((first, count))
        return found

    def firsts(s: Any, e: Any, dims: list[Any], steps: list[Any]) -> Any:
        return tabled("first", [first for first, _ in bounds(dims, s, e, steps)])

    def counts(s: Any, e: Any, dims: list[Any], steps: list[Any]) -> Any:
        return tabled("count", [count for _, count in bounds(dims, s, e, steps)])

    dims: list[Dim] = [shape[a] for a in axes]
    extents = ctx.measured(compute(ctx, "counts", counts, starts, ends, dims, given), len(axes))
    places = compute(ctx, "firsts", firsts, starts, ends, dims, given)
    for axis, extent in zip(axes, extents, strict=True):
        shape[axis] = extent

    def body(t: Any, first: Any, steps: list[Any], out: list[Any]) -> Any:
        def element(*i: Any) -> Any:
            at = list(i)
            for n, axis in enumerate(axes):
                at[axis] = first(i64(n)) + i[axis] * step_of(n, steps)
            return t(*at)

        return te.compute(out, element, name="slice")

    return compute(ctx, "slice", body, x, places, given, shape)


def padded_extents(ctx: Context, x: Expr, pads: Expr, axes: Sequence[int]) -> list[Dim]:
    """The shape of x with pads[n] elements before and pads[n + len(axes)] behind along the n-th of `axes`."""
    shape = list(shape_of(x))

    def sizes(pads: Any, dims: list[Any]) -> Any:
        ends = [(pads(i64(n)), pads(i64(n + len(axes)))) for n in range(len(axes))]
        return tabled(
            "extent", [d + b.astype("int64") + a.astype("int64") for d, (b, a) in zip(dims, ends, strict=True)]
        )

    extents = ctx.bounded(compute(ctx, "extents", sizes, pads, [shape[a] for a in axes]), len(axes))
    for axis, extent in zip(axes, extents, strict=True):
        shape[axis] = extent
    return shape


def demand_broadcast(ctx: Context, sizes: Expr, dims: Mapping[int, Dim]) -> None:
    """The run fails unless sizes[k] is 1 or dims[k], for all k of `dims`."""

    def fits(sizes: Any, dims: Sequence[Any], places: Sequence[int]) -> Any:
        found = [sizes(i64(k)).astype("int64") for k in places]
        right = tirx.all(*(tirx.any(s == 1, s == d) for s, d in zip(found, dims, strict=True)))
        return te.compute((1,), lambda i: select(right, i64(1), i64(0)), "fits")

    ctx.measured(compute(ctx, "fits", fits, sizes, list(dims.values()), list(dims)), 0, [1])


def split_extents(ctx: Context, sizes: Expr, dim: Dim, count: int) -> list[Dim]:
    """The first `count` of `sizes`, each cut to what is left of `dim`."""

    def body(sizes: Any, dim: Any) -> Any:
        left, parts = i64(1) * dim, []
        for n in range(count):
            parts.append(te.max(te.min(sizes(i64(n)).astype("int64"), left), i64(0)))
            left = left - parts[-1]
        return tabled("extent", parts)

    return ctx.measured(compute(ctx, "extents", body, sizes, dim), count)
