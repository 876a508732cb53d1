"""Operators whose result is as long as the data decides: places of what is set, distinct elements, chosen boxes.

Each finds places in a buffer that is large enough whatever the data, and counts them; the count then becomes a
dimension that is known at run time (`Context.measured`), and the places are copied.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np

from llmc.ops.context import Context, Rule
from llmc.ops.gather import gather
from llmc.ops.scalar import const, select
from llmc.ops.tensor import cast, compute, dtype_of, elementwise, loops, permute, product, reshape, shape_of
from llmc.tvm_shim import Expr, T, te, tirx

_STEPS = 33  # halvings of a range that an int32 holds


def i64(value: int) -> Any:
    return te.const(value, "int64")


def first(ctx: Context, x: Expr, count: Expr) -> Expr:
    """The first count[0] elements of x [N]."""
    (n,) = ctx.measured(count, 1)

    def body(t: Any, out: list[Any]) -> Any:
        return te.compute(out, lambda i: t(i), name="first")

    return compute(ctx, "first", body, x, [n])


def places(ctx: Context, flags: Expr) -> Expr:
    """int64 [n]: where the int8 `flags` [N] are not 0, in order."""
    (size,) = shape_of(flags)

    def nest(flags: Any, found: Any, count: Any, size: Any) -> None:
        count[0] = i64(0)
        with T.serial(0, size) as i:
            with T.If(flags[i] != te.const(0, "int8")):
                with T.Then():
                    found[count[0]] = i
                    count[0] = count[0] + i64(1)

    found, count = loops(ctx, "places", nest, [flags], [([size], "int64"), ([1], "int64")], [size])
    return first(ctx, found, count)


def flags_of(ctx: Context, x: Expr) -> Expr:
    """int8 [N]: 1 where an element of x is not 0."""

    def flag(a: Any) -> Any:
        one, zero = te.const(1, "int8"), te.const(0, "int8")
        return a.astype("int8") if dtype_of(x) == "bool" else select(a != const(a, 0), one, zero)

    return reshape(ctx, elementwise(ctx, "flags", flag, x), [product(shape_of(x))])


def _non_zero(ctx: Context) -> Expr:
    """[rank, n]: the indices of all elements that are not 0."""
    x = ctx.x() if ctx.rank() else reshape(ctx, ctx.x(), [1])
    found = places(ctx, flags_of(ctx, x))
    sizes = shape_of(x)

    def body(p: Any, out: list[Any], sizes: list[Any]) -> Any:
        def element(axis: Any, i: Any) -> Any:
            coordinates: list[Any] = []
            flat = p(i)
            for n, size in reversed(list(enumerate(sizes))):
                coordinates.insert(0, te.floormod(flat, size) if n else flat)
                flat = te.floordiv(flat, size)
            return reduce(lambda rest, n: select(axis == n, coordinates[n], rest), range(1, len(sizes)), coordinates[0])

        return te.compute(out, element, name="non_zero")

    return compute(ctx, "non_zero", body, found, [ctx.rank(), *shape_of(found)], list(sizes))


def _compress(ctx: Context) -> Expr:
    """The slices along an axis, or the elements, whose condition is set."""
    found = places(ctx, flags_of(ctx, ctx.x(1)))
    if ctx.attr("axis") is None:
        return gather(ctx, reshape(ctx, ctx.x(), [product(ctx.shape())]), found, 0)
    return gather(ctx, ctx.x(), found, ctx.axis(int(ctx.attr("axis")), ctx.rank()))


# -- distinct elements ------------------------------------------------------------------------------------------
def order_of(ctx: Context, rows: Expr) -> Expr:
    """int64 [M]: the places of the rows [M, K] in ascending order, the first of equal ones first.

    A merge sort in which every element finds its place in the merged run alone, by bisection of the other run.
    """
    m, k = shape_of(rows)

    def nest(x: Any, order: Any, spare: Any, state: Any, m: Any, k: Any) -> None:
        low, high, less = 0, 1, 2  # what `state` holds

        def compare(a: Any, b: Any) -> None:
            """state[less] becomes -1 where row a comes before row b, 1 where it comes behind, else 0."""
            state[less] = i64(0)
            with T.serial(0, k) as c:
                with T.If(state[less] == i64(0)):
                    with T.Then():
                        left, right = x[a * k + c], x[b * k + c]
                        state[less] = select(left < right, i64(-1), select(left > right, i64(1), i64(0)))

        with T.serial(0, m) as i:
            order[i] = i
        with T.serial(0, T.int64(_STEPS)) as step:
            width = tirx.shift_left(i64(1), step)
            with T.If(width < m):
                with T.Then():
                    with T.serial(0, m) as i:
                        start = te.floordiv(i, width * 2) * width * 2
                        middle, end = te.min(start + width, m), te.min(start + width * 2, m)
                        is_left = i < middle
                        state[low] = select(is_left, middle, start)
                        state[high] = select(is_left, end, middle)
                        with T.serial(0, T.int64(_STEPS)):
                            with T.If(state[low] < state[high]):
                                with T.Then():
                                    half = te.floordiv(state[low] + state[high], i64(2))
                                    compare(order[half], order[i])
                                    before = tirx.any(
                                        state[less] < i64(0), tirx.all(tirx.Not(is_left), state[less] == i64(0))
                                    )
                                    state[3] = te.floordiv(state[low] + state[high], i64(2))
                                    state[high] = select(before, state[high], state[3])
                                    state[low] = select(before, state[3] + i64(1), state[low])
                        own = i - select(is_left, start, middle)
                        other = state[low] - select(is_left, middle, start)
                        spare[start + own + other] = order[i]
                    with T.serial(0, m) as i:
                        order[i] = spare[i]

    outputs = [([m], "int64"), ([m], "int64"), ([4], "int64")]
    return loops(ctx, "order", nest, [rows], outputs, [m, k])[0]


def _unique(ctx: Context) -> tuple[Expr | None, ...]:
    """Distinct slices along an axis, or elements: themselves, where each occurs first, what each input is one of, and
    how many there are of each. They come in ascending order, or in that of their first occurrence."""
    x = ctx.x()
    if ctx.attr("axis") is None:
        axis, x = 0, reshape(ctx, x, [product(ctx.shape())])
    else:
        axis = ctx.axis(int(ctx.attr("axis")), ctx.rank())
    rank = len(shape_of(x))
    m = shape_of(x)[axis]
    front = permute(ctx, x, [axis, *(i for i in range(rank) if i != axis)])
    rows = reshape(ctx, front, [m, product(shape_of(front)[1:])])
    rows = cast(ctx, rows, "int8") if dtype_of(rows) == "bool" else rows
    index, inverse, counts, count = _groups(ctx, rows, order_of(ctx, rows), bool(ctx.attr("sorted", 1)))
    wanted = first(ctx, index, count)

    def body(t: Any, out: list[Any]) -> Any:
        return te.compute(out, lambda i: t(i), name="first")

    return gather(ctx, x, wanted, axis), wanted, inverse, compute(ctx, "first", body, counts, list(shape_of(wanted)))


def _groups(ctx: Context, rows: Expr, order: Expr, ascending: bool) -> list[Expr]:
    """(first places [M], group of each row [M], sizes [M], [number of groups]), valid up to that number."""
    m, k = shape_of(rows)

    def nest(
        x: Any, order: Any, index: Any, inverse: Any, counts: Any, count: Any, ranks: Any, sizes: Any, m: Any, k: Any
    ) -> None:
        count[0] = i64(0)
        with T.serial(0, m) as i:
            ranks[i] = select(i == 0, i64(1), i64(0))  # does a group begin at the i-th row in order?
            with T.If(i > 0):
                with T.Then():
                    with T.serial(0, k) as c:
                        with T.If(x[order[i] * k + c] != x[order[i - 1] * k + c]):
                            with T.Then():
                                ranks[i] = i64(1)
        with T.serial(0, m) as i:
            count[0] = count[0] + ranks[i]
            group = count[0] - i64(1)
            with T.If(ranks[i] == i64(1)):
                with T.Then():
                    index[group] = order[i]
                    counts[group] = i64(0)
            counts[group] = counts[group] + i64(1)
            inverse[order[i]] = group
        if not ascending:
            _by_first_occurrence(index, inverse, counts, count, ranks, sizes, m)

    outputs = [*[([m], "int64")] * 3, ([1], "int64"), ([m], "int64"), ([m], "int64")]
    return loops(ctx, "groups", nest, [rows, order], outputs, [m, k])[:4]


def _by_first_occurrence(index: Any, inverse: Any, counts: Any, count: Any, ranks: Any, sizes: Any, m: Any) -> None:
    """Renumber the groups: rows that are the first of theirs get the next number, the others that of their first."""
    with T.serial(0, m) as i:
        sizes[i] = counts[i]
    count[0] = i64(0)
    with T.serial(0, m) as i:
        with T.If(index[inverse[i]] == i):
            with T.Then():
                ranks[inverse[i]] = count[0]
                counts[count[0]] = sizes[inverse[i]]
                count[0] = count[0] + i64(1)
    with T.serial(0, m) as i:
        inverse[i] = ranks[inverse[i]]
    count[0] = i64(0)
    with T.serial(0, m) as i:
        with T.If(inverse[i] == count[0]):
            with T.Then():
                index[count[0]] = i
                count[0] = count[0] + i64(1)


# -- boxes ------------------------------------------------------------------------------------------------------
def _overlap(boxes: Any, a: Any, b: Any, centred: bool) -> tuple[Any, Any, Any]:
    """(area shared by two boxes, that of both together, the smaller one's): 0 shared where they do not meet."""

    def edges(at: Any) -> list[tuple[Any, Any]]:
        c = [boxes[at * 4 + n] for n in range(4)]
        half = te.const(0.5, "float32")
        if centred:
            return [(c[n] - c[n + 2] * half, c[n] + c[n + 2] * half) for n in (0, 1)]
        return [(te.min(c[n], c[n + 2]), te.max(c[n], c[n + 2])) for n in (0, 1)]

    zero = te.const(0.0, "float32")
    spans = [te.max(te.min(p[1], q[1]) - te.max(p[0], q[0]), zero) for p, q in zip(edges(a), edges(b), strict=True)]
    areas = [(y[1] - y[0]) * (x[1] - x[0]) for y, x in (edges(a), edges(b))]
    shared = spans[0] * spans[1]
    return shared, areas[0] + areas[1] - shared, te.min(areas[0], areas[1])


def _non_max_suppression(ctx: Context) -> Expr:
    """[n, 3]: batch, class and box of what is kept, the highest scores of a class first."""
    (b, m, _), (_, c, _) = ctx.shape(0), ctx.shape(1)
    centred = bool(ctx.attr("center_point_box", 0))

    def number(i: int, default: float, dtype: str) -> Expr:
        return reshape(ctx, ctx.x(i), [1]) if ctx.has(i) else ctx.literal(np.array([default], dtype), dtype)

    most, overlap, least = number(2, 0, "int64"), number(3, 0.0, "float32"), number(4, -np.inf, "float32")
    total = product([b, c, m])

    def nest(
        boxes: Any, scores: Any, most: Any, overlap: Any, least: Any, kept: Any, alive: Any, best: Any, flags: Any,
        b: Any, c: Any, m: Any,
    ) -> None:  # fmt: skip
        yes, no = te.const(1, "int8"), te.const(0, "int8")
        with T.serial(0, b * c) as row:
            at, batch = row * m, te.floordiv(row, c) * m
            with T.serial(0, m) as i:
                flags[at + i] = no
                alive[at + i] = select(scores[at + i] > least[0], yes, no)
            with T.serial(0, te.max(te.min(m, most[0]), i64(0))) as turn:
                best[0] = i64(-1)
                with T.serial(0, m) as i:
                    better = tirx.any(best[0] < 0, scores[at + i] > scores[at + te.max(best[0], i64(0))])
                    with T.If(tirx.all(alive[at + i] == yes, better)):
                        with T.Then():
                            best[0] = i
                with T.If(best[0] >= 0):
                    with T.Then():
                        kept[at + turn] = best[0]
                        flags[at + turn] = yes
                        with T.serial(0, m) as i:
                            shared, both, smaller = _overlap(boxes, batch + best[0], batch + i, centred)
                            meets = tirx.all(smaller > te.const(0.0, "float32"), shared > overlap[0] * both)
                            with T.If(tirx.any(i == best[0], meets)):
                                with T.Then():
                                    alive[at + i] = no

    outputs = [([total], "int64"), ([total], "int8"), ([1], "int64"), ([total], "int8")]
    inputs = [ctx.x(0), ctx.x(1), most, overlap, least]
    kept, _, _, flags = loops(ctx, "non_max_suppression", nest, inputs, outputs, [b, c, m])
    found = places(ctx, flags)

    def body(p: Any, kept: Any, out: list[Any], c: Any, m: Any) -> Any:
        def element(i: Any, column: Any) -> Any:
            row = te.floordiv(p(i), m)
            return select(column == 0, te.floordiv(row, c), select(column == 1, te.floormod(row, c), kept(p(i))))

        return te.compute(out, element, name="boxes")

    return compute(ctx, "boxes", body, found, kept, [*shape_of(found), 3], c, m)


RULES: dict[str, Rule] = {
    "NonZero": _non_zero,
    "Compress": _compress,
    "Unique": _unique,
    "NonMaxSuppression": _non_max_suppression,
}
