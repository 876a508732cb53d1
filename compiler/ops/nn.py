"""Normalisations and softmax. Statistics of half-precision inputs are float32."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmc.graph import Dim
from llmc.ops.context import Context, Rule
from llmc.ops.matmul import HALF
from llmc.ops.tensor import (
    broadcast_to,
    cast,
    compute,
    dtype_of,
    element,
    elementwise,
    product,
    reduce_rows,
    reshape,
    shape_of,
    simplify,
)
from llmc.tvm_shim import Expr, relax, te, tirx

op = relax.op


# -- softmax ----------------------------------------------------------------------------------------------------
def _softmax(f: Any) -> Rule:
    """Along one axis since opset 13; before, over all axes from `axis` on at once. Half precision works in float32."""

    def rule(ctx: Context) -> Expr:
        shape, dtype = ctx.shape(), ctx.dtype()
        x = cast(ctx, ctx.x(), "float32") if dtype in HALF else ctx.x()
        if ctx.node.version >= 13:
            return cast(ctx, ctx.emit(f(x, ctx.axis(int(ctx.attr("axis", -1)), len(shape)))), dtype)
        axis = ctx.axis(int(ctx.attr("axis", 1)), len(shape))
        flat = reshape(ctx, x, [product(shape[:axis]), product(shape[axis:])])
        return cast(ctx, reshape(ctx, ctx.emit(f(flat, 1)), shape), dtype)

    return rule


# -- normalisation over the last axes ---------------------------------------------------------------------------
def rms_norm(ctx: Context, x: Expr, weight: Expr, axis: int, epsilon: float) -> Expr:
    """x / sqrt(mean(x**2) + epsilon) * weight, the mean over the axes from `axis` on; computed in float32."""
    return _norm(ctx, x, [weight], axis, epsilon, centred=False, statistics=False)[0]


def layer_norm(
    ctx: Context, x: Expr, weight: Expr, bias: Expr | None, axis: int, epsilon: float
) -> tuple[Expr | None, ...]:
    """(y, mean, 1 / standard deviation), the last two of the shape of x with ones from `axis` on.

    The statistics are None where the node's outputs 1 and 2 are unused: the kernel then keeps them to itself.
    """
    affine = [weight, bias] if bias is not None else [weight]
    return _norm(ctx, x, affine, axis, epsilon, centred=True, statistics=any(ctx.node.outputs[1:3]))


def _norm(
    ctx: Context, x: Expr, affine: list[Expr], axis: int, epsilon: float, *, centred: bool, statistics: bool
) -> tuple[Expr | None, ...]:
    dtype, shape = dtype_of(x), list(shape_of(x))
    work = "float64" if dtype == "float64" else "float32"
    ones = len(shape) - axis
    rows = [*shape[:axis], *([1] * ones)]
    zero = te.const(0, "int64")

    def body(x: Any, affine: list[Any], shape: list[Any], rows: list[Any], count: Any) -> Any:
        n = te.const(count, work) if isinstance(count, int) else count.astype(work)

        def value(*i: Any) -> Any:
            return x(*i).astype(work)

        def by_row(f: Any, name: str) -> Any:
            return te.compute(rows, f, name=name)

        def total(f: Any, name: str) -> Any:
            if ones == 1:
                return reduce_rows(te.sum, rows, lambda *i: f(*i[:axis], i[-1]), shape[axis], name)
            r = [te.reduce_axis((0, d), f"r{n}") for n, d in enumerate(shape[axis:])]
            return by_row(lambda *i: te.sum(f(*i[:axis], *r), axis=r), name)

        def row(stage: Any, i: Any) -> Any:
            return stage(*i[:axis], *([zero] * ones))

        mean = None
        if centred:
            sums = total(value, "total")
            mean = by_row(lambda *i: sums(*i) / n, "mean")

        def centre(*i: Any) -> Any:
            return value(*i) if mean is None else value(*i) - row(mean, i)

        squares = total(lambda *i: centre(*i) * centre(*i), "squares")
        inverse = by_row(lambda *i: te.const(1, work) / te.sqrt(squares(*i) / n + te.const(epsilon, work)), "inverse")

        def normal(*i: Any) -> Any:
            y = centre(*i) * row(inverse, i) * element(affine[0], i).astype(work)
            return (y + element(affine[1], i).astype(work) if len(affine) > 1 else y).astype(dtype)

        y = te.compute(shape, normal, name="norm")
        return [y, mean, inverse] if statistics else y

    call = compute(ctx, "norm", body, x, affine, shape, rows, product(shape[axis:]))
    return tuple(ctx.emit(relax.TupleGetItem(call, i)) for i in range(3)) if statistics else (call, None, None)


def _rms_normalization(ctx: Context) -> Expr:
    axis = ctx.axis(int(ctx.attr("axis", -1)), ctx.rank())
    return rms_norm(ctx, ctx.x(0), ctx.x(1), axis, float(ctx.attr("epsilon", 1e-5)))


def _layer_normalization(ctx: Context) -> tuple[Expr | None, ...]:
    axis = ctx.axis(int(ctx.attr("axis", -1)), ctx.rank())
    bias = ctx.x(2) if ctx.has(2) else None
    return layer_norm(ctx, ctx.x(0), ctx.x(1), bias, axis, float(ctx.attr("epsilon", 1e-5)))


# -- normalisation by channel -----------------------------------------------------------------------------------
def _per_channel(ctx: Context, x: Expr, rank: int) -> Expr:
    """[C] -> [C, 1, …], to broadcast over [N, C, …]."""
    return reshape(ctx, x, [*shape_of(x), *([1] * (rank - 2))])


def _batch_normalization(ctx: Context) -> tuple[Expr | None, ...]:
    """Running statistics are used, and not changed; in training mode those of the batch, which the running ones then
    follow."""
    if not ctx.attr("training_mode", 0):
        return _batch_norm(ctx, ctx.x(3), ctx.x(4)), None, None
    x, momentum = ctx.x(), float(ctx.attr("momentum", 0.9))
    axes = [i for i in range(ctx.rank()) if i != 1]
    mean = ctx.emit(op.mean(x, axes, False))
    centre = ctx.emit(op.subtract(x, _per_channel(ctx, mean, ctx.rank())))
    variance = ctx.emit(op.mean(ctx.emit(op.multiply(centre, centre)), axes, False))

    def follow(old: Any, new: Any) -> Any:
        kept = te.const(momentum, ctx.dtype(3))
        return old * kept + new.astype(ctx.dtype(3)) * (te.const(1, ctx.dtype(3)) - kept)

    running = [elementwise(ctx, "running", follow, ctx.x(i), new) for i, new in ((3, mean), (4, variance))]
    return _batch_norm(ctx, mean, variance), *running


def _batch_norm(ctx: Context, mean: Expr, variance: Expr) -> Expr:
    """(x - mean) / sqrt(variance + epsilon) * weight + bias, all by channel."""
    epsilon = float(ctx.attr("epsilon", 1e-5))

    def norm(x: Any, weight: Any, bias: Any, mean: Any, variance: Any) -> Any:
        work = str(variance.ty.dtype)
        root = te.sqrt(variance + te.const(epsilon, work))
        y = (x.astype(work) - mean) / root * weight.astype(work) + bias.astype(work)
        return y.astype(ctx.dtype())

    rank = ctx.rank()
    channels = (_per_channel(ctx, p, rank) for p in (ctx.x(1), ctx.x(2), mean, variance))
    return elementwise(ctx, "batch_norm", norm, ctx.x(0), *channels)


def _grouped(ctx: Context, groups: Dim, weight: Expr, bias: Expr) -> Expr:
    """Normalise each group of channels of [N, C, …] over the group and all positions; weights by channel."""
    shape = ctx.shape()
    n, c = shape[0], shape[1]
    flat = reshape(ctx, ctx.x(), [n, groups, product([simplify(c // groups), *shape[2:]])])
    one = ctx.literal(np.ones(1), ctx.dtype())
    y = layer_norm(ctx, flat, one, None, 2, float(ctx.attr("epsilon", 1e-5)))[0]
    y = reshape(ctx, y, shape)
    w, b = (_per_channel(ctx, p, len(shape)) for p in (weight, bias))
    return op.add(ctx.emit(op.multiply(y, w)), b)


def _instance_normalization(ctx: Context) -> Expr:
    return _grouped(ctx, ctx.shape()[1], ctx.x(1), ctx.x(2))


def _group_normalization(ctx: Context) -> Expr:
    """Weights are by group before opset 21, by channel since."""
    groups, channels = int(ctx.attr("num_groups")), ctx.shape()[1]
    weight, bias = ctx.x(1), ctx.x(2)
    if ctx.node.version < 21:
        each = simplify(channels // groups)
        weight, bias = (
            reshape(ctx, broadcast_to(ctx, reshape(ctx, p, [groups, 1]), [groups, each]), [channels])
            for p in (weight, bias)
        )
    return _grouped(ctx, groups, weight, bias)


def _mean_variance(ctx: Context) -> Expr:
    axes = [ctx.axis(int(a), ctx.rank()) for a in ctx.attr("axes", [0, 2, 3])]
    x = ctx.x()
    centre = ctx.emit(op.subtract(x, ctx.emit(op.mean(x, axes, True))))
    variance = ctx.emit(op.mean(ctx.emit(op.multiply(centre, centre)), axes, True))
    return elementwise(ctx, "mvn", lambda a, v: a / (te.sqrt(v) + te.const(1e-9, ctx.dtype())), centre, variance)


def _lp_normalization(ctx: Context) -> Expr:
    axis, x = ctx.axis(int(ctx.attr("axis", -1)), ctx.rank()), ctx.x()
    if ctx.attr("p", 2) == 1:
        size = ctx.emit(op.sum(elementwise(ctx, "abs", te.abs, x), [axis], True))
    else:
        size = ctx.emit(op.sqrt(ctx.emit(op.sum(ctx.emit(op.multiply(x, x)), [axis], True))))
    zero = te.const(0, ctx.dtype())
    return elementwise(ctx, "lp_norm", lambda a, s: te.if_then_else(s == zero, zero, a / s), x, size)


def _lrn(ctx: Context) -> Expr:
    """Local response normalisation across `size` neighbouring channels."""
    size, shape = int(ctx.attr("size")), ctx.shape()
    alpha, beta, bias = (float(ctx.attr(a, d)) for a, d in (("alpha", 1e-4), ("beta", 0.75), ("bias", 1.0)))
    before, dtype = (size - 1) // 2, ctx.dtype()

    def body(x: Any, out: list[Any], channels: Any) -> Any:
        r = te.reduce_axis((0, size), "r")

        def square(n: Any, c: Any, *i: Any) -> Any:
            at = c - before + r
            v = x(n, at, *i)
            return te.sum(te.if_then_else(tirx.all(at >= 0, at < channels), v * v, te.const(0, dtype)), axis=r)

        sums = te.compute(out, square, name="squares")

        def element(*i: Any) -> Any:
            base = te.const(bias, dtype) + te.const(alpha / size, dtype) * sums(*i)
            return x(*i) / te.power(base, te.const(beta, dtype))

        return te.compute(out, element, name="lrn")

    return compute(ctx, "lrn", body, ctx.x(), list(shape), shape[1])


def _hardmax(ctx: Context) -> Expr:
    """1 at the first largest element along an axis, 0 elsewhere; before opset 13 along all axes from `axis` on."""

    def hard(x: Expr, axis: int) -> Expr:
        top = ctx.emit(op.argmax(x, axis, True))
        size = shape_of(x)[axis]
        place = ctx.emit(op.arange(0, size, 1, "int64"))
        place = reshape(ctx, place, [size, *([1] * (len(shape_of(x)) - axis - 1))])
        return cast(ctx, ctx.emit(op.equal(top, place)), ctx.dtype())

    return _softmax(hard)(ctx)


RULES: dict[str, Rule] = {
    "Softmax": _softmax(op.nn.softmax),
    "LogSoftmax": _softmax(op.nn.log_softmax),
    "Hardmax": _hardmax,
    "RMSNormalization": _rms_normalization,
    "LayerNormalization": _layer_normalization,
    "BatchNormalization": _batch_normalization,
    "InstanceNormalization": _instance_normalization,
    "GroupNormalization": _group_normalization,
    "MeanVarianceNormalization": _mean_variance,
    "LpNormalization": _lp_normalization,
    "LRN": _lrn,
}
