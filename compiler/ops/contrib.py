"""Operators of the com.microsoft domain, as onnxruntime defines them."""

from __future__ import annotations

from typing import Any

from llmc.ops import attention
from llmc.ops.context import Context, Rule
from llmc.ops.matmul import matmul
from llmc.ops.nn import rms_norm
from llmc.ops.tensor import broadcast_shape, compute, index_of, reshape
from llmc.tvm_shim import Expr, relax, te

op = relax.op


# -- low-bit weights --------------------------------------------------------------------------------------------
def _matmul_nbits(ctx: Context) -> Expr:
    """A [..., K] x dequantised B [N, K]^T. B holds `bits`-bit codes, low bits first, in blocks along K:
    uint8 [N, blocks, block_size*bits/8]; scales [N, blocks]; zero points packed the same way, or of A's type."""
    n, k, bits, block = (int(ctx.attr(a)) for a in ("N", "K", "bits", "block_size"))
    if bits not in (2, 4, 8):
        ctx.fail(f"{bits}-bit weights are not supported")
    if ctx.has(4):
        ctx.fail("g_idx (act-order) is not supported")
    blocks, dtype = -(-k // block), ctx.dtype()
    codes = reshape(ctx, ctx.x(1), [n, blocks * block * bits // 8])
    scales = reshape(ctx, ctx.x(2), [n, blocks])
    zeros = []
    packed_zeros = ctx.has(3) and ctx.dtype(3) == "uint8"
    if ctx.has(3):
        width = -(-blocks * bits // 8) if packed_zeros else blocks
        zeros = [reshape(ctx, ctx.x(3), [n, width])]

    def body(q: Any, s: Any, zs: list[Any]) -> Any:
        def element(i: Any, j: Any) -> Any:
            g = te.floordiv(j, block)
            zero = te.const(1 << (bits - 1), dtype)
            if zs:
                zero = (unpack(zs[0], i, g, bits) if packed_zeros else zs[0](i, g)).astype(dtype)
            return (unpack(q, i, j, bits).astype(dtype) - zero) * s(i, g).astype(dtype)

        return te.compute((n, k), element, name="dequantize")

    weight = compute(ctx, "dequantize", body, codes, scales, zeros)
    y = matmul(ctx, ctx.x(0), ctx.emit(op.permute_dims(weight, [1, 0])))
    return op.add(y, ctx.x(5)) if ctx.has(5) else y


def _gather_block_quantized(ctx: Context) -> Expr:
    """Rows of a table [V, E] that is stored as MatMulNBits stores weights: `bits`-bit codes, low bits first, in uint8;
    scales [V, blocks]; zero points packed like the codes."""
    bits, block = int(ctx.attr("bits", 4)), int(ctx.attr("block_size", 128))
    axes = ctx.axis(int(ctx.attr("gather_axis", 0)), 2), ctx.axis(int(ctx.attr("quantize_axis", 1)), 2)
    if ctx.rank() != 2 or ctx.dtype() != "uint8" or bits not in (4, 8) or axes != (0, 1):
        ctx.fail("only rows of a matrix of uint8, quantised along the columns, are supported")
    (rows, width), dtype = ctx.shape(), ctx.dtype(2)

    def body(q: Any, ids: Any, s: Any, zs: list[Any], out: list[Any], rows: Any) -> Any:
        def element(*i: Any) -> Any:
            row, g = index_of(ids(*i[:-1]).astype("int64"), rows), te.floordiv(i[-1], block)
            zero = unpack(zs[0], row, g, bits).astype(dtype) if zs else te.const(1 << (bits - 1), dtype)
            return (unpack(q, row, i[-1], bits).astype(dtype) - zero) * s(row, g)

        return te.compute(out, element, name="gather_dequantize")

    zeros = [ctx.x(3)] if ctx.has(3) else []
    out = [*ctx.shape(1), width * (8 // bits)]
    return compute(ctx, "gather_dequantize", body, ctx.x(0), ctx.x(1), ctx.x(2), zeros, out, rows)


def unpack(x: Any, i: Any, j: Any, bits: int) -> Any:
    """The j-th `bits`-bit code of row i of a uint8 matrix, low bits first."""
    if bits == 8:
        return x(i, j)
    per = 8 // bits
    shift = (te.floormod(j, per) * bits).astype("uint8")
    return (x(i, te.floordiv(j, per)) >> shift) & te.const((1 << bits) - 1, "uint8")


# -- normalisation ----------------------------------------------------------------------------------------------
def _skip(ctx: Context, bias_at: int) -> Expr:
    """input + skip (+ bias); skip may lack the batch dimension or have 1 there."""
    broadcast_shape(ctx, ctx.shape(0), ctx.shape(1))
    total = ctx.emit(op.add(ctx.x(0), ctx.x(1)))
    return ctx.emit(op.add(total, ctx.x(bias_at))) if ctx.has(bias_at) else total


def _simplified(ctx: Context) -> tuple[Expr | None, ...]:
    axis = ctx.axis(int(ctx.attr("axis", -1)), ctx.rank())
    return (rms_norm(ctx, ctx.x(0), ctx.x(1), axis, float(ctx.attr("epsilon", 1e-5))), None)


def _skip_simplified(ctx: Context) -> tuple[Expr | None, ...]:
    """(y, None, None, input + skip)."""
    total = _skip(ctx, 3)
    y = rms_norm(ctx, total, ctx.x(2), ctx.rank() - 1, float(ctx.attr("epsilon", 1e-5)))
    return y, None, None, total


STANDARD: dict[str, Rule] = {**attention.STANDARD, "SimplifiedLayerNormalization": _simplified}
RULES: dict[str, Rule] = {
    **attention.MICROSOFT,
    "GatherBlockQuantized": _gather_block_quantized,
    "MatMulNBits": _matmul_nbits,
    "SimplifiedLayerNormalization": _simplified,
    "SkipSimplifiedLayerNormalization": _skip_simplified,
}
