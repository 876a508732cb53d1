"""Operators that treat every element alike: arithmetic, comparisons, logic, casts and activations.

Semantics of the ONNX specification: numpy broadcasting, integer division truncates, comparisons give bool.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import onnx

from llmc.graph import NARROW
from llmc.ops import narrow
from llmc.ops.context import Context, Rule
from llmc.ops.scalar import const, exp, gelu, gelu_tanh, select, sigmoid, softplus, tanh
from llmc.ops.tensor import broadcast_shape, cast, elementwise, full, immediate, is_float, reshape, shape_of
from llmc.tvm_shim import Expr, relax, te, tirx

op = relax.op


def onnx_dtype(code: int) -> str:
    """numpy's name of an onnx.TensorProto data type."""
    return onnx.helper.tensor_dtype_to_np_dtype(code).name


# -- binary -----------------------------------------------------------------------------------------------------
def _binary(f: Callable[[Expr, Expr], Expr]) -> Rule:
    """A Relax operator that already means what ONNX says."""

    def rule(ctx: Context) -> Expr:
        broadcast_shape(ctx, ctx.shape(0), ctx.shape(1))
        return f(ctx.x(0), ctx.x(1))

    return rule


def _scalar_binary(name: str, f: Callable[[Any, Any], Any]) -> Rule:
    return lambda ctx: elementwise(ctx, name, f, ctx.x(0), ctx.x(1))


def _variadic(f: Callable[[Expr, Expr], Expr]) -> Rule:
    def rule(ctx: Context) -> Expr:
        broadcast_shape(ctx, *(ctx.shape(i) for i in range(len(ctx))))
        return reduce(lambda a, b: ctx.emit(f(a, b)), (ctx.x(i) for i in range(len(ctx))))

    return rule


def _mean(ctx: Context) -> Expr:
    return op.multiply(_variadic(op.add)(ctx), ctx.literal(1 / len(ctx), ctx.dtype()))


def _divide(ctx: Context) -> Expr:
    f = (lambda a, b: a / b) if is_float(ctx.dtype()) else te.truncdiv
    return elementwise(ctx, "divide", f, ctx.x(0), ctx.x(1))


def _mod(ctx: Context) -> Expr:
    """fmod = 1: the sign of the dividend, as C's; otherwise that of the divisor, as Python's, of a zero, too."""
    dtype, as_c = ctx.dtype(), bool(ctx.attr("fmod", 0))
    if not is_float(dtype):
        f = te.truncmod if as_c else te.floormod
    else:
        wide, libm = ("float64", "fmod") if dtype == "float64" else ("float32", "fmodf")

        def f(a: Any, b: Any) -> Any:
            a, b = a.astype(wide), b.astype(wide)
            r = tirx.call_pure_extern(wide, libm, a, b)
            if not as_c:
                zero = te.const(0.0, wide)
                other = tirx.any(tirx.all(r < zero, b > zero), tirx.all(r > zero, b < zero))
                r = select(r == zero, select(b < zero, te.const(-0.0, wide), zero), select(other, r + b, r))
            return r.astype(dtype)

    return elementwise(ctx, "mod", f, ctx.x(0), ctx.x(1))


def _pow(ctx: Context) -> Expr:
    """The exponent may be of another type; small constant exponents become multiplications and roots."""
    x, exponent, dtype = ctx.x(0), immediate(ctx.x(1)), ctx.dtype()
    if exponent is not None and is_float(dtype):
        value = float(exponent.value)
        if value in (1, 2, 3):
            broadcast_shape(ctx, ctx.shape(0), ctx.shape(1))
            return elementwise(ctx, "power", lambda a, _: reduce(lambda p, q: p * q, [a] * int(value)), x, ctx.x(1))
        if value == 0.5:
            return elementwise(ctx, "power", lambda a, _: te.sqrt(a), x, ctx.x(1))
    wide = dtype if is_float(dtype) else "float64"
    return elementwise(ctx, "power", lambda a, b: te.power(a.astype(wide), b.astype(wide)).astype(dtype), x, ctx.x(1))


def _xor(a: Any, b: Any) -> Any:
    """LLVM compares no booleans."""
    return a.astype("int8") != b.astype("int8")


def _equal(ctx: Context) -> Expr:
    if ctx.dtype() == "bool":
        return elementwise(ctx, "equal", lambda a, b: tirx.Not(_xor(a, b)), ctx.x(0), ctx.x(1))
    return _binary(op.equal)(ctx)


def _shift(ctx: Context) -> Expr:
    """A shift by the width or more, or by less than nothing, leaves no bit but the sign's."""
    left, signed = ctx.attr("direction") in ("LEFT", b"LEFT"), ctx.dtype().startswith("int")
    width = np.iinfo(ctx.dtype()).bits

    def shift(a: Any, b: Any) -> Any:
        most = const(a, width - 1)
        inside = tirx.all(b >= const(a, 0), b <= most) if signed else b <= most
        by = select(inside, b, most)
        if not left and signed:
            return a >> by
        return select(inside, a << by if left else a >> by, const(a, 0))

    return elementwise(ctx, "bit_shift", shift, ctx.x(0), ctx.x(1))


def _prelu(ctx: Context) -> Expr:
    zero = te.const(0, ctx.dtype())
    return elementwise(ctx, "prelu", lambda a, slope: select(a < zero, a * slope, a), ctx.x(0), ctx.x(1))


# -- unary ------------------------------------------------------------------------------------------------------
def _unary(f: Callable[[Expr], Expr]) -> Rule:
    return lambda ctx: f(ctx.x())


def _scalar(name: str, f: Callable[..., Any], **defaults: float) -> Rule:
    """`f(x, **attributes)` on every element; attributes absent from the node have the standard's defaults."""

    def rule(ctx: Context) -> Expr:
        attrs = {k: te.const(float(ctx.attr(k, v)), ctx.dtype()) for k, v in defaults.items()}
        return elementwise(ctx, name, lambda a: f(a, **attrs), ctx.x())

    return rule


def _elu(x: Any, alpha: Any) -> Any:
    return select(x < const(x, 0), alpha * (exp(x) - const(x, 1)), x)


def _hard_sigmoid(x: Any, alpha: Any, beta: Any) -> Any:
    return te.max(const(x, 0), te.min(const(x, 1), alpha * x + beta))


def _shrink(x: Any, bias: Any, lambd: Any) -> Any:
    return select(x < -lambd, x + bias, select(x > lambd, x - bias, const(x, 0)))


def _sign(x: Any) -> Any:
    return select(x > const(x, 0), const(x, 1), select(x < const(x, 0), const(x, -1), const(x, 0)))


def _swiglu(ctx: Context) -> Expr:
    alpha = te.const(float(ctx.attr("alpha", 1.0)), ctx.dtype())
    return elementwise(ctx, "swiglu", lambda gate, x: gate * sigmoid(alpha * gate) * x, ctx.x(0), ctx.x(1))


def _gelu(ctx: Context) -> Expr:
    tanh = ctx.attr("approximate", "none") in ("tanh", b"tanh")
    return elementwise(ctx, "gelu", gelu_tanh if tanh else gelu, ctx.x())


def _is_inf(ctx: Context) -> Expr:
    def test(x: Any) -> Any:
        found = []
        if ctx.attr("detect_positive", 1):
            found.append(x == te.max_value(str(x.ty.dtype)) * const(x, 2))
        if ctx.attr("detect_negative", 1):
            found.append(x == te.max_value(str(x.ty.dtype)) * const(x, -2))
        return reduce(tirx.any, found) if found else te.const(False, "bool")

    return elementwise(ctx, "is_inf", test, ctx.x())


def _clip(ctx: Context) -> Expr:
    """Bounds are inputs, or attributes before opset 11; a minimum above the maximum gives the maximum."""
    y = ctx.x()
    if ctx.node.version < 11:
        for name, f in (("min", te.max), ("max", te.min)):
            if ctx.attr(name) is not None:
                y = elementwise(ctx, f"clip_{name}", f, y, ctx.literal(float(ctx.attr(name)), ctx.dtype()))
        return y
    if ctx.has(1):
        y = elementwise(ctx, "clip_low", te.max, y, reshape(ctx, ctx.x(1), ()))
    if ctx.has(2):
        y = elementwise(ctx, "clip_high", te.min, y, reshape(ctx, ctx.x(2), ()))
    return y


def _where(ctx: Context) -> Expr:
    return elementwise(ctx, "where", select, ctx.x(0), ctx.x(1), ctx.x(2))


# -- types ------------------------------------------------------------------------------------------------------
def _cast_to(ctx: Context, dtype: str) -> Expr:
    """Floats beyond a narrow float's range become its largest value, unless the attribute `saturate` is 0."""
    x = narrow.wide(ctx, 0)
    if dtype in NARROW:
        ctx.narrow[0] = dtype
        if dtype in narrow.BITS:
            return elementwise(ctx, "narrow", lambda a: narrow.low_bits(a, dtype), x)
        rounding = ctx.attr("round_mode", "up")
        return narrow.encode(ctx, x, dtype, bool(ctx.attr("saturate", 1)), rounding)
    if dtype == "bool" and ctx.dtype() != "bool":
        return elementwise(ctx, "to_bool", lambda a: a != const(a, 0), x)
    return cast(ctx, x, dtype)


def _cast(ctx: Context) -> Expr:
    return _cast_to(ctx, onnx_dtype(ctx.attr("to")))


def _cast_like(ctx: Context) -> Expr:
    return _cast_to(ctx, ctx.dtype(1))


def _bit_cast(ctx: Context) -> Expr:
    """The same bits as another type of the same size."""
    dtype = onnx_dtype(ctx.attr("to"))
    if np.dtype(dtype).itemsize != np.dtype(ctx.dtype()).itemsize:
        ctx.fail(f"BitCast from {ctx.dtype()} to {dtype}, which differ in size")

    def same_bits(a: Any) -> Any:
        a = a.astype("uint8") if ctx.dtype() == "bool" else a
        return tirx.reinterpret("uint8", a) != const(a, 0) if dtype == "bool" else tirx.reinterpret(dtype, a)

    return elementwise(ctx, "bit_cast", same_bits, ctx.x())


def _dropout(ctx: Context) -> tuple[Expr, ...]:
    """Inference, or a ratio of 0: the identity, and a mask of ones."""
    training = ctx.const(2) if ctx.has(2) else np.zeros(())
    ratio = ctx.const(1) if ctx.has(1) else np.full((), 0.5)
    if (training is None or training.any()) and (ratio is None or ratio.any()):
        if training is not None and ratio is not None:
            ctx.fail("Dropout in training mode is random; export the model for inference")
        _refuse_random(ctx)
    return ctx.x(), full(ctx, shape_of(ctx.x()), True, "bool" if ctx.node.version >= 10 else ctx.dtype())


def _refuse_random(ctx: Context) -> None:
    """Have a run fail whose data asks for a Dropout that is random."""
    ratio = reshape(ctx, ctx.x(1), ()) if ctx.has(1) else ctx.literal(0.5, "float32")
    training = reshape(ctx, ctx.x(2), ())

    def random(ratio: Any, training: Any) -> Any:
        return tirx.all(training, ratio != const(ratio, 0)).astype("int64")

    ctx.measured(reshape(ctx, elementwise(ctx, "random", random, ratio, training), [1]), 0, [0])


_SELU_ALPHA, _SELU_GAMMA = 1.67326319217681884765625, 1.05070102214813232421875

RULES: dict[str, Rule] = {
    "Add": _binary(op.add),
    "Sub": _binary(op.subtract),
    "Mul": _binary(op.multiply),
    "Div": _divide,
    "Mod": _mod,
    "Pow": _pow,
    "BitShift": _shift,
    "BitwiseAnd": _binary(op.bitwise_and),
    "BitwiseOr": _binary(op.bitwise_or),
    "BitwiseXor": _binary(op.bitwise_xor),
    "BitwiseNot": _unary(op.bitwise_not),
    "And": _binary(op.logical_and),
    "Or": _binary(op.logical_or),
    "Xor": _scalar_binary("logical_xor", _xor),
    "Not": _unary(op.logical_not),
    "Equal": _equal,
    "Greater": _binary(op.greater),
    "GreaterOrEqual": _binary(op.greater_equal),
    "Less": _binary(op.less),
    "LessOrEqual": _binary(op.less_equal),
    "Max": _variadic(op.maximum),
    "Min": _variadic(op.minimum),
    "Sum": _variadic(op.add),
    "Mean": _mean,
    "PRelu": _prelu,
    "Where": _where,
    "Clip": _clip,
    "Cast": _cast,
    "CastLike": _cast_like,
    "BitCast": _bit_cast,
    "Identity": lambda ctx: ctx.x(),
    "Dropout": _dropout,
    "Abs": _scalar("abs", te.abs),
    "Neg": _scalar("negative", lambda x: const(x, 0) - x),
    "Sign": _scalar("sign", _sign),
    "Reciprocal": _scalar("reciprocal", lambda x: const(x, 1) / x),
    "Round": _scalar("round", te.nearbyint),
    "Ceil": _unary(op.ceil),
    "Floor": _unary(op.floor),
    "Sqrt": _unary(op.sqrt),
    "Exp": _scalar("exp", exp),
    "Log": _unary(op.log),
    "Erf": _unary(op.erf),
    "Sin": _unary(op.sin),
    "Cos": _unary(op.cos),
    "Tan": _unary(op.tan),
    "Sinh": _unary(op.sinh),
    "Cosh": _unary(op.cosh),
    "Tanh": _scalar("tanh", tanh),
    "Asin": _unary(op.asin),
    "Acos": _unary(op.acos),
    "Atan": _unary(op.atan),
    "Asinh": _unary(op.asinh),
    "Acosh": _unary(op.acosh),
    "Atanh": _unary(op.atanh),
    "IsNaN": _scalar("is_nan", te.isnan),
    "IsInf": _is_inf,
    "Relu": _scalar("relu", lambda x: te.max(x, const(x, 0))),
    "LeakyRelu": _scalar("leaky_relu", lambda x, alpha: select(x < const(x, 0), alpha * x, x), alpha=0.01),
    "ThresholdedRelu": _scalar("thresholded_relu", lambda x, alpha: select(x > alpha, x, const(x, 0)), alpha=1.0),
    "Elu": _scalar("elu", _elu, alpha=1.0),
    "Selu": _scalar("selu", lambda x, alpha, gamma: gamma * _elu(x, alpha), alpha=_SELU_ALPHA, gamma=_SELU_GAMMA),
    "Celu": _scalar(
        "celu", lambda x, alpha: select(x < const(x, 0), alpha * (exp(x / alpha) - const(x, 1)), x), alpha=1.0
    ),
    "Sigmoid": _scalar("sigmoid", sigmoid),
    "HardSigmoid": _scalar("hard_sigmoid", _hard_sigmoid, alpha=0.2, beta=0.5),
    "HardSwish": _scalar("hard_swish", lambda x: x * _hard_sigmoid(x, const(x, 1 / 6), const(x, 0.5))),
    "Softplus": _scalar("softplus", softplus),
    "Softsign": _scalar("softsign", lambda x: x / (const(x, 1) + te.abs(x))),
    "Mish": _scalar("mish", lambda x: x * tanh(softplus(x))),
    "Swish": _scalar("swish", lambda x, alpha: x * sigmoid(alpha * x), alpha=1.0),
    "Shrink": _scalar("shrink", _shrink, bias=0.0, lambd=0.5),
    "Gelu": _gelu,
    "SwiGLU": _swiglu,
}
