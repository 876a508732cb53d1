"""Rules of the operators that llmc makes itself, for where no kernel template takes them."""

from __future__ import annotations

from typing import Any

from llmc.ops.context import Context, Rule
from llmc.tvm_shim import Expr, relax, te


def _lengths(ctx: Context) -> Expr:
    return relax.op.broadcast_to(_as_tensor(ctx, ctx.attr("length")), (ctx.attr("batch"),))


def _positions(ctx: Context) -> Expr:
    shape = (ctx.attr("batch"), ctx.attr("length"))
    return ctx.bb.call_te(
        lambda start: te.compute(shape, lambda b, s: start[0] + s, "positions"),
        _as_tensor(ctx, ctx.attr("start")),
        primfunc_name_hint="positions",
    )


def _as_tensor(ctx: Context, dim: Any) -> Expr:
    """int64 [1] that holds a dimension: a kernel cannot see symbols that no buffer's shape binds."""
    return ctx.emit(relax.op.shape_to_tensor(relax.ShapeExpr([dim])))


def _activation(ctx: Context) -> Expr:
    kind, x = ctx.attr("kind"), ctx.x(0)
    functions = {
        "relu": relax.op.nn.relu,
        "gelu": relax.op.nn.gelu,
        "gelu_tanh": relax.op.nn.gelu_tanh,
        "silu": relax.op.nn.silu,
    }
    return functions[kind](x)


def _rope(ctx: Context) -> Expr:
    """x [B, S, H*D] or [B, H, S, D]; cos, sin [B, S, D/2]."""
    x, heads = ctx.x(0), ctx.attr("n_heads")
    B, S, half = ctx.shape(1)
    flat = ctx.rank(0) == 3
    if flat:
        x = ctx.emit(relax.op.reshape(x, (B, S, heads, ctx.shape(0)[2] // heads)))
    axis = 2 if flat else 1
    cos, sin = (ctx.emit(relax.op.expand_dims(ctx.x(i), axis)) for i in (1, 2))
    if ctx.attr("interleaved"):
        pairs = ctx.emit(relax.op.reshape(x, (*x.ty.shape.values[:3], half, 2)))
        low, high = (
            ctx.emit(relax.op.squeeze(relax.op.strided_slice(pairs, axes=[4], begin=[i], end=[i + 1]), [4]))
            for i in (0, 1)
        )
    else:
        low, high = (
            ctx.emit(relax.op.strided_slice(x, axes=[3], begin=[i * half], end=[(i + 1) * half])) for i in (0, 1)
        )
    first = ctx.emit(low * cos - high * sin)
    second = ctx.emit(high * cos + low * sin)
    if ctx.attr("interleaved"):
        out = ctx.emit(relax.op.reshape(relax.op.stack([first, second], axis=4), x.ty.shape))
    else:
        out = ctx.emit(relax.op.concat([first, second], axis=3))
    return relax.op.reshape(out, ctx.shape(0)) if flat else out


RULES: dict[tuple[str, str], Rule] = {
    ("llmc", "Lengths"): _lengths,
    ("llmc", "Positions"): _positions,
    ("llmc", "Activation"): _activation,
    ("llmc", "Rope"): _rope,
}
