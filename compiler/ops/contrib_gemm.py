"""com.microsoft's matrix products: with low-bit weights, with quantised operands, and with what follows them fused."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmc.ops import quant
from llmc.ops.activations import ACTIVATIONS
from llmc.ops.context import Context, Rule
from llmc.ops.conv import RULES as CONV
from llmc.ops.matmul import RULES as MATMUL
from llmc.ops.matmul import add_bias, centred, integer_product, matmul, scale, transpose_last
from llmc.ops.tensor import cast, compute, elementwise, permute, product, reshape
from llmc.tvm_shim import Expr, relax, te

op = relax.op


# -- low-bit weights --------------------------------------------------------------------------------------------
def unpack(x: Any, bits: int, *i: Any) -> Any:
    """The `bits`-bit code at index i of a uint8 tensor that is packed along its last axis, low bits first."""
    if bits == 8:
        return x(*i)
    per = 8 // bits
    shift = (te.floormod(i[-1], per) * bits).astype("uint8")
    return (x(*i[:-1], te.floordiv(i[-1], per)) >> shift) & te.const((1 << bits) - 1, "uint8")


def _matmul_nbits(ctx: Context) -> Expr:
    """A [..., K] x dequantised B [N, K]^T (+ bias). B holds `bits`-bit codes, low bits first, in blocks along K:
    uint8 [N, blocks, block_size*bits/8]; scales [N, blocks]; zero points packed the same way, or of A's type.
    g_idx [K] says for each column which block's scale it has."""
    n, k, block = (int(ctx.attr(a)) for a in ("N", "K", "block_size"))
    bits = int(ctx.attr("bits", 4))
    if bits not in (2, 4, 8):
        ctx.fail(f"{bits}-bit weights are not supported")
    if ctx.attr("weight_prepacked", 0):
        ctx.fail("weights that were packed for another machine (weight_prepacked)")
    blocks, dtype = -(-k // block), ctx.dtype()
    codes = reshape(ctx, ctx.x(1), [n, blocks * block * bits // 8])
    scales = reshape(ctx, ctx.x(2), [n, blocks])
    zeros = []
    packed_zeros = ctx.has(3) and ctx.dtype(3) == "uint8"
    if ctx.has(3):
        width = -(-blocks * bits // 8) if packed_zeros else blocks
        zeros = [reshape(ctx, ctx.x(3), [n, width])]

    def body(q: Any, s: Any, zs: list[Any], places: list[Any]) -> Any:
        def element(i: Any, j: Any) -> Any:
            g = places[0](j).astype("int64") if places else te.floordiv(j, block)
            zero = te.const(1 << (bits - 1), dtype)
            if zs:
                zero = (unpack(zs[0], bits, i, g) if packed_zeros else zs[0](i, g)).astype(dtype)
            return (unpack(q, bits, i, j).astype(dtype) - zero) * s(i, g).astype(dtype)

        return te.compute((n, k), element, name="dequantize")

    weight = compute(ctx, "dequantize", body, codes, scales, zeros, [_block_places(ctx, blocks)] if ctx.has(4) else [])
    return add_bias(ctx, matmul(ctx, ctx.x(0), ctx.emit(op.permute_dims(weight, [1, 0]))), 5)


def _block_places(ctx: Context, blocks: int) -> Expr:
    """g_idx, whose entries must be constants inside of the blocks: a kernel reads scales at these places."""
    places = ctx.const(4)
    if places is None or places.min() < 0 or places.max() >= blocks:
        ctx.fail("g_idx that is not constant, or names no block")
    return ctx.literal(places.astype(np.int32), "int32")


# The 16 values that bitsandbytes' codes stand for, as fractions of their block's largest.
_FP4 = np.array([0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4], np.float64)
_NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)


def _matmul_bnb4(ctx: Context) -> Expr:
    """A x B, B [N, K] (its transpose where transB) as 4-bit codes, the high ones first, of the whole flat matrix;
    absmax is the scale of each `block_size` of them."""
    n, k, block = (int(ctx.attr(a)) for a in ("N", "K", "block_size"))
    dtype = ctx.dtype()
    table = _NF4 if int(ctx.attr("quant_type")) else np.concatenate([_FP4, -_FP4])
    values = ctx.emit(ctx.literal(table, dtype))

    def body(q: Any, s: Any, values: Any) -> Any:
        def element(i: Any, j: Any) -> Any:
            flat = i * k + j
            shift = ((1 - te.floormod(flat, 2)) * 4).astype("uint8")
            code = (q(te.floordiv(flat, 2)) >> shift) & te.const(15, "uint8")
            return values(code.astype("int64")) * s(te.floordiv(flat, block)).astype(dtype)

        return te.compute((n, k), element, name="dequantize")

    codes, scales = (reshape(ctx, ctx.x(i), [product(ctx.shape(i))]) for i in (1, 2))
    weight = compute(ctx, "dequantize", body, codes, scales, values)
    return matmul(ctx, ctx.x(0), permute(ctx, weight, [1, 0]) if ctx.attr("transB", 1) else weight)


# -- quantised operands -----------------------------------------------------------------------------------------
def rescaled(ctx: Context, acc: Expr, row: Expr, column: Expr) -> Expr:
    """int32 accumulators as float32, times a scale for A and one, or one a column, for B."""
    return elementwise(
        ctx, "rescale", lambda v, a, b: v.astype("float32") * (a * b), acc, reshape(ctx, row, ()), column
    )


def _matmul_integer_to_float(ctx: Context) -> Expr:
    """A, B, a_scale, b_scale, a_zero, b_zero, bias."""
    return add_bias(ctx, rescaled(ctx, integer_product(ctx, 0, 1, 4, 5), ctx.x(2), ctx.x(3)), 6)


def _dynamic_quantize_matmul(ctx: Context) -> Expr:
    """A float32, B, b_scale, b_zero, bias: A is quantised to uint8 on the way in."""
    q, a_scale, a_zero = quant.dynamic_quantize(ctx, ctx.x())
    b = centred(ctx, ctx.x(1), ctx.x(3) if ctx.has(3) else None, True)
    acc = matmul(ctx, centred(ctx, q, a_zero, False), b, "int32")
    return add_bias(ctx, rescaled(ctx, acc, a_scale, ctx.x(2)), 4)


def _q_gemm(ctx: Context) -> Expr:
    """alpha * A x B + C, quantised where the output has a scale, else float32.

    A, a_scale, a_zero, B, b_scale, b_zero, int32 C of scale alpha * a_scale * b_scale, y_scale, y_zero.
    """
    sides = []
    for i, transposed in ((0, "transA"), (3, "transB")):
        x = permute(ctx, ctx.x(i), [1, 0]) if ctx.attr(transposed, 0) else ctx.x(i)
        sides.append(centred(ctx, x, ctx.x(i + 2) if ctx.has(i + 2) else None, i > 0))
    a, b = sides
    acc = add_bias(ctx, matmul(ctx, a, b, "int32"), 6)
    row = scale(ctx, reshape(ctx, ctx.x(1), ()), float(ctx.attr("alpha", 1.0)))
    if not ctx.has(8):
        return rescaled(ctx, acc, row, ctx.x(4))
    out = reshape(ctx, ctx.x(7), ())
    factor = elementwise(ctx, "factor", lambda a, b, y: a * b / y, row, ctx.x(4), out)
    return quant.requantize(ctx, acc, factor, reshape(ctx, ctx.x(8), ()), ctx.dtype(8))


# -- fused ------------------------------------------------------------------------------------------------------
def _fused_matmul(ctx: Context) -> Expr:
    """alpha * A x B, with matrices transposed (trans*), and the first dimension moved before the last (transBatch*)."""
    operands = []
    for i, name in enumerate("AB"):
        x, rank = ctx.x(i), ctx.rank(i)
        if ctx.attr(f"transBatch{name}", 0):
            x = permute(ctx, x, [*range(1, rank - 1), 0, rank - 1])
        operands.append(transpose_last(ctx, x) if ctx.attr(f"trans{name}", 0) and rank > 1 else x)
    return scale(ctx, matmul(ctx, *operands), float(ctx.attr("alpha", 1.0)))


def _activated(ctx: Context, y: Expr) -> Expr:
    """The activation that FusedGemm or FusedConv names."""
    name = ctx.attr("activation", "")
    name = name.decode() if isinstance(name, bytes) else name
    if not name:
        return y
    if name.lower() not in ACTIVATIONS:
        ctx.fail(f"the fused activation {name}")
    named = [ctx.attr(f"activation_{p}") for p in ("alpha", "beta")]
    parameters = ctx.attr("activation_params") or [p for p in named if p is not None]
    activation = ACTIVATIONS[name.lower()]
    count = len(activation.defaults)
    return elementwise(ctx, "activation", activation(*map(float, list(parameters)[:count])), y)


def _fused_conv(ctx: Context) -> Expr:
    """Conv, plus input 3 where there is one, and an activation."""
    return _activated(ctx, add_bias(ctx, ctx.emit(CONV["Conv"](ctx)), 3))


def _matmul_integer16(ctx: Context) -> Expr:
    return matmul(ctx, cast(ctx, ctx.x(0), "int32"), cast(ctx, ctx.x(1), "int32"), "int32")


RULES: dict[str, Rule] = {
    "MatMulNBits": _matmul_nbits,
    "MatMulBnb4": _matmul_bnb4,
    "MatMulInteger16": _matmul_integer16,
    "MatMulIntegerToFloat": _matmul_integer_to_float,
    "DynamicQuantizeMatMul": _dynamic_quantize_matmul,
    "QGemm": _q_gemm,
    "FusedMatMul": _fused_matmul,
    "TransposeMatMul": _fused_matmul,
    "FusedGemm": lambda ctx: _activated(ctx, ctx.emit(MATMUL["Gemm"](ctx))),
    "FusedConv": _fused_conv,
}
