"""Operators that read or write elements at places given by an index tensor, and those that find such places.

Negative indices count from the end. An index outside of the tensor, which the standard forbids, means the nearest
element: whatever the data, no memory outside of the buffers is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

from llmc.graph import Dim
from llmc.ops.axes_data import around
from llmc.ops.context import Context, Rule
from llmc.ops.scalar import select
from llmc.ops.tensor import compute, dtype_of, index_of, loops, permute, product, reshape, shape_of
from llmc.tvm_shim import Expr, T, relax, te, tirx, topi

op = relax.op


# -- gather -----------------------------------------------------------------------------------------------------
def gather(ctx: Context, data: Expr, indices: Expr, axis: int) -> Expr:
    """data with `axis` replaced by the axes of `indices`."""
    shape, index = shape_of(data), shape_of(indices)
    at = len(index)

    def body(x: Any, places: Any, out: list[Any], size: Any) -> Any:
        def element(*i: Any) -> Any:
            place = places(*i[axis : axis + at]).astype("int64")
            return x(*i[:axis], index_of(place, size), *i[axis + at :])

        return te.compute(out, element, name="gather")

    return compute(ctx, "gather", body, data, indices, [*shape[:axis], *index, *shape[axis + 1 :]], shape[axis])


def rows(ctx: Context, table: Expr, ids: Expr) -> Expr:
    """An embedding: table [V, E] at ids [...] -> [..., E]."""
    return gather(ctx, table, ids, 0)


def _gather(ctx: Context) -> Expr:
    return gather(ctx, ctx.x(0), ctx.x(1), ctx.axis(int(ctx.attr("axis", 0)), ctx.rank()))


def _gather_elements(ctx: Context) -> Expr:
    axis = ctx.axis(int(ctx.attr("axis", 0)), ctx.rank())

    def body(x: Any, indices: Any, out: list[Any], size: Any) -> Any:
        def element(*i: Any) -> Any:
            return x(*i[:axis], index_of(indices(*i).astype("int64"), size), *i[axis + 1 :])

        return te.compute(out, element, name="gather_elements")

    return compute(ctx, "gather_elements", body, ctx.x(0), ctx.x(1), list(ctx.shape(1)), ctx.shape(0)[axis])


def _gather_nd(ctx: Context) -> Expr:
    """indices [..., n] pick data[batch..., i0, ..., in-1]."""
    batch, data, index = int(ctx.attr("batch_dims", 0)), ctx.shape(0), ctx.shape(1)
    depth, lead = int(index[-1]), len(index) - 1

    def body(x: Any, indices: Any, out: list[Any], sizes: list[Any]) -> Any:
        def element(*i: Any) -> Any:
            places = (
                index_of(indices(*i[:lead], te.const(n, "int64")).astype("int64"), sizes[batch + n])
                for n in range(depth)
            )
            return x(*i[:batch], *places, *i[lead:])

        return te.compute(out, element, name="gather_nd")

    out = [*index[:-1], *data[batch + depth :]]
    return compute(ctx, "gather_nd", body, ctx.x(0), ctx.x(1), out, list(data))


# -- scatter ----------------------------------------------------------------------------------------------------
def _reduction(ctx: Context) -> str:
    """TVM's name of the reduction."""
    mode = ctx.attr("reduction", "none")
    mode = mode.decode() if isinstance(mode, bytes) else mode
    return {"none": "update"}.get(mode, mode)


_COMBINED: dict[str, Callable[[Any, Any], Any]] = {
    "update": lambda old, new: new,
    "add": lambda old, new: old + new,
    "mul": lambda old, new: old * new,
    "max": te.max,
    "min": te.min,
}


def _scatter_elements(ctx: Context) -> Expr:
    axis, mode = ctx.axis(int(ctx.attr("axis", 0)), ctx.rank()), _reduction(ctx)
    indices = _places(ctx, ctx.x(1), lambda i: ctx.shape(0)[axis])

    def body(x: Any, indices: Any, updates: Any) -> Any:
        return topi.scatter_elements(x, indices, updates, axis, mode)

    return compute(ctx, "scatter_elements", body, ctx.x(0), indices, ctx.x(2))


def _scatter_nd(ctx: Context) -> Expr:
    """data with updates [..., rest] at the places of indices [..., n], one after another: several may be one place."""
    combine, data, index = _COMBINED[_reduction(ctx)], ctx.shape(0), ctx.shape(1)
    depth, count = int(index[-1]), product(index[:-1])
    places = _places(ctx, reshape(ctx, ctx.x(1), [count, depth]), lambda i: data[i])

    def nest(x: Any, places: Any, updates: Any, y: Any, count: Any, rest: Any, total: Any, *sizes: Any) -> None:
        with T.parallel(0, total) as i:
            y[i] = x[i]
        with T.serial(0, count) as m:
            row = te.const(0, "int64")
            for n, size in enumerate(sizes):
                row = row * size + places[m * depth + n]
            with T.serial(0, rest) as r:
                at = row * rest + r
                y[at] = combine(y[at], updates[m * rest + r])

    dims = [count, product(data[depth:]), product(data), *data[:depth]]
    (flat,) = loops(ctx, "scatter_nd", nest, [ctx.x(0), places, ctx.x(2)], [([dims[2]], ctx.dtype())], dims)
    return reshape(ctx, flat, list(data))


def _places(ctx: Context, indices: Expr, size_of: Callable[[int], Dim]) -> Expr:
    """Indices as int64 inside of the tensor; `size_of(n)` is the extent that column n of the last axis addresses."""
    shape = list(shape_of(indices))
    columns = int(shape[-1]) if isinstance(shape[-1], int) else 1
    sizes = [size_of(n) for n in range(columns)] if _is_table(ctx) else [size_of(0)]

    def body(x: Any, out: list[Any], sizes: list[Any]) -> Any:
        def element(*i: Any) -> Any:
            extents = [te.const(d, "int64") if isinstance(d, int) else d for d in sizes]
            size = reduce(lambda rest, n: select(i[-1] == n, extents[n], rest), range(1, len(extents)), extents[0])
            return index_of(x(*i).astype("int64"), size)

        return te.compute(out, element, name="places")

    return compute(ctx, "places", body, indices, shape, sizes)


def _is_table(ctx: Context) -> bool:
    """ScatterND's indices hold one column for each axis; ScatterElements' hold one axis alone."""
    return ctx.node.op == "ScatterND"


def _tensor_scatter(ctx: Context) -> Expr:
    """past [B, ..., max, ...] with the update written along an axis from place indices[b] on, or from 0; in circular
    mode what reaches the end goes on at the beginning."""
    axis, rank = ctx.axis(int(ctx.attr("axis", -2)), ctx.rank()), ctx.rank()
    circular = ctx.attr("mode", "linear") in ("circular", b"circular")
    first = [ctx.x(2)] if ctx.has(2) else []
    for i in (i for i in range(rank) if i != axis):
        ctx.unify(ctx.shape(0)[i], ctx.shape(1)[i])

    def body(past: Any, update: Any, first: list[Any], out: list[Any], length: Any, new: Any) -> Any:
        def element(*i: Any) -> Any:
            at = i[axis] - (first[0](i[0]).astype("int64") if first else te.const(0, "int64"))
            at = te.floormod(at, length) if circular else at
            written = update(*i[:axis], at, *i[axis + 1 :])
            return te.if_then_else(tirx.all(at >= 0, at < new), written, past(*i))

        return te.compute(out, element, name="tensor_scatter")

    length, new = ctx.shape(0)[axis], ctx.shape(1)[axis]
    return compute(ctx, "tensor_scatter", body, ctx.x(0), ctx.x(1), first, list(ctx.shape()), length, new)


def _reverse_sequence(ctx: Context) -> Expr:
    """The first lengths[b] elements of each sequence in reverse."""
    time, batch = int(ctx.attr("time_axis", 0)), int(ctx.attr("batch_axis", 1))

    def body(x: Any, lengths: Any, out: list[Any], size: Any) -> Any:
        def element(*i: Any) -> Any:
            n, place = te.min(lengths(i[batch]).astype("int64"), size), i[time].astype("int64")
            at = select(place < n, n - 1 - place, place)
            return x(*i[:time], at, *i[time + 1 :])

        return te.compute(out, element, name="reverse_sequence")

    return compute(ctx, "reverse_sequence", body, ctx.x(0), ctx.x(1), list(ctx.shape()), ctx.shape()[time])


# -- finding places ---------------------------------------------------------------------------------------------
def _one_hot(ctx: Context) -> Expr:
    """values [off, on] spread along a new axis of `depth`; an index outside of -depth..depth-1 is nowhere."""
    (depth,), shape = ctx.extents(1), ctx.shape(0)
    axis = ctx.axis(int(ctx.attr("axis", -1)), len(shape) + 1)

    def body(indices: Any, values: Any, out: list[Any], depth: Any) -> Any:
        def element(*i: Any) -> Any:
            place = indices(*i[:axis], *i[axis + 1 :]).astype("int64")
            hit = select(place < 0, place + depth, place) == i[axis]
            return select(hit, values(te.const(1, "int64")), values(te.const(0, "int64")))

        return te.compute(out, element, name="one_hot")

    return compute(ctx, "one_hot", body, ctx.x(0), ctx.x(2), [*shape[:axis], depth, *shape[axis:]], depth)


def _top_k(ctx: Context) -> tuple[Expr, ...]:
    """The k largest or smallest along an axis, in order; of equal ones the first comes first.

    One pass for each of the k, looking for the best behind the one before: nothing but loops, where TVM's operator
    needs a library function that artifacts do not carry.
    """
    k: Dim = int(ctx.attr("k")) if ctx.node.version < 10 else ctx.extents(1)[0]
    axis = ctx.axis(int(ctx.attr("axis", -1)), ctx.rank())
    last = [i for i in range(ctx.rank()) if i != axis] + [axis]
    x = permute(ctx, ctx.x(), last)
    rows = shape_of(x)[:-1]
    flat = reshape(ctx, x, [product(rows), shape_of(x)[-1]])
    values, places = _best(ctx, flat, k, bool(ctx.attr("largest", 1)))
    back = sorted(range(len(last)), key=last.__getitem__)
    first, second = (permute(ctx, reshape(ctx, y, [*rows, k]), back) for y in (values, places))
    return first, second


def _best(ctx: Context, x: Expr, k: Dim, largest: bool) -> tuple[Expr, Expr]:
    """(values, places), both [M, k], of the best k in each row of x [M, N]."""
    (m, n), dtype = shape_of(x), dtype_of(x)

    def nest(data: Any, values: Any, places: Any, m: Any, n: Any, k: Any) -> None:
        def better(a: Any, i: Any, b: Any, j: Any) -> Any:
            return tirx.any(a > b if largest else a < b, tirx.all(a == b, i < j))

        with T.parallel(0, m) as row:
            with T.serial(0, k) as rank:
                at = row * k + rank
                places[at] = T.int64(-1)
                with T.serial(0, n) as i:
                    v = data[row * n + i]
                    before = T.max(at - 1, T.int64(0))
                    late = tirx.any(rank == 0, better(values[before], places[before], v, i))
                    with T.If(tirx.all(late, tirx.any(places[at] < 0, better(v, i, values[at], places[at])))):
                        with T.Then():
                            values[at] = v
                            places[at] = i

    values, places = loops(ctx, "top_k", nest, [x], [([m, k], dtype), ([m, k], "int64")], [m, n, k])
    return values, places


def _scan(f: Callable[[Any, Any], Any], start: int) -> Rule:
    """A running sum or product along one axis, perhaps without the element itself, perhaps from the end."""

    def rule(ctx: Context) -> Expr:
        shape, dtype = ctx.shape(), ctx.dtype()
        backwards, exclusive = bool(ctx.attr("reverse", 0)), bool(ctx.attr("exclusive", 0))

        def nest(x: Any, y: Any, rows: Any, n: Any, inner: Any) -> None:
            with T.parallel(0, rows * inner) as row:
                base = te.floordiv(row, inner) * n * inner + te.floormod(row, inner)
                with T.serial(0, n) as k:
                    at = base + (n - 1 - k if backwards else k) * inner
                    before = at + inner if backwards else at - inner
                    with T.If(k == 0):
                        with T.Then():
                            y[at] = te.const(start, dtype) if exclusive else x[at]
                        with T.Else():
                            y[at] = f(y[before], x[before] if exclusive else x[at])

        if ctx.const(1) is None:
            dims: Sequence[Dim] = around(ctx, ctx.x(1), shape)
        else:
            axis = ctx.axis(ctx.ints(1)[0], len(shape))
            dims = [product(shape[:axis]), shape[axis], product(shape[axis + 1 :])]
        (flat,) = loops(ctx, "scan", nest, [ctx.x()], [([product(shape)], dtype)], dims)
        return reshape(ctx, flat, shape)

    return rule


RULES: dict[str, Rule] = {
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "ScatterElements": _scatter_elements,
    "Scatter": _scatter_elements,
    "ScatterND": _scatter_nd,
    "TensorScatter": _tensor_scatter,
    "ReverseSequence": _reverse_sequence,
    "OneHot": _one_hot,
    "TopK": _top_k,
    "CumSum": _scan(lambda a, b: a + b, 0),
    "CumProd": _scan(lambda a, b: a * b, 1),
}
