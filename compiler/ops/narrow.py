"""Integers of less than a byte and floats of a byte or less: read from their bits, which a uint8 holds, and made.

Paper trail: ONNX's "Float stored in 8 bits", "4 bit integers" (onnx/docs/docsgen/source/technical), OCP Microscaling
Formats 1.0, ml_dtypes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from llmc.graph import CARRIER, NARROW
from llmc.ops.context import Context
from llmc.ops.scalar import select
from llmc.ops.tensor import cast, compute, elementwise, shape_of
from llmc.tvm_shim import Expr, te, tirx

BITS = {"int2": 2, "uint2": 2, "int4": 4, "uint4": 4}
LIMITS = {
    name: (-(1 << bits - 1), (1 << bits - 1) - 1) if name.startswith("int") else (0, (1 << bits) - 1)
    for name, bits in BITS.items()
}


def wide(ctx: Context, i: int) -> Expr:
    """Input `i` in a type that holds its values: narrow integers as int8 or uint8, narrow floats as float32."""
    dtype = ctx.dtype(i)
    if dtype not in NARROW:
        return ctx.x(i)
    values = np.dtype(f"{dtype.rstrip('24')}8" if dtype in BITS else "float32")
    constant = ctx.const(i)
    if constant is not None:
        return ctx.literal(constant.astype(values), values.name)
    return widen_bits(ctx, ctx.x(i), dtype) if dtype in BITS else decode(ctx, ctx.x(i), dtype)


def widen_bits(ctx: Context, codes: Expr, dtype: str) -> Expr:
    """The int8 or uint8 values of a narrow integer's bits."""
    bits, signed = BITS[dtype], dtype.startswith("int")

    def value(a: Any) -> Any:
        n, sign = a.astype("int32") & _int((1 << bits) - 1), _int(1 << bits - 1)
        return ((n ^ sign) - sign).astype("int8") if signed else n.astype("uint8")

    return elementwise(ctx, "integer_values", value, codes)


def low_bits(x: Any, dtype: str) -> Any:
    """The bits of a narrow integer from a scalar: the fraction is dropped, and the bits above those of the type."""
    return (x.astype("int32") & _int((1 << BITS[dtype]) - 1)).astype(CARRIER)


def decode(ctx: Context, codes: Expr, dtype: str) -> Expr:
    """The float32 values of a narrow float's bits, from a table of all of them."""
    values = np.arange(256, dtype=np.uint8).view(np.dtype(dtype)).astype(np.float32)

    def body(x: Any, table: Any, out: list[Any]) -> Any:
        return te.compute(out, lambda *i: table(x(*i).astype("int64")), name="float_values")

    return compute(ctx, "float_values", body, codes, ctx.literal(values, "float32"), list(shape_of(codes)))


def encode(ctx: Context, x: Expr, dtype: str, saturate: bool = True, rounding: str = "up") -> Expr:
    """The bits of a narrow float nearest to each element of `x`, ties to even.

    What is too large becomes the largest value where `saturate`, else infinity or NaN, whichever the type has.
    `rounding` (up, down, nearest) is for float8_e8m0fnu, which holds powers of two alone.
    """
    x = cast(ctx, x, "float32")
    if dtype == "float8_e8m0fnu":
        return elementwise(ctx, "float_bits", lambda a: _power(a, rounding, saturate).astype(CARRIER), x)
    layout = _layout(dtype)
    return elementwise(ctx, "float_bits", lambda a: _code(a, layout, saturate).astype(CARRIER), x)


# -- floats of a byte -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Layout:
    """Bits of the mantissa, the least exponent, the codes of the largest value, of what is beyond, and of NaN."""

    mantissa: int
    least: int
    bits: int
    largest: int
    beyond: int
    nan: int
    signed_zero: bool


def _layout(dtype: str) -> _Layout:
    type_ = np.dtype(dtype)
    info = ml_dtypes.finfo(type_)

    def code(value: float) -> int:
        return int(np.array(value, np.float32).astype(type_).view(np.uint8))

    largest, beyond, nan = (code(v) for v in (float(info.max), np.inf, np.nan))
    return _Layout(int(info.nmant), int(info.minexp), int(info.bits), largest, beyond, nan, "fnuz" not in dtype)


def _int(value: int) -> Any:
    return te.const(value, "int32")


def _bits(value: int) -> Any:
    """Unsigned, because TVM widens signed integers, which it takes for indices."""
    return te.const(value, "uint32")


def _code(x: Any, layout: _Layout, saturate: bool) -> Any:
    """The exponent is that of x, or the least; the mantissa is x in units of its last place. A mantissa that rounds up
    to the next power of two carries into the exponent, as it should."""
    magnitude = te.min(te.abs(x), te.const(2.0**17, "float32"))  # above every type's largest value
    least = layout.least + 127  # biased, as a float32's exponent is
    exponent = te.max(tirx.reinterpret("uint32", magnitude) >> _bits(23), _bits(least))
    unit = tirx.reinterpret("float32", (exponent - _bits(layout.mantissa)) << _bits(23))
    code = te.nearbyint(magnitude / unit).astype("uint32") + ((exponent - _bits(least)) << _bits(layout.mantissa))
    code = select(code > _bits(layout.largest), _bits(layout.largest if saturate else layout.beyond), code)
    sign = (tirx.reinterpret("uint32", x) >> _bits(31)) << _bits(layout.bits - 1)
    if not layout.signed_zero:
        sign = select(tirx.any(code == _bits(0), code == _bits(layout.nan)), _bits(0), sign)
    return select(te.isnan(x), _bits(layout.nan), code | sign)


def _power(x: Any, rounding: str, saturate: bool) -> Any:
    """Biased exponents, as a float32 has them; NaN and, without `saturate`, what is too large are 255."""
    bits = tirx.reinterpret("uint32", x) & _bits(0x7FFFFFFF)
    exponent, rest, half = bits >> _bits(23), bits & _bits(0x7FFFFF), _bits(0x400000)
    up = {
        "up": rest > _bits(0),
        "down": te.const(False, "bool"),
        "nearest": tirx.any(rest > half, tirx.all(rest == half, (exponent & _bits(1)) == _bits(1))),
    }[rounding]
    code = te.min(exponent + select(up, _bits(1), _bits(0)), _bits(254 if saturate else 255))
    return select(te.isnan(x), _bits(255), code)
