"""Normalisations and softmax. Statistics of half-precision inputs are float32."""

from __future__ import annotations

from typing import Any

from llmc.graph import Dim
from llmc.ops.context import Context, Rule
from llmc.ops.tensor import compute, dtype_of, element, product, reshape, shape_of
from llmc.tvm_shim import Expr, relax, te

op = relax.op


# -- softmax ----------------------------------------------------------------------------------------------------
def _softmax(f: Any) -> Rule:
    """Along one axis since opset 13; before, over all axes from `axis` on at once."""

    def rule(ctx: Context) -> Expr:
        shape = ctx.shape()
        if ctx.node.version >= 13:
            return f(ctx.x(), ctx.axis(int(ctx.attr("axis", -1)), len(shape)))
        axis = ctx.axis(int(ctx.attr("axis", 1)), len(shape))
        flat = reshape(ctx, ctx.x(), [product(shape[:axis]), product(shape[axis:])])
        return reshape(ctx, ctx.emit(f(flat, 1)), shape)

    return rule


# -- normalisation over the last axes ---------------------------------------------------------------------------
def rms_norm(ctx: Context, x: Expr, weight: Expr, axis: int, epsilon: float) -> Expr:
    """x / sqrt(mean(x**2) + epsilon) * weight, the mean over the axes from `axis` on; computed in float32."""
    return _norm(ctx, "rms_norm", x, [weight], axis, epsilon, centred=False)[0]


def layer_norm(
    ctx: Context, x: Expr, weight: Expr, bias: Expr | None, axis: int, epsilon: float
) -> tuple[Expr, Expr, Expr]:
    """(y, mean, 1 / standard deviation), the last two of the shape of x with ones from `axis` on."""
    y, mean, inverse = _norm(
        ctx, "layer_norm", x, [weight, bias] if bias is not None else [weight], axis, epsilon, True
    )
    return y, mean, inverse


def _norm(
    ctx: Context, name: str, x: Expr, affine: list[Expr], axis: int, epsilon: float, centred: bool
) -> tuple[Expr, ...]:
    dtype, shape = dtype_of(x), list(shape_of(x))
    work = "float64" if dtype == "float64" else "float32"
    rows = [*shape[:axis], *([1] * (len(shape) - axis))]
    count: Dim = product(shape[axis:])

    def body(x: Any, affine: list[Any], shape: list[Any], rows: list[Any], count: Any) -> Any:
        def reduction(f: Any, name: str) -> Any:
            r = [te.reduce_axis((0, d), f"r{n}") for n, d in enumerate(shape[axis:])]
            return te.compute(rows, lambda *i: te.sum(f(*i[:axis], *r), axis=r), name=name)

        def value(*i: Any) -> Any:
            return x(*i).astype(work)

        n = te.const(count, work) if isinstance(count, int) else count.astype(work)
        outputs = []
        if centred:
            total = reduction(value, "total")
            mean = te.compute(rows, lambda *i: total(*i) / n, name="mean")
            outputs.append(mean)

            def centre(*i: Any) -> Any:
                return value(*i) - mean(*row(i))
        else:
            centre = value

        def row(i: Any) -> Any:
            return (*i[:axis], *([te.const(0, "int64")] * (len(shape) - axis)))

        square = reduction(lambda *i: centre(*i) * centre(*i), "square")
        one = te.const(1, work)
        inverse = te.compute(rows, lambda *i: one / te.sqrt(square(*i) / n + te.const(epsilon, work)), name="inverse")
        outputs.append(inverse)

        def element_(*i: Any) -> Any:
            y = centre(*i) * inverse(*row(i)) * element(affine[0], i).astype(work)
            return (y + element(affine[1], i).astype(work) if len(affine) > 1 else y).astype(dtype)

        return [te.compute(shape, element_, name=name), *outputs]

    call = compute(ctx, name, body, x, affine, shape, rows, count)
    return tuple(ctx.emit(relax.TupleGetItem(call, i)) for i in range(3 if centred else 2))


def _rms_normalization(ctx: Context) -> Expr:
    axis = ctx.axis(int(ctx.attr("axis", -1)), ctx.rank())
    return rms_norm(ctx, ctx.x(0), ctx.x(1), axis, float(ctx.attr("epsilon", 1e-5)))


def _layer_normalization(ctx: Context) -> tuple[Expr, ...]:
    axis = ctx.axis(int(ctx.attr("axis", -1)), ctx.rank())
    bias = ctx.x(2) if ctx.has(2) else None
    return layer_norm(ctx, ctx.x(0), ctx.x(1), bias, axis, float(ctx.attr("epsilon", 1e-5)))


RULES: dict[str, Rule] = {
    "Softmax": _softmax(op.nn.softmax),
    "LogSoftmax": _softmax(op.nn.log_softmax),
    "RMSNormalization": _rms_normalization,
    "LayerNormalization": _layer_normalization,
}
