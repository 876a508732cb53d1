"""Operators that move, select or make elements: reshapes, slices, joins, constants and ranges.

Shape operands are integer expressions over the model's symbols. A *symbolic* bound is trusted to lie inside of its
tensor, as exporters mean it (a slice up to the sequence length); a constant one is clamped as the standard says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np

from llmc.graph import Dim, same_dim
from llmc.ops.axes_data import count_of, entries, flat, spread, squeezed_extents, unsqueezed_extents
from llmc.ops.context import Context, Rule
from llmc.ops.equal_dims import quotient
from llmc.ops.scalar import select
from llmc.ops.shape_data import demand_broadcast, padded_extents, slice_of_data, split_extents, tabled
from llmc.ops.tensor import (
    broadcast_shape,
    broadcast_to,
    compute,
    concat,
    elementwise,
    full,
    permute,
    product,
    reshape,
    shape_of,
    simplify,
    take_slice,
)
from llmc.tvm_shim import Expr, relax, te, tirx

THE_END = 10**9  # a slice's end from which on it means the dimension's: exporters write 2^63 - 1, 2^31 - 1, or this


def axes_of(ctx: Context, i: int, rank: int) -> list[int] | None:
    """The axes of a node, an attribute in old opsets and input `i` in new ones; None where there are none."""
    axes = ctx.ints(i) if ctx.has(i) else ctx.attr("axes")
    return None if axes is None else [ctx.axis(int(a), rank) for a in axes]


# -- same elements, another shape -------------------------------------------------------------------------------
def _reshape(ctx: Context) -> Expr:
    if ctx.value(1) is None:
        return reshape(ctx, ctx.x(), _resolved_shape(ctx))
    old, new = ctx.shape(), ctx.dims(1)
    if not ctx.attr("allowzero", 0):
        new = [old[i] if isinstance(d, int) and d == 0 else d for i, d in enumerate(new)]
    if any(isinstance(d, int) and d == -1 for d in new):
        rest = quotient(old, [d for d in new if not (isinstance(d, int) and d == -1)])
        new = [rest if isinstance(d, int) and d == -1 else d for d in new]
    else:
        ctx.unify(product(old), product(new))
    return reshape(ctx, ctx.x(), new)


def _resolved_shape(ctx: Context) -> list[Dim]:
    """A new shape that is known at run time alone, with its 0 and -1 replaced; it has to hold all elements."""
    old, count = ctx.shape(), count_of(ctx, 1)
    kept = min(count, len(old)) if not ctx.attr("allowzero", 0) else 0

    def body(given: Any, old: list[Any], total: Any) -> Any:
        def wanted(i: int) -> Any:
            d = given(te.const(i, "int64")).astype("int64")
            return select(d == 0, te.const(1, "int64") * old[i], d) if i < kept else d

        sizes = [wanted(i) for i in range(count)]
        known = reduce(lambda a, d: a * select(d < 0, te.const(1, "int64"), d), sizes, te.const(1, "int64"))
        rest = te.floordiv(te.const(1, "int64") * total, te.max(known, te.const(1, "int64")))

        sizes = [select(size < 0, rest, size) for size in sizes]
        return tabled("new_shape", [*sizes, reduce(lambda n, d: n * d, sizes, te.const(1, "int64"))])

    return ctx.bounded(compute(ctx, "new_shape", body, ctx.x(1), list(old), product(old)), count, [product(old)])


def _flatten(ctx: Context) -> Expr:
    shape, axis = ctx.shape(), int(ctx.attr("axis", 1))
    axis = axis + len(shape) if axis < 0 else axis
    return reshape(ctx, ctx.x(), [product(shape[:axis]), product(shape[axis:])])


def _squeeze(ctx: Context) -> Expr:
    shape = ctx.shape()
    if ctx.has(1) and ctx.const(1) is None:
        left = len(shape) - count_of(ctx, 1)
        return reshape(ctx, ctx.x(), squeezed_extents(ctx, ctx.x(), ctx.x(1), left))
    axes = axes_of(ctx, 1, len(shape))
    if axes is None:
        axes = [i for i, d in enumerate(shape) if isinstance(d, int) and d == 1]
    for a in axes:
        ctx.unify(shape[a], 1)
    return reshape(ctx, ctx.x(), [d for i, d in enumerate(shape) if i not in axes])


def _unsqueeze(ctx: Context) -> Expr:
    if ctx.has(1) and ctx.const(1) is None:
        rank = ctx.rank() + count_of(ctx, 1)
        return reshape(ctx, ctx.x(), unsqueezed_extents(ctx, ctx.x(), ctx.x(1), rank))
    given = ctx.ints(1) if ctx.has(1) else list(ctx.attr("axes"))
    rank = ctx.rank() + len(given)
    axes, rest = {ctx.axis(int(a), rank) for a in given}, iter(ctx.shape())
    return reshape(ctx, ctx.x(), [1 if i in axes else next(rest) for i in range(rank)])


def _transpose(ctx: Context) -> Expr:
    return permute(ctx, ctx.x(), ctx.attr("perm") or list(range(ctx.rank()))[::-1])


def _depth_to_space(ctx: Context) -> Expr:
    (n, c, h, w), b = ctx.shape(), int(ctx.attr("blocksize"))
    if ctx.attr("mode", "DCR") in ("DCR", b"DCR"):
        split, perm = [n, b, b, simplify(c // (b * b)), h, w], [0, 3, 4, 1, 5, 2]
    else:
        split, perm = [n, simplify(c // (b * b)), b, b, h, w], [0, 1, 4, 2, 5, 3]
    y = permute(ctx, reshape(ctx, ctx.x(), split), perm)
    return reshape(ctx, y, [n, simplify(c // (b * b)), h * b, w * b])


def _space_to_depth(ctx: Context) -> Expr:
    (n, c, h, w), b = ctx.shape(), int(ctx.attr("blocksize"))
    y = reshape(ctx, ctx.x(), [n, c, simplify(h // b), b, simplify(w // b), b])
    perm = [0, 3, 5, 1, 2, 4] if ctx.attr("mode", "DCR") in ("DCR", b"DCR") else [0, 1, 3, 5, 2, 4]
    return reshape(ctx, permute(ctx, y, perm), [n, c * b * b, simplify(h // b), simplify(w // b)])


# -- more or fewer elements -------------------------------------------------------------------------------------
def _expand(ctx: Context) -> Expr:
    if ctx.value(1) is not None:
        return broadcast_to(ctx, ctx.x(), broadcast_shape(ctx, ctx.shape(), ctx.dims(1)))
    sizes = ctx.extents(1)
    old = [1] * (len(sizes) - ctx.rank()) + list(ctx.shape())
    new = [1] * (len(old) - len(sizes)) + sizes
    one = [isinstance(d, int) and d == 1 for d in old]  # other dimensions stay: a size of run time is theirs, or 1
    added = len(old) - len(sizes)
    kept = {k - added: d for k, (d, single) in enumerate(zip(old, one, strict=True)) if k >= added and not single}
    if kept:
        demand_broadcast(ctx, ctx.x(1), kept)
    return broadcast_to(ctx, ctx.x(), [n if single else d for d, n, single in zip(old, new, one, strict=True)])


def _tile(ctx: Context) -> Expr:
    ctx.unify(product(ctx.shape(1)), ctx.rank())
    repeats, shape = ctx.extents(1), ctx.shape()

    def body(x: Any, out: list[Any], sizes: list[Any]) -> Any:
        return te.compute(out, lambda *i: x(*(te.floormod(a, d) for a, d in zip(i, sizes, strict=True))), name="tile")

    out = [simplify(d * r) for d, r in zip(shape, repeats, strict=True)]
    return compute(ctx, "tile", body, ctx.x(), out, list(shape))


def _concat(ctx: Context) -> Expr:
    return concat(ctx, [ctx.x(i) for i in range(len(ctx))], ctx.axis(int(ctx.attr("axis")), ctx.rank()))


def _split(ctx: Context) -> tuple[Expr, ...]:
    axis = ctx.axis(int(ctx.attr("axis", 0)), ctx.rank())
    dim, count = ctx.shape()[axis], len(ctx.node.outputs)
    sizes: Sequence[Dim]
    data = ctx.has(1) and ctx.value(1) is None
    if data:
        ctx.unify(ctx.shape(1)[0], count)
        sizes = split_extents(ctx, ctx.x(1), dim, count)
    elif ctx.has(1):
        sizes = ctx.dims(1)
    elif ctx.attr("split"):
        sizes = [int(s) for s in ctx.attr("split")]
    else:
        count = int(ctx.attr("num_outputs", count))
        each = simplify((dim + count - 1) // count)
        sizes = [each] * (count - 1) + [simplify(dim - each * (count - 1))]
    total: Dim = 0
    starts = []
    for s in sizes:
        starts.append(total)
        total = simplify(total + s)
    if not data:
        ctx.unify(total, dim)
    return tuple(take_slice(ctx, ctx.x(), axis, b, s) for b, s in zip(starts, sizes, strict=True))


def _slice_range(dim: Dim, start: Dim, end: Dim, step: int) -> tuple[Dim, Dim]:
    """(first index, count) of numpy's dim[start:end:step], constants clamped and symbols trusted."""

    def place(bound: Dim) -> Dim:
        """A bound as a place in 0..dim (forwards) or -1..dim-1 (backwards)."""
        low, high = (0, dim) if step > 0 else (-1, dim - 1)
        if not isinstance(bound, int):
            return simplify(bound)
        if isinstance(dim, int):
            return min(max(bound + dim if bound < 0 else bound, low), high)  # type: ignore[type-var, return-value]
        if bound >= THE_END:
            return high
        if bound <= -(2**31) + 1:
            return low
        if bound < 0:
            return simplify(dim + bound if bound == -1 else tirx.max(dim + bound, low))
        return bound if bound <= 1 and step > 0 else simplify(tirx.min(bound, high))

    first, last = place(start), place(end)
    span = simplify(last - first if step > 0 else first - last)
    count = simplify((span + abs(step) - 1) // abs(step))
    return first, max(count, 0) if isinstance(count, int) else count


def _slice(ctx: Context) -> Expr:
    x, rank = ctx.x(), ctx.rank()
    if ctx.node.version < 10:
        starts, ends = ([int(v) for v in ctx.attr(a)] for a in ("starts", "ends"))
        given = ctx.attr("axes")
    else:
        known = (ctx.value(1), ctx.value(2), *(ctx.const(i) for i in (3, 4) if ctx.has(i)))
        if any(operand is None for operand in known):
            return _slice_of_data(ctx)
        starts, ends, given = ctx.dims(1), ctx.dims(2), ctx.ints(3) if ctx.has(3) else None
    axes = [ctx.axis(int(a), rank) for a in given or range(len(starts))]
    steps = ctx.ints(4) if ctx.has(4) else [1] * len(starts)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        dim = shape_of(x)[axis]
        first, count = _slice_range(dim, start, end, step)
        if not (step == 1 and isinstance(first, int) and first == 0 and same_dim(dim, count)):
            x = take_slice(ctx, x, axis, first, count, step)
    return x


def _slice_of_data(ctx: Context) -> Expr:
    """A slice one of whose operands is known at run time only; where that is the axes, any axis may be sliced."""
    x, rank = ctx.x(), ctx.rank()
    if ctx.has(3) and ctx.const(3) is None:
        entry = entries(ctx, ctx.x(3), rank)
        starts, ends = spread(ctx, ctx.x(1), entry, 0), spread(ctx, ctx.x(2), entry, 2**31 - 1)
        steps: Any = spread(ctx, ctx.x(4), entry, 1) if ctx.has(4) else [1] * rank
        return slice_of_data(ctx, x, starts, ends, list(range(rank)), steps)
    axes = [ctx.axis(a, rank) for a in (ctx.ints(3) if ctx.has(3) else range(count_of(ctx, 1)))]
    for i in (i for i in (1, 2, 4) if ctx.has(i)):
        ctx.unify(ctx.shape(i)[0], len(axes))
    steps = [1] * len(axes) if not ctx.has(4) else ctx.x(4) if ctx.const(4) is None else ctx.ints(4)
    return slice_of_data(ctx, x, ctx.x(1), ctx.x(2), axes, steps)


def _pad(ctx: Context) -> Expr:
    x, rank, shape = ctx.x(), ctx.rank(), ctx.shape()
    mode = ctx.attr("mode", "constant")
    mode = mode.decode() if isinstance(mode, bytes) else mode
    axes, pads = list(range(rank)), None
    if ctx.has(1) and ctx.value(1) is None:
        pads = reshape(ctx, ctx.x(1), [product(ctx.shape(1))])
    if ctx.has(3) and ctx.const(3) is None:
        pads = _pads_of_axes(ctx)
    elif ctx.has(3):
        axes = [ctx.axis(a, rank) for a in ctx.ints(3)]
    before: list[Dim] = [0] * rank
    if pads is not None:  # known at run time only
        ctx.unify(shape_of(pads)[0], 2 * len(axes))
        out = padded_extents(ctx, x, pads, axes)
    else:
        given = ctx.dims(1) if ctx.has(1) else list(ctx.attr("pads"))
        out = list(shape)
        for n, a in enumerate(axes):
            before[a], out[a] = given[n], simplify(shape[a] + given[n] + given[n + len(axes)])
    value = ctx.x(2) if ctx.has(2) else full(ctx, (), ctx.attr("value", 0), ctx.dtype())
    value = reshape(ctx, value, ())

    def source(i: Any, d: Any) -> Any:
        if mode == "edge":
            return te.max(te.min(i, d - 1), te.const(0, "int64"))
        if mode == "wrap":
            return te.floormod(i, d)
        period = te.max(2 * (d - 1), te.const(1, "int64"))  # reflect: … 2 1 | 0 1 2 | 1 0 …
        r = te.floormod(i, period)
        return te.min(r, period - r) if mode == "reflect" else i

    def body(t: Any, pad: Any, out: list[Any], low: list[Any], sizes: list[Any], pads: list[Any]) -> Any:
        for n, a in enumerate(axes if pads else ()):
            low[a] = pads[0](te.const(n, "int64")).astype("int64")

        def element(*i: Any) -> Any:
            at = [a - b for a, b in zip(i, low, strict=True)]
            if mode != "constant":
                return t(*(source(a, d) for a, d in zip(at, sizes, strict=True)))
            inside = [c for n, (a, d) in enumerate(zip(at, sizes, strict=True)) if n in axes for c in (a >= 0, a < d)]
            return te.if_then_else(tirx.all(*inside), t(*at), pad()) if inside else t(*at)

        return te.compute(out, element, name="pad")

    return compute(ctx, "pad", body, x, value, out, before, list(shape), [] if pads is None else [pads])


def _pads_of_axes(ctx: Context) -> Expr:
    """int64 [2 * rank]: pads before and behind every axis, where only the run knows which axes they are of."""
    count, entry = simplify(product(ctx.shape(1)) // 2), entries(ctx, ctx.x(3), ctx.rank())
    ends = [spread(ctx, take_slice(ctx, ctx.x(1), 0, first, count), entry, 0) for first in (0, count)]
    return concat(ctx, ends, 0)


def _trilu(ctx: Context) -> Expr:
    data = [flat(ctx, ctx.x(1))] if ctx.has(1) and ctx.value(1) is None else []
    k = ctx.dims(1)[0] if ctx.has(1) and not data else 0
    upper, zero = ctx.attr("upper", 1), te.const(0, ctx.dtype())

    def body(x: Any, out: list[Any], offset: Any, data: list[Any]) -> Any:
        def element(*i: Any) -> Any:
            distance, least = i[-1] - i[-2], data[0](te.const(0, "int64")) if data else offset
            return select(distance >= least if upper else distance <= least, x(*i), zero)

        return te.compute(out, element, name="trilu")

    return compute(ctx, "trilu", body, ctx.x(), list(ctx.shape()), k, data)


# -- made from shapes -------------------------------------------------------------------------------------------
def _shape(ctx: Context) -> Expr:
    shape = ctx.shape()[slice(ctx.attr("start", 0), ctx.attr("end"))]
    return _dims_tensor(ctx, shape)


def _size(ctx: Context) -> Expr:
    return reshape(ctx, _dims_tensor(ctx, [product(ctx.shape())]), ())


def _dims_tensor(ctx: Context, dims: Sequence[Dim]) -> Expr:
    if all(isinstance(d, int) for d in dims):
        return ctx.emit(ctx.literal(np.array(dims, np.int64), "int64"))
    return ctx.emit(relax.op.shape_to_tensor(relax.ShapeExpr(list(dims))))


def _constant_of_shape(ctx: Context) -> Expr:
    value = np.asarray(ctx.attr("value", np.zeros(1, np.float32)))
    return full(ctx, ctx.extents(0), value.reshape(-1)[0].item(), value.dtype.name)


def _range(ctx: Context) -> Expr:
    numbers = [ctx.const(i) for i in range(3)]
    if all(n is not None for n in numbers):
        a, b, d = (n.reshape(-1)[0] for n in numbers)  # type: ignore[union-attr]
        count: Dim = max(math.ceil((float(b) - float(a)) / float(d)), 0)
        first, step = a.item(), d.item()
    elif any(ctx.value(i) is None for i in (0, 1)) or ctx.const(2) is None:
        return _range_of_data(ctx)
    else:
        first, (limit,), (step,) = ctx.dims(0)[0], ctx.dims(1), ctx.ints(2)
        count = simplify((limit - first + (step - 1 if step > 0 else step + 1)) // step)
    dtype = ctx.dtype()

    def body(out: list[Any], begin: Any) -> Any:
        return (
            te.compute(out, lambda i: te.const(first, dtype) + i.astype(dtype) * te.const(step, dtype), name="range")
            if isinstance(first, float)
            else te.compute(out, lambda i: (begin + i * step).astype(dtype), name="range")
        )

    return compute(ctx, "range", body, [count], 0 if isinstance(first, float) else first)


def _range_of_data(ctx: Context) -> Expr:
    """A range whose bounds are known at run time alone."""
    numbers, dtype = [reshape(ctx, ctx.x(i), ()) for i in range(3)], ctx.dtype()

    def length(first: Any, limit: Any, step: Any) -> Any:
        count = te.ceil((limit.astype("float64") - first.astype("float64")) / step.astype("float64"))
        return te.max(count, te.const(0, "float64")).astype("int64")

    (count,) = ctx.bounded(reshape(ctx, elementwise(ctx, "length", length, *numbers), [1]), 1)

    def body(first: Any, step: Any, out: list[Any]) -> Any:
        return te.compute(out, lambda i: first() + i.astype(dtype) * step(), name="range")

    return compute(ctx, "range", body, numbers[0], numbers[2], [count])


def _eye_like(ctx: Context) -> Expr:
    from llmc.ops.elementwise import onnx_dtype

    dtype = onnx_dtype(ctx.attr("dtype")) if ctx.attr("dtype") else ctx.dtype()
    k = int(ctx.attr("k", 0))

    def body(out: list[Any]) -> Any:
        return te.compute(out, lambda i, j: select(j - i == k, te.const(1, dtype), te.const(0, dtype)), name="eye")

    return compute(ctx, "eye", body, list(ctx.shape()))


RULES: dict[str, Rule] = {
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Transpose": _transpose,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    "Expand": _expand,
    "Tile": _tile,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Pad": _pad,
    "Trilu": _trilu,
    "Shape": _shape,
    "Size": _size,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "EyeLike": _eye_like,
}
