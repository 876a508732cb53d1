"""com.microsoft's attention: GroupQueryAttention, MultiHeadAttention and Attention."""

from __future__ import annotations

from typing import Any

from llmc.graph import Dim
from llmc.ops.attention import Scores, Sight, attend, merge_heads, split_heads
from llmc.ops.context import Context, Rule
from llmc.ops.contrib_cache import codec
from llmc.ops.matmul import add_bias, matmul
from llmc.ops.nn import rms_norm
from llmc.ops.rotary import angles, rotate
from llmc.ops.scalar import select
from llmc.ops.tensor import (
    broadcast_shape,
    cast,
    compute,
    concat,
    dtype_of,
    elementwise,
    full,
    permute,
    reshape,
    shape_of,
    simplify,
    take_slice,
)
from llmc.tvm_shim import Expr, relax, te, tirx

op = relax.op


# -- com.microsoft GroupQueryAttention ---------------------------------------------------------------------------
def _group_query_attention(ctx: Context) -> tuple[Expr | None, ...]:
    """Inputs q (or packed qkv), k, v, past k, past v, seqlens_k, total_sequence_length, cos, sin, position_ids,
    attention_bias, head_sink, k_scale, v_scale, the weights of norms of q and k, query_seqlens. seqlens_k[b] + 1 keys
    are valid in batch b after the new ones were appended, right behind those of the past: shorter sequences are padded
    at their right. Outputs are the result, the present k and v, and the products of queries and keys."""
    if ctx.attr("sliding_window_cache", 0):
        ctx.fail("sliding_window_cache, a cache that drops what its window has passed")
    heads, kv_heads = int(ctx.attr("num_heads")), int(ctx.attr("kv_num_heads"))
    q, k, v = _unpack(ctx, heads, kv_heads)
    _, _, tokens, head_dim = shape_of(q)
    past = ctx.shape(3)[2] if ctx.has(3) else 0
    if ctx.has(3):
        ctx.unify(shape_of(q)[0], ctx.shape(3)[0])
    if ctx.has(14):
        q = rms_norm(ctx, q, ctx.x(14), 3, _head_epsilon(ctx, "q_norm_epsilon"))
    if ctx.has(15):
        k = rms_norm(ctx, k, ctx.x(15), 3, _head_epsilon(ctx, "k_norm_epsilon"))
    total = simplify(past + tokens)
    declared = ctx.value(6) if ctx.has(6) else None
    if declared is not None and not ctx.has(16):  # with query_seqlens it is a limit only
        ctx.unify(declared.reshape(-1)[0], total)
    first = _past_lengths(ctx, cast(ctx, ctx.x(5), "int64"), tokens)
    if ctx.attr("do_rotary", 0):
        interleaved = bool(ctx.attr("rotary_interleaved", 0))
        ids = cast(ctx, ctx.x(9), "int64") if ctx.has(9) else None
        cos, sin = (angles(ctx, ctx.x(i), first, tokens, ids) for i in (7, 8))
        q, k = rotate(ctx, q, cos, sin, interleaved), rotate(ctx, k, cos, sin, interleaved)
    codecs = codec(ctx, "k_quant_type", 12), codec(ctx, "v_quant_type", 13)
    presents = [x if c is None else c.encode(ctx, x) for x, c in zip((k, v), codecs, strict=True)]
    if ctx.has(3):
        presents = [append(ctx, ctx.x(i), x, first) for i, x in zip((3, 4), presents, strict=True)]
    k, v = (x if c is None else c.decode(ctx, x) for x, c in zip(presents, codecs, strict=True))
    window = int(ctx.attr("local_window_size", -1))
    scores = attend(
        ctx,
        q,
        k,
        v,
        scale=float(ctx.attr("scale", 0.0)) or int(head_dim) ** -0.5,
        softcap=float(ctx.attr("softcap", 0.0)),
        bias=ctx.x(10) if ctx.has(10) else None,
        sight=Sight(first, causal=bool(ctx.attr("causal", 1)), left=window - 1 if window > 0 else -1),
        sink=_sink(ctx, heads),
    )
    return merge_heads(ctx, scores.out), *presents, _products(ctx, scores)


def _products(ctx: Context, scores: Scores) -> Expr | None:
    """What the attribute qk_output asks for: the scores before (1) or after (2) the softmax, 0 where hidden."""
    mode = int(ctx.attr("qk_output", 0))
    if not mode:
        return None
    if mode == 2:
        return cast(ctx, scores.weights, ctx.dtype())
    lowest, zero = te.min_value("float32"), te.const(0.0, "float32")
    seen = elementwise(ctx, "seen", lambda x: select(x < lowest, zero, x), scores.biased)
    return cast(ctx, seen, ctx.dtype())


def _head_epsilon(ctx: Context, name: str) -> float:
    return float(ctx.attr(name, ctx.attr("qk_norm_epsilon", 1e-6)))


def _sink(ctx: Context, heads: int) -> Expr | None:
    if ctx.has(11):
        return cast(ctx, ctx.x(11), "float32")
    return full(ctx, [heads], 0.0, "float32") if ctx.attr("smooth_softmax", 0) == 1 else None


def _unpack(ctx: Context, heads: int, kv_heads: int) -> tuple[Expr, Expr, Expr]:
    """q, k, v as [B, heads, S, D], from three inputs or from one that holds them side by side."""
    if ctx.has(1):
        for i in (1, 2):
            ctx.unify(ctx.shape(0)[0], ctx.shape(i)[0])
        return (
            split_heads(ctx, ctx.x(0), heads),
            split_heads(ctx, ctx.x(1), kv_heads),
            split_heads(ctx, ctx.x(2), kv_heads),
        )
    packed = split_heads(ctx, ctx.x(0), heads + 2 * kv_heads)
    starts = ((0, heads), (heads, kv_heads), (heads + kv_heads, kv_heads))
    q, k, v = (take_slice(ctx, packed, 1, start, size) for start, size in starts)
    return q, k, v


def _past_lengths(ctx: Context, last: Expr, tokens: Dim) -> Expr:
    """[B] int64: tokens in the cache before this call; 0 in a first call, whose rows may be shorter than `tokens`.

    Input 16 says how many of the new tokens are valid, where not all are.
    """
    last = reshape(ctx, last, [_elements(last)])
    if ctx.has(16):
        return elementwise(ctx, "past_lengths", lambda n, q: n + 1 - q, last, cast(ctx, ctx.x(16), "int64"))

    def body(n: Any, out: list[Any], s: Any) -> Any:
        return te.compute(out, lambda b: te.max(n(b) + 1 - s, te.const(0, "int64")), name="past_lengths")

    return compute(ctx, "past_lengths", body, last, list(shape_of(last)), tokens)


def _elements(x: Expr) -> Dim:
    total: Dim = 1
    for d in shape_of(x):
        total = total * d
    return simplify(total)


def append(ctx: Context, past: Expr, new: Expr, first: Expr) -> Expr:
    """past [B, KV, P, D] with new [B, KV, S, D] written from position first[b] on -> [B, KV, P + S, D];
    zeros behind."""
    b, kv, p, d = shape_of(past)
    s = shape_of(new)[2]

    def body(old: Any, fresh: Any, start: Any, out: list[Any], p: Any, s: Any) -> Any:
        def element(b: Any, h: Any, j: Any, d: Any) -> Any:
            i = j - start(b)
            kept = te.if_then_else(tirx.all(i < 0, j < p), old(b, h, j, d), te.const(0, old.dtype))
            return te.if_then_else(tirx.all(i >= 0, i < s), fresh(b, h, i, d), kept)

        return te.compute(out, element, name="append")

    return compute(ctx, "append", body, past, new, first, [b, kv, simplify(p + s), d], p, s)


# -- com.microsoft MultiHeadAttention and Attention --------------------------------------------------------------
def _multi_head_attention(ctx: Context) -> tuple[Expr | None, ...]:
    """Inputs query, key, value, bias, key_padding_mask, attention_bias, past key, past value.

    query is [B, S, H*D]; or it holds all three as [B, S, H, 3, D], or key holds two as [B, T, H, 2, D]; key and value
    may come with their heads split, [B, H, T, D].
    """
    if ctx.has(8) or ctx.has(9):
        ctx.fail("shared key/value buffers and beam search (past_sequence_length, cache_indirection)")
    heads = int(ctx.attr("num_heads"))
    parts = _query_key_value(ctx, heads)
    if ctx.has(3):
        parts = _add_head_bias(ctx, parts, ctx.x(3), heads)
    past = (ctx.x(6), ctx.x(7)) if ctx.has(6) else None
    return _masked_attention(ctx, parts, past, 4, ctx.x(5) if ctx.has(5) else None)


def _query_key_value(ctx: Context, heads: int) -> list[Expr]:
    """q, k, v as [B, H, tokens, D]."""
    if ctx.rank(0) == 5:
        return _side_by_side(ctx, ctx.x(0), 3)
    q = split_heads(ctx, ctx.x(0), heads)
    if ctx.rank(1) == 5:
        return [q, *_side_by_side(ctx, ctx.x(1), 2)]
    return [q, *(ctx.x(i) if ctx.rank(i) == 4 else split_heads(ctx, ctx.x(i), heads) for i in (1, 2))]


def _side_by_side(ctx: Context, x: Expr, n: int) -> list[Expr]:
    """[B, S, H, n, D] -> n tensors [B, H, S, D]."""
    b, s, h, _, d = shape_of(x)
    pieces = (reshape(ctx, take_slice(ctx, x, 3, i, 1), [b, s, h, d]) for i in range(n))
    return [permute(ctx, p, [0, 2, 1, 3]) for p in pieces]


def _add_head_bias(ctx: Context, parts: list[Expr], bias: Expr, heads: int) -> list[Expr]:
    """bias [q columns, k columns, v columns] added to the heads."""
    result, start = [], 0
    for x in parts:
        d = int(shape_of(x)[3])
        own = reshape(ctx, take_slice(ctx, bias, 0, start, heads * d), [heads, 1, d])
        result.append(ctx.emit(op.add(x, own)))
        start += heads * d
    return result


def _masked_attention(
    ctx: Context, parts: list[Expr], past: tuple[Expr, Expr] | None, mask: int, bias: Expr | None = None
) -> tuple[Expr, Expr, Expr]:
    """(out [B, S, H*Dv], present k, present v).

    Input `mask` hides keys: [B, T] or [B, S, T] with 0, [B] with lengths, [2 * B] with ends and then first places.
    """
    q, k, v = parts
    first: Dim = 0
    if past is not None:
        first = shape_of(past[0])[2]
        k, v = concat(ctx, [past[0], k], 2), concat(ctx, [past[1], v], 2)
    length = None
    if ctx.has(mask) and ctx.rank(mask) == 1:
        batch = shape_of(q)[0]
        ends = cast(ctx, ctx.x(mask), "int64")
        if ctx.emitter.same(ctx.shape(mask)[0], simplify(batch * 2)):
            bias = _add(ctx, _hide_before(ctx, take_slice(ctx, ends, 0, batch, batch), shape_of(k)[2]), bias)
            ends = take_slice(ctx, ends, 0, 0, batch)
        ctx.unify(shape_of(ends)[0], batch)
        length = ends
    elif ctx.has(mask):
        bias = _add(ctx, _hide_keys(ctx, ctx.x(mask), shape_of(k)[2]), bias)
    scale = float(ctx.attr("scale", 0.0)) or int(shape_of(q)[3]) ** -0.5
    sight = Sight(first, causal=bool(ctx.attr("unidirectional", 0)), length=length)
    return merge_heads(ctx, attend(ctx, q, k, v, scale=scale, bias=bias, sight=sight).out), k, v


def _add(ctx: Context, hidden: Expr, bias: Expr | None) -> Expr:
    """The bias of hidden keys, and another one where there is one."""
    if bias is None:
        return hidden
    broadcast_shape(ctx, shape_of(hidden), shape_of(bias))
    return ctx.emit(op.add(hidden, cast(ctx, bias, "float32")))


def _low(ctx: Context) -> Any:
    return te.const(float(ctx.attr("mask_filter_value", -10000.0)), "float32")


def _hide_keys(ctx: Context, mask: Expr, total: Dim) -> Expr:
    """An additive bias [B, 1, 1 or S, T] from an integer mask [B, T] or [B, S, T]."""
    shape = shape_of(mask)
    if len(shape) > 3:
        ctx.fail("a mask of rank 4")
    ctx.unify(shape[-1], total)
    wide = reshape(ctx, mask, [shape[0], 1, *([1] if len(shape) == 2 else []), *shape[1:]])
    low, zero = _low(ctx), te.const(0.0, "float32")
    return elementwise(ctx, "key_bias", lambda m: select(m == te.const(0, dtype_of(mask)), low, zero), wide)


def _hide_before(ctx: Context, starts: Expr, total: Dim) -> Expr:
    """An additive bias [B, 1, 1, T] that hides the keys before starts [B]."""
    low, zero = _low(ctx), te.const(0.0, "float32")

    def body(starts: Any, out: list[Any]) -> Any:
        return te.compute(out, lambda b, h, i, j: select(j < starts(b), low, zero), name="key_bias")

    return compute(ctx, "key_bias", body, starts, [shape_of(starts)[0], 1, 1, total])


def _packed_attention(ctx: Context) -> tuple[Expr | None, ...]:
    """com.microsoft Attention: input [B, S, E], weights [E, q + k + v columns], bias, mask, past [2, B, H, P, D],
    attention bias."""
    y = add_bias(ctx, matmul(ctx, ctx.x(0), ctx.x(1)), 2)
    return from_projection(ctx, y, mask=3, past=4, bias=ctx.x(5) if ctx.has(5) else None)


def from_projection(
    ctx: Context, y: Expr, *, mask: int, past: int, bias: Expr | None = None
) -> tuple[Expr | None, ...]:
    """(out, present [2, B, H, T, D]) of the projections y [B, S, q + k + v columns]; inputs `mask` and `past`."""
    if ctx.attr("do_rotary", 0) or ctx.attr("past_present_share_buffer", 0):
        ctx.fail("do_rotary and past_present_share_buffer")
    heads, columns = int(ctx.attr("num_heads")), int(shape_of(y)[2])
    sizes = [int(s) for s in ctx.attr("qkv_hidden_sizes") or [columns // 3] * 3]
    starts = (0, sizes[0], sizes[0] + sizes[1])
    parts = [split_heads(ctx, take_slice(ctx, y, 2, b, n), heads) for b, n in zip(starts, sizes, strict=True)]
    pair = None
    if ctx.has(past):
        pair = tuple(reshape(ctx, take_slice(ctx, ctx.x(past), 0, i, 1), ctx.shape(past)[1:]) for i in (0, 1))
    out, k, v = _masked_attention(ctx, parts, pair, mask, bias)
    if len(ctx.node.outputs) < 2 or not ctx.node.outputs[1]:
        return out, None
    return out, concat(ctx, [reshape(ctx, x, [1, *shape_of(x)]) for x in (k, v)], 0)


RULES: dict[str, Rule] = {
    "GroupQueryAttention": _group_query_attention,
    "MultiHeadAttention": _multi_head_attention,
    "Attention": _packed_attention,
}
