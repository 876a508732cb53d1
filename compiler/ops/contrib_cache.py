"""Key/value caches of GroupQueryAttention that hold integers: 8 bits, or two of 4 bits in a byte."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmc.ops.context import Context
from llmc.ops.contrib_gemm import unpack
from llmc.ops.quant import saturate
from llmc.ops.tensor import compute, elementwise, reshape, shape_of, simplify
from llmc.tvm_shim import Expr, te


@dataclass(frozen=True)
class Codec:
    """Codes are x / scale, rounded half to even; scale is one number, or [1, KV, 1, D]. Four-bit codes are stored as
    code + 8, the one of an even place in the low half of a byte."""

    scale: Expr
    bits: int

    def encode(self, ctx: Context, x: Expr) -> Expr:
        """x [B, KV, S, D] as int8 [B, KV, S, D], or uint8 [B, KV, S, D / 2]."""
        low, high = -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1

        def level(v: Any, s: Any) -> Any:
            return saturate(te.nearbyint(v.astype("float32") / s), low, high).astype("int8")

        codes = elementwise(ctx, "encode", level, x, self.scale)
        if self.bits == 8:
            return codes
        b, h, s, d = shape_of(codes)

        def pack(q: Any, out: list[Any]) -> Any:
            def half(i: tuple[Any, ...], which: int) -> Any:
                return (q(*i[:3], i[3] * 2 + which).astype("int32") + 8).astype("uint8")

            shift = te.const(4, "uint8")
            return te.compute(out, lambda *i: half(i, 0) | (half(i, 1) << shift), name="pack")

        return compute(ctx, "pack", pack, codes, [b, h, s, simplify(d // 2)])

    def decode(self, ctx: Context, codes: Expr) -> Expr:
        """float32 [B, KV, T, D]."""
        if self.bits == 8:
            return elementwise(ctx, "decode", lambda q, s: q.astype("float32") * s, codes, self.scale)
        b, h, t, d = shape_of(codes)

        def values(q: Any, out: list[Any]) -> Any:
            return te.compute(
                out, lambda *i: unpack(q, 4, *i).astype("float32") - te.const(8, "float32"), name="unpack"
            )

        wide = compute(ctx, "unpack", values, codes, [b, h, t, simplify(d * 2)])
        return elementwise(ctx, "decode", lambda v, s: v * s, wide, self.scale)


def codec(ctx: Context, name: str, i: int) -> Codec | None:
    """The codec that attribute `name` and the scale at input `i` describe; None for a cache of floats."""
    kind = ctx.attr(name, "NONE")
    kind = kind.decode() if isinstance(kind, bytes) else kind
    if kind == "NONE":
        return None
    bits = int(ctx.attr("kv_cache_bit_width", 8) or 8)
    stored = ctx.dtype(3) if ctx.has(3) else "int8"
    if (bits, stored) not in ((8, "int8"), (4, "uint8")):
        ctx.fail(f"a {bits}-bit cache of {stored}")
    return Codec(reshape(ctx, ctx.x(i), () if kind == "PER_TENSOR" else ctx.shape(i)), bits)
