"""Attention and rotary embeddings: ai.onnx's of opset 23 and later, and com.microsoft's.

All forms share one core on [batch, heads, tokens, head_dim] tensors: scaled products, a soft cap, a bias, the limits
of what a row may see, softmax, and the weighted sum. A row that sees nothing gives zeros.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from llmc.graph import Dim
from llmc.ops.context import Context, Rule
from llmc.ops.matmul import matmul, transpose_last
from llmc.ops.tensor import (
    broadcast_shape,
    cast,
    compute,
    concat,
    dtype_of,
    elementwise,
    full,
    index_of,
    permute,
    reshape,
    select,
    shape_of,
    simplify,
    take_slice,
)
from llmc.tvm_shim import Expr, relax, te, tirx

op = relax.op


# -- heads ------------------------------------------------------------------------------------------------------
def split_heads(ctx: Context, x: Expr, heads: int) -> Expr:
    """[B, S, H*D] -> [B, H, S, D]."""
    b, s, width = shape_of(x)
    return permute(ctx, reshape(ctx, x, [b, s, heads, simplify(width // heads)]), [0, 2, 1, 3])


def merge_heads(ctx: Context, x: Expr) -> Expr:
    """[B, H, S, D] -> [B, S, H*D]."""
    b, h, s, d = shape_of(x)
    return reshape(ctx, permute(ctx, x, [0, 2, 1, 3]), [b, s, h * d])


# -- the core ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Sight:
    """What row i of batch b may see of the keys: positions are first[b] + i; None or -1 means no limit.

    `first` is a dimension or an int64 tensor [B]; `length` [B] int64 counts the valid keys.
    """

    first: Expr | Dim = 0
    causal: bool = False
    left: int = -1
    right: int = -1
    length: Expr | None = None

    @property
    def limited(self) -> bool:
        return self.causal or self.left >= 0 or self.right >= 0 or self.length is not None


def hide(ctx: Context, scores: Expr, sight: Sight) -> Expr:
    """Scores [B, H, S, T] with -inf where a row may not look."""
    if not sight.limited:
        return scores
    tensors = [t for t in (sight.first, sight.length) if is_tensor(t)]
    offset = 0 if is_tensor(sight.first) else sight.first

    def body(x: Any, out: list[Any], offset: Any, tensors: list[Any]) -> Any:
        rest = iter(tensors)
        first = next(rest) if is_tensor(sight.first) else None
        length = next(rest) if sight.length is not None else None

        def element(b: Any, h: Any, i: Any, j: Any) -> Any:
            p = i + (first(b) if first is not None else offset)
            limits = [j <= p] if sight.causal else []
            limits += [j >= p - sight.left] if sight.left >= 0 else []
            limits += [j <= p + sight.right] if sight.right >= 0 else []
            limits += [j < length(b)] if length is not None else []
            return select(tirx.all(*limits), x(b, h, i, j), te.min_value("float32") * te.const(2, "float32"))

        return te.compute(out, element, name="hide")

    return compute(ctx, "hide", body, scores, list(shape_of(scores)), offset, tensors)


def is_tensor(x: Any) -> bool:
    return x is not None and not isinstance(x, int) and isinstance(x.ty, relax.TensorType)


def masked_softmax(ctx: Context, scores: Expr, sink: Expr | None = None) -> Expr:
    """Softmax of float32 [B, H, S, T] over T, with zeros where a whole row is -inf.

    `sink` [H] joins each row's sum as one more score that no value belongs to.
    """
    b, h, s, t = shape_of(scores)
    lowest = te.const(-3.0e38, "float32")

    def body(x: Any, rows: list[Any], out: list[Any], sinks: list[Any]) -> Any:
        k, r = te.reduce_axis((0, out[-1]), "k"), te.reduce_axis((0, out[-1]), "r")
        top = te.compute(rows, lambda *i: te.max(x(*i, k), axis=k), name="top")

        def shift(b: Any, h: Any, i: Any) -> Any:
            return te.max(te.max(top(b, h, i), sinks[0](h)) if sinks else top(b, h, i), lowest)

        e = te.compute(out, lambda b, h, i, j: te.exp(x(b, h, i, j) - shift(b, h, i)), name="exp")
        total = te.compute(rows, lambda *i: te.sum(e(*i, r), axis=r), name="total")

        def norm(b: Any, h: Any, i: Any, j: Any) -> Any:
            z = total(b, h, i) + (te.exp(sinks[0](h) - shift(b, h, i)) if sinks else te.const(0, "float32"))
            return e(b, h, i, j) / select(z == te.const(0, "float32"), te.const(1, "float32"), z)

        return te.compute(out, norm, name="softmax")

    return compute(ctx, "softmax", body, scores, [b, h, s], [b, h, s, t], [sink] if sink is not None else [])


@dataclass(frozen=True)
class Scores:
    """The stages of attention scores [B, H, S, T], and the output [B, H, S, Dv]."""

    raw: Expr
    capped: Expr
    biased: Expr
    weights: Expr
    out: Expr


def attend(
    ctx: Context,
    q: Expr,
    k: Expr,
    v: Expr,
    *,
    scale: float,
    softcap: float = 0.0,
    bias: Expr | None = None,
    sight: Sight | None = None,
    sink: Expr | None = None,
) -> Scores:
    """q [B, H, S, D], k [B, KV, T, D], v [B, KV, T, Dv] -> [B, H, S, Dv], computed in float32.

    `bias` broadcasts to [B, H, S, T]: numbers are added, False of a bool one hides. H is a multiple of KV.
    """
    dtype = dtype_of(q)
    q, k, v = (cast(ctx, x, "float32") for x in (q, k, v))
    (b, h, s, d), (_, kv, t, _) = shape_of(q), shape_of(k)
    ctx.unify(t, shape_of(v)[2])
    dv = shape_of(v)[3]
    group = simplify(h // kv)
    grouped = reshape(ctx, q, [b, kv, group, s, d])
    keys = transpose_last(ctx, reshape(ctx, k, [b, kv, 1, t, d]))
    raw = reshape(ctx, matmul(ctx, grouped, keys), [b, h, s, t])
    raw = ctx.emit(op.multiply(raw, ctx.literal(scale, "float32")))
    capped = raw
    if softcap:
        cap = te.const(softcap, "float32")
        capped = elementwise(ctx, "softcap", lambda x: te.tanh(x / cap) * cap, raw)
    biased = capped
    if bias is not None and dtype_of(bias) == "bool":
        hidden = te.min_value("float32") * te.const(2, "float32")
        biased = elementwise(ctx, "mask", lambda m, x: select(m, x, hidden), bias, biased)
    elif bias is not None:
        bias = cast(ctx, bias, "float32")
        broadcast_shape(ctx, shape_of(biased), shape_of(bias))
        biased = ctx.emit(op.add(biased, bias))
    biased = hide(ctx, biased, sight or Sight())
    weights = masked_softmax(ctx, biased, sink)
    mixed = matmul(ctx, reshape(ctx, weights, [b, kv, group, s, t]), reshape(ctx, v, [b, kv, 1, t, dv]))
    out = cast(ctx, reshape(ctx, mixed, [b, h, s, dv]), dtype)
    return Scores(raw, capped, biased, weights, out)


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


# -- ai.onnx Attention ------------------------------------------------------------------------------------------
def _attention(ctx: Context) -> tuple[Expr | None, ...]:
    """Opsets 23, 24 (nonpad_kv_seqlen) and 25 (windows)."""
    q, k, v = ctx.x(0), ctx.x(1), ctx.x(2)
    flat = ctx.rank() == 3
    if flat:
        heads, kv_heads = int(ctx.attr("q_num_heads")), int(ctx.attr("kv_num_heads"))
        q, k, v = split_heads(ctx, q, heads), split_heads(ctx, k, kv_heads), split_heads(ctx, v, kv_heads)
    for x in (k, v):
        ctx.unify(shape_of(q)[0], shape_of(x)[0])
    first: Expr | Dim = 0
    if ctx.has(4):
        first = ctx.shape(4)[2]
        k, v = concat(ctx, [ctx.x(4), k], 2), concat(ctx, [ctx.x(5), v], 2)
    total = shape_of(k)[2]
    length = None
    if ctx.has(6):
        length = cast(ctx, ctx.x(6), "int64")
        if not ctx.has(4):
            first = _before(ctx, length, shape_of(q)[2])
    bias = pad_mask(ctx, ctx.x(3), total) if ctx.has(3) else None
    sight = Sight(
        first,
        bool(ctx.attr("is_causal", 0)),
        int(ctx.attr("left_window_size", -1)),
        int(ctx.attr("right_window_size", -1)),
        length,
    )
    head_dim = int(shape_of(q)[3])
    scale, softcap = ctx.attr("scale"), float(ctx.attr("softcap", 0.0))
    scores = attend(
        ctx, q, k, v, scale=scale if scale is not None else head_dim**-0.5, softcap=softcap, bias=bias, sight=sight
    )
    mode = int(ctx.attr("qk_matmul_output_mode", 0))
    stage = (scores.raw, scores.capped, scores.biased, scores.weights)[mode]
    out = merge_heads(ctx, scores.out) if flat else scores.out
    return out, k, v, cast(ctx, stage, ctx.dtype())


def _before(ctx: Context, length: Expr, tokens: Dim) -> Expr:
    """[B] int64: keys that precede the block of new tokens, length - tokens."""

    def body(n: Any, out: list[Any], s: Any) -> Any:
        return te.compute(out, lambda b: n(b) - s, name="before")

    return compute(ctx, "before", body, length, list(shape_of(length)), tokens)


def pad_mask(ctx: Context, mask: Expr, total: Dim) -> Expr:
    """A mask whose last dimension is a smaller number than the keys hides the rest."""
    shape = list(shape_of(mask))
    if not (isinstance(shape[-1], int) and isinstance(total, int)) or shape[-1] >= total:
        return mask
    shape[-1] = simplify(total - shape[-1])
    dtype = dtype_of(mask)
    rest = full(ctx, shape, False if dtype == "bool" else -math.inf, dtype)
    return concat(ctx, [mask, rest], len(shape) - 1)


# -- com.microsoft GroupQueryAttention ---------------------------------------------------------------------------
def _group_query_attention(ctx: Context) -> tuple[Expr | None, ...]:
    """Inputs q (or packed qkv), k, v, past k, past v, seqlens_k, total_sequence_length, cos, sin, position_ids,
    attention_bias, head_sink. seqlens_k[b] + 1 keys are valid in batch b after the new ones were appended, right
    behind those of the past: shorter sequences are padded at their right."""
    for name in ("k_quant_type", "v_quant_type"):
        if ctx.attr(name, "NONE") not in ("NONE", b"NONE"):
            ctx.fail("quantised key/value caches are not supported")
    heads, kv_heads = int(ctx.attr("num_heads")), int(ctx.attr("kv_num_heads"))
    q, k, v = _unpack(ctx, heads, kv_heads)
    _, _, tokens, head_dim = shape_of(q)
    past = ctx.shape(3)[2] if ctx.has(3) else 0
    if ctx.has(3):
        ctx.unify(shape_of(q)[0], ctx.shape(3)[0])
    total = simplify(past + tokens)
    declared = ctx.value(6) if ctx.has(6) else None
    if declared is not None:
        ctx.unify(declared.reshape(-1)[0], total)
    first = _past_lengths(ctx, cast(ctx, ctx.x(5), "int64"), tokens)
    if ctx.attr("do_rotary", 0):
        interleaved = bool(ctx.attr("rotary_interleaved", 0))
        ids = cast(ctx, ctx.x(9), "int64") if ctx.has(9) else None
        cos, sin = (angles(ctx, ctx.x(i), first, tokens, ids) for i in (7, 8))
        q, k = rotate(ctx, q, cos, sin, interleaved), rotate(ctx, k, cos, sin, interleaved)
    if ctx.has(3):
        k, v = append(ctx, ctx.x(3), k, first), append(ctx, ctx.x(4), v, first)
    window = int(ctx.attr("local_window_size", -1))
    scores = attend(
        ctx,
        q,
        k,
        v,
        scale=float(ctx.attr("scale", 0.0)) or int(head_dim) ** -0.5,
        softcap=float(ctx.attr("softcap", 0.0)),
        bias=ctx.x(10) if ctx.has(10) else None,
        sight=Sight(first, causal=True, left=window - 1 if window > 0 else -1),
        sink=_sink(ctx, heads),
    )
    return merge_heads(ctx, scores.out), k, v


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
    """[B] int64: tokens in the cache before this call; 0 in a first call, whose rows may be shorter than `tokens`."""
    last = reshape(ctx, last, [_elements(last)])

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


STANDARD: dict[str, Rule] = {"Attention": _attention, "RotaryEmbedding": _rotary}
MICROSOFT: dict[str, Rule] = {"RotaryEmbedding": _rotary_ms, "GroupQueryAttention": _group_query_attention}
