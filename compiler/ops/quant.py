"""Quantisation: to and from integers, and the operators that compute on them.

x = (q - zero_point) * scale, with one scale for the tensor, for each index of an axis, or for each block along it.
Narrow types (`llmc.ops.narrow`) are widened first.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llmc.graph import NARROW
from llmc.ops import narrow
from llmc.ops.context import Context, Rule
from llmc.ops.elementwise import onnx_dtype
from llmc.ops.matmul import integer_product
from llmc.ops.scalar import select
from llmc.ops.tensor import cast, compute, dtype_of, elementwise, is_float, reshape, shape_of
from llmc.tvm_shim import Expr, relax, te

op = relax.op

LIMITS = {
    **{name: (int(np.iinfo(name).min), int(np.iinfo(name).max)) for name in ("int8", "uint8", "int16", "uint16")},
    "int32": (-(2**31), 2**31 - 1),
    **narrow.LIMITS,
}
widened = narrow.wide


def _spread(ctx: Context, shape: tuple[Any, ...], parameter: Expr) -> tuple[Expr, Any]:
    """A scale or zero point with its index function: how an element's place becomes the parameter's place."""
    axis, block = int(ctx.attr("axis", 1)), int(ctx.attr("block_size", 0))
    own = shape_of(parameter)
    count = 1
    for d in own:
        count = count * d if isinstance(d, int) else 0
    if len(own) <= 1 and count == 1:
        return reshape(ctx, parameter, ()), lambda i: ()
    axis = ctx.axis(axis, len(shape))
    if not block:
        ctx.unify(shape[axis], own[0])
        return parameter, lambda i: (i[axis],)
    return parameter, lambda i: (*i[:axis], te.floordiv(i[axis], block), *i[axis + 1 :])


def dequantize(ctx: Context, x: Expr, scale: Expr, zero: Expr | None, dtype: str) -> Expr:
    """(x - zero) * scale, in the scale's type, then in `dtype`."""
    scale, place = _spread(ctx, shape_of(x), scale)
    work = dtype_of(scale) if is_float(dtype_of(scale)) else "float32"
    zeros = []
    if zero is not None:
        zero, _ = _spread(ctx, shape_of(x), zero)
        zeros = [zero]

    def body(q: Any, s: Any, zs: list[Any], out: list[Any]) -> Any:
        def element(*i: Any) -> Any:
            value = q(*i)
            if zs and is_float(str(q.dtype)):
                value = value - zs[0](*place(i))
            elif zs:
                value = value.astype("int32") - zs[0](*place(i)).astype("int32")
            return (value.astype(work) * s(*place(i)).astype(work)).astype(dtype)

        return te.compute(out, element, name="dequantize")

    return compute(ctx, "dequantize", body, x, scale, zeros, list(shape_of(x)))


def quantize(ctx: Context, x: Expr, scale: Expr, zero: Expr | None, dtype: str) -> Expr:
    """x / scale rounded half to even, plus the zero point, saturated; narrow floats are not rounded before they are.

    `x`, `scale` and `zero` are in types that hold their values; a narrow result is its bits.
    """
    if dtype not in LIMITS and dtype not in NARROW:
        ctx.fail(f"quantisation to {dtype}")
    low, high = LIMITS.get(dtype, (0, 0))
    scale, place = _spread(ctx, shape_of(x), scale)
    zeros = []
    if zero is not None:
        zero, _ = _spread(ctx, shape_of(x), zero)
        zeros = [zero]

    def body(t: Any, s: Any, zs: list[Any], out: list[Any]) -> Any:
        def element(*i: Any) -> Any:
            level = te.nearbyint(t(*i).astype("float32") / s(*place(i)).astype("float32"))
            if zs:
                level = level + zs[0](*place(i)).astype("float32")
            level = saturate(level, low, high)
            return narrow.low_bits(level, dtype) if dtype in NARROW else level.astype(dtype)

        def ratio(*i: Any) -> Any:
            level = t(*i).astype("float32") / s(*place(i)).astype("float32")
            return level + zs[0](*place(i)) if zs else level

        return te.compute(out, element if dtype in LIMITS else ratio, name="quantize")

    levels = compute(ctx, "quantize", body, x, scale, zeros, list(shape_of(x)))
    return levels if dtype in LIMITS else narrow.encode(ctx, levels, dtype, bool(ctx.attr("saturate", 1)))


def saturate(x: Any, low: int, high: int) -> Any:
    return te.max(te.min(x, te.const(high, "float32")), te.const(low, "float32"))


def _dequantize_linear(ctx: Context) -> Expr:
    dtype = onnx_dtype(ctx.attr("output_dtype")) if ctx.attr("output_dtype", 0) else ctx.dtype(1)
    zero = widened(ctx, 2) if ctx.has(2) else None
    return dequantize(ctx, widened(ctx, 0), widened(ctx, 1), zero, dtype)


def _quantize_linear(ctx: Context) -> Expr:
    dtype = onnx_dtype(ctx.attr("output_dtype")) if ctx.attr("output_dtype", 0) else "uint8"
    dtype = ctx.dtype(2) if ctx.has(2) else dtype
    if dtype in NARROW:
        ctx.narrow[0] = dtype
    return quantize(ctx, ctx.x(0), widened(ctx, 1), widened(ctx, 2) if ctx.has(2) else None, dtype)


def dynamic_quantize(ctx: Context, x: Expr) -> tuple[Expr, Expr, Expr]:
    """uint8 x with one scale and zero point, chosen so that its range, 0 included, fills 0..255."""
    axes = list(range(len(shape_of(x))))
    low, high = ctx.emit(op.min(x, axes)), ctx.emit(op.max(x, axes))
    zero, full = te.const(0.0, "float32"), te.const(255.0, "float32")

    one = te.const(1.0, "float32")

    def step(a: Any, b: Any) -> Any:
        width = (te.max(b, zero) - te.min(a, zero)) / full
        return select(width > zero, width, one)

    def offset(a: Any, s: Any) -> Any:
        return saturate(te.nearbyint(zero - te.min(a, zero) / s), 0, 255).astype("uint8")

    def level(v: Any, s: Any, z: Any) -> Any:
        return saturate(te.nearbyint(v / s) + z.astype("float32"), 0, 255).astype("uint8")

    scale = elementwise(ctx, "range_scale", step, low, high)
    point = elementwise(ctx, "range_zero", offset, low, scale)
    return elementwise(ctx, "quantize", level, x, scale, point), scale, point


def requantize(ctx: Context, acc: Expr, factor: Expr, zero: Expr, dtype: str) -> Expr:
    """int32 accumulators times a float32 factor, rounded half to even, plus the zero point, saturated."""
    low, high = LIMITS[dtype]

    def level(a: Any, f: Any, z: Any) -> Any:
        return saturate(te.nearbyint(a.astype("float32") * f) + z.astype("float32"), low, high).astype(dtype)

    return elementwise(ctx, "requantize", level, acc, factor, zero)


def _qlinear_matmul(ctx: Context) -> Expr:
    """a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero; a's vectors are by row, b's by column."""
    acc = integer_product(ctx, 0, 3, 2, 5)
    row = ctx.x(1)
    if ctx.rank(1) == 1 and ctx.shape(1)[0] != 1:
        row = reshape(ctx, row, [*ctx.shape(1), 1])
    out = reshape(ctx, ctx.x(6), ())
    factor = elementwise(ctx, "factor", lambda a, b, y: a * b / y, row, ctx.x(4), out)
    return requantize(ctx, acc, cast(ctx, factor, "float32"), reshape(ctx, ctx.x(7), ()), ctx.dtype(7))


RULES: dict[str, Rule] = {
    "DequantizeLinear": _dequantize_linear,
    "QuantizeLinear": _quantize_linear,
    "DynamicQuantizeLinear": lambda ctx: dynamic_quantize(ctx, ctx.x()),
    "QLinearMatMul": _qlinear_matmul,
}
