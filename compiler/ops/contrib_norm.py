"""com.microsoft's normalisations: with residual additions, gates, branches and embeddings before them."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmc.ops.context import Context, Rule
from llmc.ops.gather import rows
from llmc.ops.nn import layer_norm, rms_norm
from llmc.ops.quant import dequantize
from llmc.ops.scalar import const, sigmoid
from llmc.ops.tensor import broadcast_shape, cast, elementwise, full, product, reshape, shape_of, simplify, take_slice
from llmc.tvm_shim import Expr, relax

op = relax.op


# -- with a residual --------------------------------------------------------------------------------------------
def _skip(ctx: Context, bias_at: int) -> Expr:
    """input + skip (+ bias); skip may lack the batch dimension or have 1 there."""
    broadcast_shape(ctx, ctx.shape(0), ctx.shape(1))
    total = ctx.emit(op.add(ctx.x(0), ctx.x(1)))
    return ctx.emit(op.add(total, ctx.x(bias_at))) if ctx.has(bias_at) else total


def _simplified(ctx: Context) -> tuple[Expr | None, ...]:
    axis = ctx.axis(int(ctx.attr("axis", -1)), ctx.rank())
    return (rms_norm(ctx, ctx.x(0), ctx.x(1), axis, float(ctx.attr("epsilon", 1e-5))), None)


def _skip_simplified(ctx: Context) -> tuple[Expr | None, ...]:
    """(y, None, None, input + skip + bias)."""
    total = _skip(ctx, 3)
    y = rms_norm(ctx, total, ctx.x(2), ctx.rank() - 1, float(ctx.attr("epsilon", 1e-5)))
    return y, None, None, total


def _skip_layer_norm(ctx: Context) -> tuple[Expr | None, ...]:
    """(y, mean, 1 / standard deviation, input + skip + bias)."""
    total = _skip(ctx, 4)
    beta = ctx.x(3) if ctx.has(3) else None
    parts = layer_norm(ctx, total, ctx.x(2), beta, ctx.rank() - 1, float(ctx.attr("epsilon", 1e-12)))
    return *parts, total


# -- by groups of the last axis ---------------------------------------------------------------------------------
def _gated_rms(ctx: Context) -> Expr:
    """RMS norm of each group of C elements of x [..., H * C], scale [C], times the activation of a gate like x."""
    name = ctx.attr("activation", "silu")
    name = name.decode() if isinstance(name, bytes) else name
    if name not in ("silu", "swish", "sigmoid"):
        ctx.fail(f"the gate activation {name}")
    shape, dtype = ctx.shape(), ctx.dtype()
    each = ctx.shape(1)[0]
    grouped = [*shape[:-1], simplify(shape[-1] // each), each]
    x, gate = (reshape(ctx, cast(ctx, ctx.x(i), "float32"), grouped) for i in (0, 2))
    weight = cast(ctx, ctx.x(1), "float32")
    y = rms_norm(ctx, x, weight, len(shape), float(ctx.attr("epsilon", 1e-5)))

    def gated(y: Any, z: Any) -> Any:
        return (y * (sigmoid(z) if name == "sigmoid" else z * sigmoid(z))).astype(dtype)

    return reshape(ctx, elementwise(ctx, "gate", gated, y, gate), shape)


def _branchwise_rms(ctx: Context) -> Expr:
    """RMS norm of each branch of x [..., C, H], or [..., C * H] with num_branches; scale [C * H], [C, H] or [H]."""
    shape, dtype = ctx.shape(), ctx.dtype()
    branches, x = int(ctx.attr("num_branches", 0)), cast(ctx, ctx.x(), "float32")
    if branches:
        x = reshape(ctx, x, [*shape[:-1], branches, simplify(shape[-1] // branches)])
    inner = shape_of(x)[-2:]
    weight = ctx.literal(np.ones(1), "float32")
    if ctx.has(1):
        whole = ctx.rank(1) == 2 or ctx.emitter.same(ctx.shape(1)[0], product(inner))
        weight = cast(ctx, ctx.x(1), "float32")
        weight = reshape(ctx, weight, inner) if whole else weight
    y = rms_norm(ctx, x, weight, len(shape_of(x)) - 1, float(ctx.attr("epsilon", 1e-6)))
    return reshape(ctx, cast(ctx, y, dtype), shape)


# -- of embeddings ----------------------------------------------------------------------------------------------
def _embed_layer_norm(ctx: Context) -> tuple[Expr | None, ...]:
    """Inputs ids, segment ids, word, position and segment tables, gamma, beta, mask, position ids.

    (y [B, S, E], mask index [B], the sum before the norm).
    """
    ids, tokens = ctx.x(0), ctx.shape(0)[1]
    total = rows(ctx, ctx.x(2), ids)
    if ctx.has(8):
        total = ctx.emit(op.add(total, rows(ctx, ctx.x(3), ctx.x(8))))
    else:
        total = ctx.emit(op.add(total, take_slice(ctx, ctx.x(3), 0, 0, tokens)))
    if ctx.has(1):
        total = ctx.emit(op.add(total, rows(ctx, ctx.x(4), ctx.x(1))))
    y, _, _ = layer_norm(ctx, total, ctx.x(5), ctx.x(6), 2, float(ctx.attr("epsilon", 1e-12)))
    return y, _mask_index(ctx), total


def _mask_index(ctx: Context) -> Expr | None:
    """int32 [B]: how many tokens the mask, input 7, keeps; 0 without one."""
    if not ctx.node.outputs[1:2] or not ctx.node.outputs[1]:
        return None
    if not ctx.has(7):
        return full(ctx, [ctx.shape(0)[0]], 0, "int32")
    kept = elementwise(ctx, "kept", lambda m: (m == const(m, 1)).astype("int32"), ctx.x(7))
    return ctx.emit(op.sum(kept, [1]))


def _q_embed_layer_norm(ctx: Context) -> tuple[Expr | None, ...]:
    """EmbedLayerNormalization with 8-bit tables; inputs 8 to 12 are their scales and 13 to 17 their zero points."""

    def real(i: int, q: Expr) -> Expr:
        """Values of table `i`; the scale and the zero point of table 2 are inputs 8 and 13, and so on."""
        scale, zero = (reshape(ctx, ctx.x(i + offset), ()) for offset in (6, 11))
        return dequantize(ctx, q, scale, zero, "float32")

    total = real(2, rows(ctx, ctx.x(2), ctx.x(0)))
    position = take_slice(ctx, ctx.x(3), 0, 0, ctx.shape(0)[1])
    total = ctx.emit(op.add(total, real(3, position)))
    if ctx.has(1):
        total = ctx.emit(op.add(total, real(4, rows(ctx, ctx.x(4), ctx.x(1)))))
    gamma, beta = real(5, ctx.x(5)), real(6, ctx.x(6))
    y, _, _ = layer_norm(ctx, total, gamma, beta, 2, float(ctx.attr("epsilon", 1e-12)))
    return y, _mask_index(ctx)


# onnxruntime accepts this one in the standard domain too
STANDARD: dict[str, Rule] = {"SimplifiedLayerNormalization": _simplified}
RULES: dict[str, Rule] = {
    "SimplifiedLayerNormalization": _simplified,
    "SkipSimplifiedLayerNormalization": _skip_simplified,
    "SkipLayerNormalization": _skip_layer_norm,
    "GatedRMSNorm": _gated_rms,
    "BranchwiseRMSNorm": _branchwise_rms,
    "EmbedLayerNormalization": _embed_layer_norm,
    "QEmbedLayerNormalization": _q_embed_layer_norm,
}
