"""Slices and pads whose bounds are known at run time alone.

A small kernel turns the bounds into places and extents; the extents become dimensions (`Context.measured`), the places
are read by the kernel that moves the elements.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

from llmc.graph import Dim
from llmc.ops.context import Context
from llmc.ops.scalar import select
from llmc.ops.tensor import compute, shape_of
from llmc.tvm_shim import Expr, te


def i64(value: int) -> Any:
    return te.const(value, "int64")


def _tabled(name: str, values: list[Any]) -> Any:
    """A TE tensor of int64 scalars."""

    def element(i: Any) -> Any:
        return reduce(lambda other, n: select(i == n, values[n], other), range(1, len(values)), values[0])

    return te.compute((len(values),), element, name=name)


def slice_of_data(ctx: Context, x: Expr, starts: Expr, ends: Expr, axes: list[int], steps: list[int]) -> Expr:
    """x[start:end:step] along each of `axes`, clamped as numpy does."""
    shape = list(shape_of(x))

    def bounds(dims: list[Any], starts: Any, ends: Any) -> list[tuple[Any, Any]]:
        """(first place, count) for each axis."""
        found = []
        for n, (d, step) in enumerate(zip(dims, steps, strict=True)):
            low, high = (i64(0), d) if step > 0 else (i64(-1), d - 1)
            first, last = (
                te.max(te.min(select(b < 0, b + d, b), high), low)
                for b in (t(i64(n)).astype("int64") for t in (starts, ends))
            )
            span = last - first if step > 0 else first - last
            count = te.max(te.floordiv(span + i64(abs(step) - 1), i64(abs(step))), i64(0))
            found.append((first, count))
        return found

    def firsts(s: Any, e: Any, dims: list[Any]) -> Any:
        return _tabled("first", [first for first, _ in bounds(dims, s, e)])

    def counts(s: Any, e: Any, dims: list[Any]) -> Any:
        return _tabled("count", [count for _, count in bounds(dims, s, e)])

    dims: list[Dim] = [shape[a] for a in axes]
    extents = ctx.measured(compute(ctx, "counts", counts, starts, ends, dims), len(axes))
    places = compute(ctx, "firsts", firsts, starts, ends, dims)
    for axis, extent in zip(axes, extents, strict=True):
        shape[axis] = extent

    def body(t: Any, first: Any, out: list[Any]) -> Any:
        def element(*i: Any) -> Any:
            at = list(i)
            for n, (axis, step) in enumerate(zip(axes, steps, strict=True)):
                at[axis] = first(i64(n)) + i[axis] * step
            return t(*at)

        return te.compute(out, element, name="slice")

    return compute(ctx, "slice", body, x, places, shape)


def padded_extents(ctx: Context, x: Expr, pads: Expr, axes: list[int]) -> list[Dim]:
    """The shape of x with pads[n] elements before and pads[n + len(axes)] behind along the n-th of `axes`."""
    shape = list(shape_of(x))

    def sizes(pads: Any, dims: list[Any]) -> Any:
        ends = [(pads(i64(n)), pads(i64(n + len(axes)))) for n in range(len(axes))]
        return _tabled(
            "extent", [d + b.astype("int64") + a.astype("int64") for d, (b, a) in zip(dims, ends, strict=True)]
        )

    extents = ctx.measured(compute(ctx, "extents", sizes, pads, [shape[a] for a in axes]), len(axes))
    for axis, extent in zip(axes, extents, strict=True):
        shape[axis] = extent
    return shape
