"""Rules of the operators that llmc makes itself, for where no kernel template takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmc.ops.context import Context, Rule
from llmc.ops.delegate import standard
from llmc.ops.scalar import const
from llmc.ops.tensor import cast, dtype_of, elementwise, permute, shape_of
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
    return _activated(ctx, ctx.attr("kind"), ctx.x(0))


def _activated(ctx: Context, kind: str, x: Expr) -> Expr:
    functions: dict[str, Callable[[Expr], Expr]] = {
        "relu": relax.op.nn.relu,
        "relu6": relax.op.nn.relu6,
        "hard_swish": lambda x: elementwise(ctx, "hard_swish", _hard_swish, x),
        "gelu": relax.op.nn.gelu,
        "gelu_tanh": relax.op.nn.gelu_tanh,
        "silu": relax.op.nn.silu,
    }
    if dtype_of(x) == "float16" and kind.startswith("gelu"):  # whose erf and tanh no CPU has in half precision
        return cast(ctx, ctx.emit(functions[kind](cast(ctx, x, "float32"))), "float16")
    return ctx.emit(functions[kind](x))


def _hard_swish(x: Any) -> Any:
    return x * te.max(te.min(x / const(x, 6) + const(x, 0.5), const(x, 1)), const(x, 0))


def _in_channels_first(ctx: Context, op: str, inputs: list[Expr | None], **attrs: Any) -> Expr:
    """The standard's `op` on channels-last tensors of two spatial dimensions, or one."""
    x, rest = inputs[0], inputs[1:]
    rank = len(shape_of(x))
    y = standard(ctx, op, [permute(ctx, x, [0, rank - 1, *range(1, rank - 1)]), *rest], **attrs)[0]
    return permute(ctx, y, [0, *range(2, rank), 1])


def _geometry(ctx: Context, rank: int) -> dict[str, Any]:
    names = {"kernel_shape": "kernel", "strides": "strides", "dilations": "dilations"}
    return {name: list(ctx.attr(key))[4 - rank :] for name, key in names.items()}


def _conv(ctx: Context) -> Expr:
    """x [B, H, W, C] or [B, L, C], weight [N, C / groups, ...], bias [N], residual: added before the activation."""
    parts = [ctx.x(i) if ctx.has(i) else None for i in range(3)]
    attrs = _geometry(ctx, ctx.rank()) | {"group": ctx.attr("groups")}
    y = _in_channels_first(ctx, "Conv", parts, **attrs)
    if ctx.has(3):
        y = ctx.emit(relax.op.add(y, ctx.x(3)))
    return y if ctx.attr("activation") == "none" else _activated(ctx, ctx.attr("activation"), y)


def _integer_conv(ctx: Context) -> Expr:
    """x [B, H, W, C] bytes, weight integers, bias int32 -> int32."""
    attrs = _geometry(ctx, ctx.rank()) | {"group": ctx.attr("groups")}
    y = _in_channels_first(ctx, "ConvInteger", [ctx.x(), ctx.x(1)], **attrs)
    return ctx.emit(relax.op.add(y, ctx.x(2)))


def _window(ctx: Context) -> Expr:
    """A depthwise convolution, a maximum or a mean of channels-last windows."""
    rank, kind = ctx.rank(), ctx.attr("kind")
    top, left, bottom, right = ctx.attr("pads")
    pads = [top, left, bottom, right] if rank == 4 else [left, right]
    attrs = _geometry(ctx, rank) | {"pads": pads}
    if kind == "depthwise":
        parts = [ctx.x(i) if ctx.has(i) else None for i in range(3)]
        y = _in_channels_first(ctx, "Conv", parts, group=ctx.shape()[-1], **attrs)
    elif kind == "max":
        y = _in_channels_first(ctx, "MaxPool", [ctx.x()], ceil_mode=ctx.attr("ceil_mode"), **attrs)
    else:
        attrs |= {"count_include_pad": int(ctx.attr("count_pad")), "ceil_mode": ctx.attr("ceil_mode")}
        y = _in_channels_first(ctx, "AveragePool", [ctx.x()], **attrs)
    return y if ctx.attr("activation") == "none" else _activated(ctx, ctx.attr("activation"), y)


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
    ("llmc", "Conv"): _conv,
    ("llmc", "IntegerConv"): _integer_conv,
    ("llmc", "Rope"): _rope,
    ("llmc", "Window"): _window,
}
