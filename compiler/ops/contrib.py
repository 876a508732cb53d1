"""Operators of the com.microsoft domain, as onnxruntime defines them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmc.ops import attention_ms, conv, quant, rotary
from llmc.ops.context import Context, Rule
from llmc.ops.gather import rows
from llmc.ops.matmul import RULES as MATMUL
from llmc.ops.matmul import add_bias, centred, integer_product, matmul, scale, transpose_last
from llmc.ops.nn import layer_norm, rms_norm
from llmc.ops.scalar import gelu, gelu_tanh, select, sigmoid, tanh
from llmc.ops.tensor import (
    broadcast_shape,
    cast,
    compute,
    elementwise,
    full,
    index_of,
    reshape,
    simplify,
    take_slice,
)
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


def _skip_layer_norm(ctx: Context) -> tuple[Expr | None, ...]:
    """(y, mean, 1 / standard deviation, input + skip + bias)."""
    total = _skip(ctx, 4)
    beta = ctx.x(3) if ctx.has(3) else None
    parts = layer_norm(ctx, total, ctx.x(2), beta, ctx.rank() - 1, float(ctx.attr("epsilon", 1e-12)))
    return *parts, total


def _embed_layer_norm(ctx: Context) -> tuple[Expr | None, ...]:
    """Inputs ids, segment ids, word, position and segment tables, gamma, beta, mask, position ids."""
    ids, tokens = ctx.x(0), ctx.shape(0)[1]
    total = rows(ctx, ctx.x(2), ids)
    if ctx.has(8):
        total = ctx.emit(op.add(total, rows(ctx, ctx.x(3), ctx.x(8))))
    else:
        total = ctx.emit(op.add(total, take_slice(ctx, ctx.x(3), 0, 0, tokens)))
    if ctx.has(1):
        total = ctx.emit(op.add(total, rows(ctx, ctx.x(4), ctx.x(1))))
    y, _, _ = layer_norm(ctx, total, ctx.x(5), ctx.x(6), 2, float(ctx.attr("epsilon", 1e-12)))
    mask_index = None
    if len(ctx.node.outputs) > 1 and ctx.node.outputs[1]:
        mask = cast(ctx, ctx.x(7), "int32") if ctx.has(7) else full(ctx, [*ctx.shape(0)], 0, "int32")
        mask_index = ctx.emit(op.sum(mask, [1]))
    return y, mask_index, total


# -- activations ------------------------------------------------------------------------------------------------
def _biased(ctx: Context, i: int = 1) -> Expr:
    return add_bias(ctx, ctx.x(), i)


def _quick_gelu(ctx: Context) -> Expr:
    alpha = te.const(float(ctx.attr("alpha", 1.702)), ctx.dtype())
    return elementwise(ctx, "quick_gelu", lambda x: x * sigmoid(alpha * x), ctx.x())


def _bias_split_gelu(ctx: Context) -> Expr:
    """The first half of x + bias times the GELU of the second."""
    x, axis = _biased(ctx), ctx.rank() - 1
    half = simplify(ctx.shape()[-1] // 2)
    left, right = (take_slice(ctx, x, axis, start, half) for start in (0, half))
    return elementwise(ctx, "split_gelu", lambda a, b: a * gelu(b), left, right)


def _activated(ctx: Context, y: Expr) -> Expr:
    """The activation that FusedGemm or FusedConv names."""
    name = ctx.attr("activation", "")
    name = name.decode() if isinstance(name, bytes) else name
    parameters = list(ctx.attr("activation_params") or [])
    alpha = float(ctx.attr("activation_alpha", parameters[0] if parameters else 0.01))
    slope, zero = te.const(alpha, ctx.dtype()), te.const(0, ctx.dtype())
    functions = {
        "": lambda x: x,
        "Relu": lambda x: te.max(x, zero),
        "LeakyRelu": lambda x: select(x < zero, slope * x, x),
        "Tanh": tanh,
        "Sigmoid": sigmoid,
    }
    if name not in functions:
        ctx.fail(f"the fused activation {name}")
    return elementwise(ctx, "activation", functions[name], y) if name else y


def _fused_conv(ctx: Context) -> Expr:
    y = ctx.emit(conv.RULES["Conv"](ctx))
    return _activated(ctx, ctx.emit(op.add(y, ctx.x(3))) if ctx.has(3) else y)


# -- matrix products --------------------------------------------------------------------------------------------
def _fused_matmul(ctx: Context) -> Expr:
    if ctx.attr("transBatchA", 0) or ctx.attr("transBatchB", 0):
        ctx.fail("transposed batch dimensions")
    a, b = (transpose_last(ctx, ctx.x(i)) if ctx.attr(t, 0) else ctx.x(i) for i, t in ((0, "transA"), (1, "transB")))
    return scale(ctx, matmul(ctx, a, b), float(ctx.attr("alpha", 1.0)))


def _rescaled(ctx: Context, acc: Expr, row: Expr, column: Expr) -> Expr:
    """int32 accumulators as float32, times a scale for A and one, or one a column, for B."""
    return elementwise(
        ctx, "rescale", lambda v, a, b: v.astype("float32") * (a * b), acc, reshape(ctx, row, ()), column
    )


def _matmul_integer_to_float(ctx: Context) -> Expr:
    """A, B, a_scale, b_scale, a_zero, b_zero, bias."""
    return add_bias(ctx, _rescaled(ctx, integer_product(ctx, 0, 1, 4, 5), ctx.x(2), ctx.x(3)), 6)


def _dynamic_quantize_matmul(ctx: Context) -> Expr:
    """A float32, B, b_scale, b_zero, bias: A is quantised to uint8 on the way in."""
    q, a_scale, a_zero = quant.dynamic_quantize(ctx, ctx.x())
    b = centred(ctx, ctx.x(1), ctx.x(3) if ctx.has(3) else None, True)
    acc = matmul(ctx, centred(ctx, q, a_zero, False), b, "int32")
    return add_bias(ctx, _rescaled(ctx, acc, a_scale, ctx.x(2)), 4)


# -- quantised tensors ------------------------------------------------------------------------------------------
def _gather_block_quantized(ctx: Context) -> Expr:
    """Rows of a table quantised in blocks along one axis. uint8 data hold 8 / bits codes a byte, low bits first,
    along the last axis, around 2**(bits - 1); int4 and uint4 data have a zero point of 0 where none is given."""
    bits, block = int(ctx.attr("bits", 4)), int(ctx.attr("block_size", 128))
    packed = ctx.dtype() == "uint8" and bits < 8
    data = list(ctx.shape())
    if packed:
        data[-1] = simplify(data[-1] * (8 // bits))
    axis = ctx.axis(int(ctx.attr("gather_axis", 0)), len(data))
    along = ctx.axis(int(ctx.attr("quantize_axis", 1)), len(data))
    index, dtype = ctx.shape(1), ctx.dtype(2)
    default = 1 << (bits - 1) if ctx.dtype() == "uint8" else 0
    zeros = [quant.widened(ctx, 3)] if ctx.has(3) else []

    def code(t: Any, i: Any) -> Any:
        if not packed:
            return t(*i).astype("int32")
        per = 8 // bits
        shift = (te.floormod(i[-1], per) * bits).astype("uint8")
        byte = t(*i[:-1], te.floordiv(i[-1], per))
        return ((byte >> shift) & te.const((1 << bits) - 1, "uint8")).astype("int32")

    def body(x: Any, indices: Any, s: Any, zs: list[Any], out: list[Any], size: Any) -> Any:
        def element(*o: Any) -> Any:
            place = index_of(indices(*o[axis : axis + len(index)]).astype("int64"), size)
            i = (*o[:axis], place, *o[axis + len(index) :])
            g = (*i[:along], te.floordiv(i[along], block), *i[along + 1 :])
            zero = code(zs[0], g) if zs else te.const(default, "int32")
            return (code(x, i) - zero).astype(dtype) * s(*g)

        return te.compute(out, element, name="gather_dequantize")

    out = [*data[:axis], *index, *data[axis + 1 :]]
    return compute(ctx, "gather_dequantize", body, quant.widened(ctx, 0), ctx.x(1), ctx.x(2), zeros, out, data[axis])


def _qlinear(name: str, f: Callable[..., Any], operands: int) -> Rule:
    """An elementwise operator on quantised tensors: (value, scale, zero) for each operand, then the output's pair."""

    def rule(ctx: Context) -> Expr:
        values = []
        for i in range(0, 3 * operands, 3):
            zero = ctx.x(i + 2) if ctx.has(i + 2) else None
            values.append(quant.dequantize(ctx, ctx.x(i), ctx.x(i + 1), zero, "float32"))
        y, at = elementwise(ctx, name, lambda *x: f(ctx, *x), *values), 3 * operands
        return quant.quantize(ctx, y, ctx.x(at), ctx.x(at + 1) if ctx.has(at + 1) else None, ctx.dtype())

    return rule


def _leaky(ctx: Context, x: Any) -> Any:
    return select(x < te.const(0.0, "float32"), te.const(float(ctx.attr("alpha", 0.01)), "float32") * x, x)


# onnxruntime accepts this one in the standard domain too
STANDARD: dict[str, Rule] = {"SimplifiedLayerNormalization": _simplified}
RULES: dict[str, Rule] = {
    **attention_ms.RULES,
    **rotary.MICROSOFT,
    "MatMulNBits": _matmul_nbits,
    "SimplifiedLayerNormalization": _simplified,
    "SkipSimplifiedLayerNormalization": _skip_simplified,
    "SkipLayerNormalization": _skip_layer_norm,
    "EmbedLayerNormalization": _embed_layer_norm,
    "Gelu": lambda ctx: elementwise(ctx, "gelu", gelu, ctx.x()),
    "BiasGelu": lambda ctx: elementwise(ctx, "gelu", gelu, _biased(ctx)),
    "FastGelu": lambda ctx: elementwise(ctx, "gelu_tanh", gelu_tanh, _biased(ctx)),
    "QuickGelu": _quick_gelu,
    "BiasSplitGelu": _bias_split_gelu,
    "BiasAdd": lambda ctx: op.add(_biased(ctx), ctx.x(2)),
    "FusedMatMul": _fused_matmul,
    "TransposeMatMul": _fused_matmul,
    "FusedGemm": lambda ctx: _activated(ctx, ctx.emit(MATMUL["Gemm"](ctx))),
    "FusedConv": _fused_conv,
    "MatMulIntegerToFloat": _matmul_integer_to_float,
    "DynamicQuantizeMatMul": _dynamic_quantize_matmul,
    "GatherBlockQuantized": _gather_block_quantized,
    "QuantizeLinear": quant.RULES["QuantizeLinear"],
    "DequantizeLinear": quant.RULES["DequantizeLinear"],
    "QLinearAdd": _qlinear("add", lambda ctx, a, b: a + b, 2),
    "QLinearMul": _qlinear("multiply", lambda ctx, a, b: a * b, 2),
    "QLinearSigmoid": _qlinear("sigmoid", lambda ctx, x: sigmoid(x), 1),
    "QLinearLeakyRelu": _qlinear("leaky_relu", _leaky, 1),
}
