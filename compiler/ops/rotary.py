"""Rotary position embeddings, of ai.onnx and com.microsoft."""

from __future__ import annotations

from typing import Any

from llmc.graph import Dim
from llmc.ops.attention import is_tensor, merge_heads, split_heads
from llmc.ops.context import Context, Rule
from llmc.ops.scalar import select
from llmc.ops.tensor import (
    cast,
    compute,
    dtype_of,
    index_of,
    shape_of,
    simplify,
    take_slice,
)
from llmc.tvm_shim import Expr, relax, te

op = relax.op


# -- rotary embeddings ------------------------------------------------------------------------------------------
def rotate(ctx: Context, x: Expr, cos: Expr, sin: Expr, interleaved: bool) -> Expr:
    """Turn the first 2*R elements of each head of [B, H, S, D] by angles given as cos and sin [B or 1, S, R].

    Pairs are (d, d + R), or (2d, 2d + 1) where interleaved; the elements from 2*R on stay as they are.
    """
    half = int(shape_of(cos)[-1])
    zero = te.const(0, "int64")
    one_batch = isinstance(shape_of(cos)[0], int) and shape_of(cos)[0] == 1

    def body(t: Any, c: Any, s: Any, out: list[Any]) -> Any:
        def element(b: Any, h: Any, i: Any, d: Any) -> Any:
            second = te.floormod(d, 2) == 1 if interleaved else d >= half
            if interleaved:
                pair, partner = te.floordiv(d, 2), select(second, d - 1, d + 1)
            else:
                pair, partner = te.floormod(d, half), select(second, d - half, d + half)
            angle = (zero if one_batch else b, i, pair)
            turned = t(b, h, i, d) * c(*angle) + select(second, t(b, h, i, partner), -t(b, h, i, partner)) * s(*angle)
            return turned if int(out[-1]) == 2 * half else te.if_then_else(d < 2 * half, turned, t(b, h, i, d))

        return te.compute(out, element, name="rotate")

    cos, sin = cast(ctx, cos, dtype_of(x)), cast(ctx, sin, dtype_of(x))
    return compute(ctx, "rotate", body, x, cos, sin, list(shape_of(x)))


def angles(ctx: Context, cache: Expr, first: Expr | Dim, tokens: Dim, ids: Expr | None = None) -> Expr:
    """Rows of a cos or sin cache [positions, R] -> [B or 1, S, R].

    The rows are `ids` [B, S], or first + 0..S-1 where `first` is an int64 tensor [B] or a dimension.
    """
    rows, width = shape_of(cache)
    source = ids if ids is not None else first if is_tensor(first) else None
    batch = shape_of(source)[0] if source is not None else 1
    start = 0 if source is not None else first

    def body(t: Any, out: list[Any], size: Any, start: Any, sources: list[Any]) -> Any:
        def element(b: Any, i: Any, r: Any) -> Any:
            if ids is not None:
                row = sources[0](b, i).astype("int64")
            else:
                row = i + (sources[0](b).astype("int64") if sources else start)
            return t(index_of(row, size), r)

        return te.compute(out, element, name="angles")

    sources = [source] if source is not None else []
    return compute(ctx, "angles", body, cache, [batch, tokens, width], rows, start, sources)


def _rotary(ctx: Context) -> Expr:
    """ai.onnx RotaryEmbedding: X [B, S, H*D] or [B, H, S, D], caches [B, S, R] or [positions, R] with position ids."""
    x = ctx.x()
    flat = ctx.rank() == 3
    if flat:
        x = split_heads(ctx, x, int(ctx.attr("num_heads")))
    cos, sin = ctx.x(1), ctx.x(2)
    if ctx.has(3):
        tokens = shape_of(x)[2]
        cos, sin = (angles(ctx, c, 0, tokens, ctx.x(3)) for c in (cos, sin))
    return _finish_rotary(ctx, x, cos, sin, flat)


def _rotary_ms(ctx: Context) -> Expr:
    """com.microsoft RotaryEmbedding: position ids come second, [B, S] or the single first position [1]."""
    x, cos, sin = ctx.x(), ctx.x(2), ctx.x(3)
    if ctx.attr("is_packed_batching", 0):
        ctx.fail("packed batching is not supported")
    flat = ctx.rank() == 3
    if flat:
        width, partial = ctx.shape()[2], int(ctx.attr("rotary_embedding_dim", 0))
        heads = int(ctx.attr("num_heads", 0)) or int(simplify(width // (2 * shape_of(cos)[1])))
        if partial and not ctx.attr("num_heads", 0):
            ctx.fail("num_heads is required with rotary_embedding_dim")
        x = split_heads(ctx, x, heads)
    tokens = shape_of(x)[2]
    ids = cast(ctx, ctx.x(1), "int64")
    if ctx.rank(1) == 1:
        cos, sin = (angles(ctx, c, ids, tokens) for c in (cos, sin))
    else:
        cos, sin = (angles(ctx, c, 0, tokens, ids) for c in (cos, sin))
    scale = float(ctx.attr("scale", 1.0))
    if scale != 1:
        ctx.fail(f"scale = {scale} is not supported")
    return _finish_rotary(ctx, x, cos, sin, flat)


def _finish_rotary(ctx: Context, x: Expr, cos: Expr, sin: Expr, flat: bool) -> Expr:
    half = int(ctx.attr("rotary_embedding_dim", 0)) // 2
    if half and half != shape_of(cos)[-1]:
        cos, sin = (take_slice(ctx, c, 2, 0, half) for c in (cos, sin))
    y = rotate(ctx, x, cos, sin, bool(ctx.attr("interleaved", 0)))
    return merge_heads(ctx, y) if flat else y


RULES: dict[str, Rule] = {"RotaryEmbedding": _rotary}
MICROSOFT: dict[str, Rule] = {"RotaryEmbedding": _rotary_ms}
