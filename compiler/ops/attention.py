"""Attention of ai.onnx, opset 23 and later, and the core that all forms of attention share.

The core works on [batch, heads, tokens, head_dim] tensors: scaled products, a soft cap, a bias, the limits of what a
row may see, softmax, and the weighted sum. A row that sees nothing gives zeros.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from llmc.graph import Dim
from llmc.ops.context import Context, Rule
from llmc.ops.matmul import matmul, transpose_last
from llmc.ops.scalar import exp, select, tanh
from llmc.ops.tensor import (
    broadcast_shape,
    cast,
    compute,
    concat,
    dtype_of,
    elementwise,
    full,
    permute,
    reduce_rows,
    reshape,
    shape_of,
    simplify,
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
        top = reduce_rows(te.max, rows, x, out[-1], "top")

        def shift(b: Any, h: Any, i: Any) -> Any:
            return te.max(te.max(top(b, h, i), sinks[0](h)) if sinks else top(b, h, i), lowest)

        e = te.compute(out, lambda b, h, i, j: exp(x(b, h, i, j) - shift(b, h, i)), name="exp")
        total = reduce_rows(te.sum, rows, e, out[-1], "total")

        def norm(b: Any, h: Any, i: Any, j: Any) -> Any:
            z = total(b, h, i) + (exp(sinks[0](h) - shift(b, h, i)) if sinks else te.const(0, "float32"))
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
        capped = elementwise(ctx, "softcap", lambda x: tanh(x / cap) * cap, raw)
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


RULES: dict[str, Rule] = {"Attention": _attention}
