"""com.microsoft's operators on plain tensors: older or wider forms of the standard's, and a matrix inverse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llmc.graph import Dim
from llmc.ops.axes_data import unsqueezed_extents
from llmc.ops.context import Context, Rule
from llmc.ops.delegate import standard
from llmc.ops.gather import RULES as GATHER
from llmc.ops.shape import RULES as SHAPE
from llmc.ops.tensor import cast, compute, dtype_of, loops, product, reduce_rows, reshape, shape_of, simplify
from llmc.tvm_shim import Expr, T, te


def _expand_dims(ctx: Context) -> Expr:
    """A dimension of 1 at the place that input 1 names."""
    if ctx.const(1) is None:
        return reshape(ctx, ctx.x(), unsqueezed_extents(ctx, ctx.x(), ctx.x(1), ctx.rank() + 1))
    (axis,) = ctx.ints(1)
    shape = list(ctx.shape())
    at = ctx.axis(axis, len(shape) + 1)
    return reshape(ctx, ctx.x(), [*shape[:at], 1, *shape[at:]])


def _range(ctx: Context) -> Expr:
    """start, limit, and a step that is 1 where absent."""
    if ctx.has(2):
        return SHAPE["Range"](ctx)
    one = ctx.literal(np.ones((), ctx.dtype()), ctx.dtype())
    return standard(ctx, "Range", [ctx.x(0), ctx.x(1), one])[0]


def _unique(ctx: Context) -> tuple[Expr, ...]:
    """Distinct elements in the order of first occurrence, which of them each element is, and how often each is."""
    values, _, places, counts = standard(ctx, "Unique", [ctx.x()], outputs=4, sorted=0)
    return values, places, counts


def _unfold(ctx: Context) -> Expr:
    """All slices of `size` elements along `dim`, `step` apart, with their elements in a new last dimension."""
    size, step, shape = int(ctx.attr("size")), int(ctx.attr("step", 1)), list(ctx.shape())
    axis = ctx.axis(int(ctx.attr("dim", -1)), len(shape))
    count = simplify((shape[axis] - size) // step + 1)

    def body(x: Any, out: list[Any]) -> Any:
        return te.compute(out, lambda *i: x(*i[:axis], i[axis] * step + i[-1], *i[axis + 1 : -1]), name="unfold")

    return compute(ctx, "unfold", body, ctx.x(), [*shape[:axis], count, *shape[axis + 1 :], size])


def _cdist(ctx: Context) -> Expr:
    """Distances between the rows of A [M, N] and those of B [K, N] -> [M, K]."""
    metric = ctx.attr("metric", "sqeuclidean")
    metric = metric.decode() if isinstance(metric, bytes) else metric
    if metric not in ("euclidean", "sqeuclidean"):
        ctx.fail(f"the metric {metric}")
    ctx.unify(ctx.shape(0)[1], ctx.shape(1)[1])

    def body(a: Any, b: Any, out: list[Any], n: Any) -> Any:
        def square(i: Any, j: Any, k: Any) -> Any:
            return (a(i, k) - b(j, k)) * (a(i, k) - b(j, k))

        total = reduce_rows(te.sum, out, square, n, "distance")
        return total if metric == "sqeuclidean" else te.compute(out, lambda i, j: te.sqrt(total(i, j)), name="distance")

    return compute(ctx, "cdist", body, ctx.x(0), ctx.x(1), [ctx.shape(0)[0], ctx.shape(1)[0]], ctx.shape(0)[1])


def _conv_transpose(ctx: Context) -> Expr:
    """ConvTranspose whose padding is the constant input 2."""
    bias = ctx.x(3) if ctx.has(3) else None
    attrs = {**ctx.node.attrs, **({"pads": tuple(ctx.ints(2))} if ctx.has(2) else {})}
    return standard(ctx, "ConvTranspose", [ctx.x(0), ctx.x(1), bias], **attrs)[0]


def _grid_sample(ctx: Context) -> Expr:
    return standard(ctx, "GridSample", [ctx.x(0), ctx.x(1)], opset=16, **ctx.node.attrs)[0]


# -- the inverse ------------------------------------------------------------------------------------------------
def _inverse(ctx: Context) -> Expr:
    """The inverse of each matrix of [..., N, N]; half precision is computed in float32."""
    shape, dtype = ctx.shape(), ctx.dtype()
    ctx.unify(shape[-1], shape[-2])
    n = shape[-1]
    work = "float32" if dtype == "float16" else dtype
    flat = reshape(ctx, cast(ctx, ctx.x(), work), [product(shape[:-2]), n, n])
    return cast(ctx, reshape(ctx, _gauss_jordan(ctx, flat), shape), dtype)


def _gauss_jordan(ctx: Context, x: Expr) -> Expr:
    """x [B, N, N] inverted by elimination, the largest pivot of each column first."""
    (batch, n, _), dtype = shape_of(x), dtype_of(x)

    def nest(source: Any, left: Any, right: Any, pivots: Any, batch: Any, n: Any) -> None:
        zero, one = te.const(0, dtype), te.const(1, dtype)

        def swap(m: Any, b: Any, i: Any, j: Any, k: Any) -> None:
            held = T.bind(m[b, i, k])
            m[b, i, k] = m[b, j, k]
            m[b, j, k] = held

        with T.parallel(0, batch) as b:
            with T.serial(0, n) as i, T.serial(0, n) as j:
                left[b, i, j] = source[b, i, j]
                right[b, i, j] = T.Select(i == j, one, zero)
            with T.serial(0, n) as c:
                pivots[b] = c
                with T.serial(0, n - c - 1) as i:
                    with T.If(T.abs(left[b, c + 1 + i, c]) > T.abs(left[b, pivots[b], c])), T.Then():
                        pivots[b] = c + 1 + i
                with T.If(pivots[b] != c), T.Then(), T.serial(0, n) as k:
                    swap(left, b, c, pivots[b], k)
                    swap(right, b, c, pivots[b], k)
                scale = T.bind(one / left[b, c, c])
                with T.serial(0, n) as k:
                    left[b, c, k] = left[b, c, k] * scale
                    right[b, c, k] = right[b, c, k] * scale
                with T.serial(0, n) as i, T.If(i != c), T.Then():
                    factor = T.bind(left[b, i, c])
                    with T.serial(0, n) as k:
                        left[b, i, k] = left[b, i, k] - factor * left[b, c, k]
                        right[b, i, k] = right[b, i, k] - factor * right[b, c, k]

    shapes: list[tuple[Sequence[Dim], str]] = [([batch, n, n], dtype), ([batch, n, n], dtype), ([batch], "int64")]
    return loops(ctx, "inverse", nest, [x], shapes, [batch, n])[1]


RULES: dict[str, Rule] = {
    "ExpandDims": _expand_dims,
    "Range": _range,
    "Unique": _unique,
    "UnfoldTensor": _unfold,
    "CDist": _cdist,
    "ConvTransposeWithDynamicPads": _conv_transpose,
    "GridSample": _grid_sample,
    "Inverse": _inverse,
    "Trilu": SHAPE["Trilu"],
    "Pad": SHAPE["Pad"],
    "GatherND": GATHER["GatherND"],
}
