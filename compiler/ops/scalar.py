"""Functions of one scalar, as tensor expressions that LLVM can vectorise.

e**x, and what is made of it, is a polynomial for float32: a call of libm for every element would run ten times below
memory bandwidth.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

from llmc.tvm_shim import te, tirx

_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4  # ln 2 = high + low; whole * high is exact (Cody and Waite)
_EXP = [1 / math.factorial(n) for n in range(7, -1, -1)]  # Taylor: relative error below 1e-8 for |x| <= ln(2) / 2


def const(x: Any, value: float) -> Any:
    """`value` in the type of `x`."""
    return te.const(value, str(x.ty.dtype))


def select(condition: Any, yes: Any, no: Any) -> Any:
    """A choice that evaluates both sides, so that it vectorises."""
    return tirx.Select(condition, yes, no)


def exp(x: Any) -> Any:
    """e**x; float32 within 2 units in the last place, with infinity, 0 and NaN where they belong."""
    if str(x.ty.dtype) != "float32":
        return te.exp(x)

    def f32(value: float) -> Any:
        return te.const(value, "float32")

    z = te.max(te.min(x, f32(89.0)), f32(-104.0))
    whole = te.nearbyint(z * f32(1 / math.log(2)))
    r = z - whole * f32(_LN2_HIGH) - whole * f32(_LN2_LOW)
    poly = reduce(lambda p, c: p * r + f32(c), _EXP[1:], f32(_EXP[0]))
    n = whole.astype("int32")
    half = n >> te.const(1, "int32")  # 2**n in two factors, since n leaves the range of exponents at both ends
    y = poly * _power_of_two(half) * _power_of_two(n - half)
    return select(x == x, y, x)


def _power_of_two(n: Any) -> Any:
    return tirx.reinterpret("float32", (n + te.const(127, "int32")) << te.const(23, "int32"))


def tanh(x: Any) -> Any:
    """1 - 2 / (e**2x + 1), and an odd polynomial where that would cancel."""
    if str(x.ty.dtype) != "float32":
        return te.tanh(x)
    square = x * x
    small = x * (const(x, 1) + square * (const(x, -1 / 3) + square * (const(x, 2 / 15) - square * const(x, 17 / 315))))
    large = const(x, 1) - const(x, 2) / (exp(x + x) + const(x, 1))
    return select(te.abs(x) < const(x, 0.1), small, large)


def sigmoid(x: Any) -> Any:
    return const(x, 1) / (const(x, 1) + exp(const(x, 0) - x))


def softplus(x: Any) -> Any:
    """log(1 + e**x) without overflow."""
    return te.max(x, const(x, 0)) + te.log(const(x, 1) + exp(const(x, 0) - te.abs(x)))


def gelu(x: Any) -> Any:
    return const(x, 0.5) * x * (const(x, 1) + erf(x * const(x, math.sqrt(0.5))))


def erf(x: Any) -> Any:
    """Half precision takes the way of float32: LLVM has no erf for it."""
    return te.erf(x.astype("float32")).astype("float16") if str(x.ty.dtype) == "float16" else te.erf(x)


def gelu_tanh(x: Any) -> Any:
    inner = const(x, math.sqrt(2 / math.pi)) * (x + const(x, 0.044715) * x * x * x)
    return const(x, 0.5) * x * (const(x, 1) + tanh(inner))
