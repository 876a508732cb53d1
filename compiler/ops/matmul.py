"""Matrix products of all ranks and types."""

from __future__ import annotations

from llmc.ops.context import Context, Rule
from llmc.ops.tensor import broadcast_shape, dtype_of, permute, shape_of
from llmc.tvm_shim import Expr, relax

op = relax.op


def matmul(ctx: Context, a: Expr, b: Expr, out_dtype: str | None = None) -> Expr:
    """numpy's matmul: [..., M, K] x [..., K, N] -> [..., M, N]; vectors are rows on the left, columns on the right."""
    sa, sb = shape_of(a), shape_of(b)
    if not sa or not sb:
        ctx.fail("MatMul of a scalar")
    ctx.unify(sa[-1], sb[-2] if len(sb) > 1 else sb[0])
    broadcast_shape(ctx, sa[:-2], sb[:-2], ())
    return ctx.emit(op.matmul(a, b, out_dtype))


def transpose_last(ctx: Context, x: Expr) -> Expr:
    rank = len(shape_of(x))
    return permute(ctx, x, [*range(rank - 2), rank - 1, rank - 2])


def _gemm(ctx: Context) -> Expr:
    a, b = (permute(ctx, ctx.x(i), [1, 0]) if ctx.attr(t, 0) else ctx.x(i) for i, t in ((0, "transA"), (1, "transB")))
    y = scale(ctx, matmul(ctx, a, b), ctx.attr("alpha", 1.0))
    if not ctx.has(2):
        return y
    c = scale(ctx, ctx.x(2), ctx.attr("beta", 1.0))
    broadcast_shape(ctx, shape_of(y), shape_of(c))
    return op.add(y, c)


def scale(ctx: Context, x: Expr, factor: float) -> Expr:
    return x if factor == 1 else ctx.emit(op.multiply(x, ctx.literal(factor, dtype_of(x))))


RULES: dict[str, Rule] = {
    "MatMul": lambda ctx: matmul(ctx, ctx.x(0), ctx.x(1)),
    "Gemm": _gemm,
}
