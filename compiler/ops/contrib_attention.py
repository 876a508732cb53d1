"""com.microsoft's rarer forms of attention: of quantised inputs, and rotary positions along three axes."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmc.ops.attention import merge_heads, split_heads
from llmc.ops.attention_ms import from_projection
from llmc.ops.context import Context, Rule
from llmc.ops.contrib_gemm import rescaled
from llmc.ops.matmul import add_bias, integer_product
from llmc.ops.rotary import rotate
from llmc.ops.tensor import compute, index_of, shape_of, simplify
from llmc.tvm_shim import Expr, te


def _q_attention(ctx: Context) -> tuple[Expr | None, ...]:
    """Attention with 8-bit input and weights: x, weights, bias, their scales, mask, their zero points, past."""
    acc = integer_product(ctx, 0, 1, 6, 7)
    y = add_bias(ctx, rescaled(ctx, acc, ctx.x(3), ctx.x(4)), 2)
    return from_projection(ctx, y, mask=5, past=8)


# -- rotary embeddings of images and films ----------------------------------------------------------------------
def _streams(ctx: Context, half: int) -> np.ndarray:
    """For each of `half` angles, which of the three positions (time, height, width) turns it."""
    sections = [int(s) for s in ctx.attr("mrope_section")]
    if sum(sections) != half:
        ctx.fail(f"mrope_section {sections} does not cover {half} angles")
    if not ctx.attr("mrope_layout", 0):
        return np.repeat(np.arange(3), sections)
    streams = np.zeros(half, np.int64)
    for axis in (1, 2):
        streams[axis : sections[axis] * 3 : 3] = axis
    return streams


def _m_rotary(ctx: Context) -> Expr:
    """x [B, S, H*D] or [B, H, S, D], position ids [3, B, S], caches [positions, R]."""
    if ctx.attr("is_packed_batching", 0):
        ctx.fail("packed batching is not supported")
    x, flat = ctx.x(), ctx.rank() == 3
    half = int(ctx.shape(2)[1])
    if flat:
        heads = int(ctx.attr("num_heads", 0)) or int(simplify(ctx.shape()[2] // (2 * half)))
        x = split_heads(ctx, x, heads)
    streams = ctx.emit(ctx.literal(_streams(ctx, half), "int64"))
    batch, tokens = ctx.shape(1)[1:]

    def angles(cache: Expr) -> Expr:
        def body(t: Any, ids: Any, streams: Any, out: list[Any], size: Any) -> Any:
            return te.compute(
                out, lambda b, i, r: t(index_of(ids(streams(r), b, i).astype("int64"), size), r), name="angles"
            )

        return compute(ctx, "angles", body, cache, ctx.x(1), streams, [batch, tokens, half], shape_of(cache)[0])

    y = rotate(ctx, x, angles(ctx.x(2)), angles(ctx.x(3)), bool(ctx.attr("interleaved", 0)))
    return merge_heads(ctx, y) if flat else y


RULES: dict[str, Rule] = {"QAttention": _q_attention, "MRotaryEmbedding": _m_rotary}
