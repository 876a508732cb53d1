"""Attention as exporters and optimisers write it: spelled out, by ai.onnx, by com.microsoft."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tests.fuzz.program import MS, Dim, Length, Value, element_type
from tests.fuzz.sketch import ULPS, UNIT, Sketch, errors, size_of

LOWEST = float(np.finfo(np.float32).min)


@dataclass(frozen=True)
class Sizes:
    batch: Dim
    queries: Dim
    heads: int
    kv_heads: int
    head_dim: int
    past: Dim  # 0 where there is no cache

    @property
    def keys(self) -> Dim:
        return self.queries + self.past


def draw_sizes(s: Sketch, *, past: bool, even: bool = False) -> Sizes:
    batch = s.symbol("batch", 1, 3) if s.chance(50) else s.choice([1, 2])
    queries = s.symbol("seq", 1, 6) if s.chance(60) else s.choice([1, 3, 5])
    kv_heads = s.choice([1, 2])
    heads = kv_heads * s.choice([1, 1, 2, 3])
    head_dim = s.choice([4, 8, 16] if not even else [8, 16])
    length: Dim = (s.symbol("past", 1, 5) if s.chance(70) else s.choice([1, 4])) if past else 0
    return Sizes(batch, queries, heads, kv_heads, head_dim, length)


def attention_error(s: Sketch, z: Sizes, scale: float, q: Value, k: Value, v: Value) -> tuple[np.ndarray, np.ndarray]:
    """Errors of the scores, and of what comes out: softmax doubles its argument's error, and its sum of T weights errs
    by T roundings."""
    unit, D = UNIT["float32"], z.head_dim
    top = size_of(q) * size_of(k)
    scores = scale * D * (errors(q) * size_of(k) + errors(k) * size_of(q)) + scale * D * (D + ULPS) * unit * top
    keys = s.most([z.keys])
    shares = 2 * scores + (3 * keys + ULPS + 4 * scale * D * top) * unit
    return scores, errors(v) + (shares + keys * unit) * 2 * size_of(v)


# -- spelled out --------------------------------------------------------------------------------------------------
def spelled(s: Sketch) -> None:
    """Projections, heads, perhaps rope and a cache, scores, mask, softmax, the sum, heads back, projection."""
    past = s.chance(40)
    z = draw_sizes(s, past=past, even=True)
    H, D = z.heads, z.head_dim
    width = s.choice([8, 16])
    x = s.input("float32", [z.batch, z.queries, width], -1, 1)
    fed = s.chance(30)  # queries, keys and values instead of a hidden state

    def heads_of(n: int) -> Value:
        if fed:
            y = s.input("float32", [z.batch, z.queries, n * D], -1, 1)
        else:
            w = s.constant("float32", [width, n * D], -0.3, 0.3)
            error = (0.3 * errors(x) + 0.3 * width * UNIT["float32"]) * width
            y = s.smooth("MatMul", [x, w], [z.batch, z.queries, n * D], -0.3 * width, 0.3 * width, error)
        split = s.moved("Reshape", y, [z.batch, z.queries, n, D], [s.given([0, 0, n, D])])
        return s.moved("Transpose", split, [z.batch, n, z.queries, D], perm=[0, 2, 1, 3])

    q, k, v = heads_of(H), heads_of(z.kv_heads), heads_of(z.kv_heads)
    if s.chance(40):
        cos, sin = _angles(s, z)
        q, k = rotated(s, q, cos, sin), rotated(s, k, cos, sin)
    if past:
        k, v = (_appended(s, z, value) for value in (k, v))
    k, v = (_repeated(s, z, value) for value in (k, v))
    scale = D**-0.5
    on_queries = s.chance(25)
    scores_error, error = attention_error(s, z, scale, q, k, v)
    if on_queries:
        q = s.smooth("Mul", [q, s.given(scale, "float32")], q.shape, q.low * scale, q.high * scale, errors(q) * scale)
    turned = s.moved("Transpose", k, [z.batch, H, D, z.keys], perm=[0, 1, 3, 2])
    shape = [z.batch, H, z.queries, z.keys]
    most = D * size_of(q) * size_of(k)
    scores = s.smooth("MatMul", [q, turned], shape, -most, most, scores_error if on_queries else scores_error / scale)
    if not on_queries:
        pair, op = (scale, "Mul") if s.chance(60) else (1 / scale, "Div")
        operands = [scores, s.given(pair, "float32")]
        scores = s.smooth(op, operands, shape, -most * scale, most * scale, scores_error)
    scores = _masked(s, z, scores)
    shares = s.smooth("Softmax", [scores], shape, 0, 1, 2 * errors(scores) + error / max(size_of(v), 1e-3), axis=-1)
    mixed = s.smooth("MatMul", [shares, v], [z.batch, H, z.queries, D], v.low, v.high, error)
    back = s.moved("Transpose", mixed, [z.batch, z.queries, H, D], perm=[0, 2, 1, 3])
    merged = s.moved("Reshape", back, [z.batch, z.queries, H * D], [s.given([0, 0, s.choice([-1, H * D])])])
    if s.chance(50):
        w = s.constant("float32", [H * D, 8], -0.3, 0.3)
        total = 0.3 * H * D * size_of(merged)
        carried = 0.3 * H * D * errors(merged) + H * D * UNIT["float32"] * total
        s.smooth("MatMul", [merged, w], [z.batch, z.queries, 8], -total, total, carried)


def _appended(s: Sketch, z: Sizes, value: Value) -> Value:
    """After a past that is fed; the whole is a graph's output in most decoders."""
    past = s.input("float32", [z.batch, z.kv_heads, z.past, z.head_dim], -1, 1)
    low, high = min(past.low, value.low), max(past.high, value.high)
    shape = [z.batch, z.kv_heads, z.keys, z.head_dim]
    whole = s.node("Concat", [past, value], "float32", shape, low, high, value.error, axis=2)
    if s.chance(70):
        s.kept.add(whole.name)
    return whole


def _repeated(s: Sketch, z: Sizes, value: Value) -> Value:
    """Keys and values for every query head."""
    times = z.heads // z.kv_heads
    if times == 1:
        return value
    shape = [z.batch, z.kv_heads, 1, z.keys, z.head_dim]
    wide = s.moved("Unsqueeze", value, shape, [s.given([2])])
    shape[2] = times
    wide = s.moved("Expand", wide, shape, [s.given([1, 1, times, 1, 1])])
    target = s.given([0, z.heads, -1, z.head_dim])
    if isinstance(z.keys, int) or s.chance(50):
        return s.moved("Reshape", wide, [z.batch, z.heads, z.keys, z.head_dim], [target])
    whole = s.node("Shape", [value], "int64", (4,), 0, 100)
    length = s.node("Slice", [whole, s.given([2]), s.given([3])], "int64", (1,), 0, 100)
    parts = [s.given([0]), s.given([z.heads]), length, s.given([z.head_dim])]
    target = s.node("Concat", parts, "int64", (4,), 0, 100, axis=0)
    return s.moved("Reshape", wide, [z.batch, z.heads, z.keys, z.head_dim], [target])


def _angles(s: Sketch, z: Sizes) -> tuple[Value, Value]:
    """Cosines and sines [batch or 1, 1, queries, head_dim], each half twice."""
    ids = s.input("int64", [z.batch, z.queries], 0, 20)
    D = z.head_dim
    row = s.moved("Unsqueeze", ids, [z.batch, 1, z.queries], [s.given([1])])
    wide = s.node("Cast", [row], "float32", row.shape, 0, 20, to=element_type("float32"))
    frequencies = s.given((1.0 / 100 ** (np.arange(0, D, 2) / D)).astype(np.float32).reshape(1, -1, 1), "float32")
    rounding = np.full(2, 20 * ULPS * UNIT["float32"])
    turned = s.node("MatMul", [frequencies, wide], "float32", [z.batch, D // 2, z.queries], 0, 20, rounding)
    half = s.moved("Transpose", turned, [z.batch, z.queries, D // 2], perm=[0, 2, 1])
    shape = [z.batch, z.queries, D]
    twice = s.node("Concat", [half, half], "float32", shape, 0, 20, half.error, axis=-1)
    parts = [s.smooth(op, [twice], shape, -1, 1, errors(twice)) for op in ("Cos", "Sin")]
    axes = s.given([1])
    cos, sin = (s.moved("Unsqueeze", p, [z.batch, 1, z.queries, D], [axes]) for p in parts)
    return cos, sin


def rotated(s: Sketch, x: Value, cos: Value, sin: Value) -> Value:
    """x cos + rotate_half(x) sin."""
    D = x.shape[-1]
    assert isinstance(D, int)
    half = [*x.shape[:-1], D // 2]
    low = s.moved("Slice", x, half, [s.given([0]), s.given([D // 2]), s.given([3])])
    high = s.moved("Slice", x, half, [s.given([D // 2]), s.given([2**62]), s.given([3])])
    negative = s.node("Neg", [high], "float32", half, -high.high, -high.low, high.error)
    most = size_of(x)
    turned = s.node("Concat", [negative, low], "float32", x.shape, -most, most, x.error, axis=-1)
    error = errors(x) + errors(cos) * most
    parts = [s.smooth("Mul", pair, x.shape, -most, most, error) for pair in ([x, cos], [turned, sin])]
    return s.smooth("Add", parts, x.shape, -1.5 * most, 1.5 * most, 2 * error)


def _masked(s: Sketch, z: Sizes, scores: Value) -> Value:
    """The scores plus a mask that is fed, or that the graph makes from lengths or from a padding mask."""
    how = s.choice(["none", "fed", "where", "causal", "padding"])
    shape = list(scores.shape)
    if how == "none":
        return scores
    if how == "fed":
        first = s.choice([[z.batch, 1], [1, 1], [z.batch, z.heads]])
        mask = s.input("float32", [*first, s.choice([z.queries, 1]), z.keys], -4, 0)
        return s.smooth("Add", [scores, mask], shape, scores.low - 4, scores.high, errors(scores))
    if how == "where":  # some of the keys, but never none: the masked score is not far below the others
        mask = s.input("bool", [s.choice([z.batch, 1]), 1, z.queries, z.keys])
        low = s.given(-8.0, "float32")
        return s.node(
            "Where", [mask, scores, low], "float32", shape, min(scores.low, -8), max(scores.high, -8), scores.error
        )
    if how == "padding":  # the first key is always seen: what is left of nothing is nobody's business
        mask = s.input("int64", [z.batch, z.keys], 1, 1)
        if min(s.lengths(z.keys)) > 1 and isinstance(z.batch, int):
            ones, rest = s.given([[1]] * z.batch), s.input("int64", [z.batch, z.keys + -1], 0, 1)
            mask = s.node("Concat", [ones, rest], "int64", [z.batch, z.keys], 0, 1, axis=1)
        wide = s.moved("Unsqueeze", mask, [z.batch, 1, 1, z.keys], [s.given([1, 2])])
        real = s.node("Cast", [wide], "float32", wide.shape, 0, 1, to=element_type("float32"))
        inverse = s.node("Sub", [s.given(1.0, "float32"), real], "float32", wide.shape, 0, 1)
        low = s.choice([LOWEST, -10000.0, -8.0])
        bias = s.node("Mul", [inverse, s.given(low, "float32")], "float32", wide.shape, low, 0)
        s.inner.add(bias.name)
    else:
        bias = _causal(s, z)
        low = LOWEST
    masked = s.node("Add", [scores, bias], "float32", shape, low + scores.low, scores.high, scores.error)
    s.inner.add(masked.name)
    return masked


def _causal(s: Sketch, z: Sizes) -> Value:
    """0 where a key is not after its query, the lowest number elsewhere; positions are Ranges over run-time lengths."""
    past, keys = _length(s, z.past), _length(s, z.keys)
    one, zero = s.given(1), s.given(0)
    queries = s.node("Range", [past, keys, one], "int64", (z.queries,), 0, 100)
    column = s.moved("Unsqueeze", queries, (z.queries, 1), [s.given([1])])
    row = s.node("Range", [zero, keys, one], "int64", (z.keys,), 0, 100)
    row = s.moved("Unsqueeze", row, (1, z.keys), [s.given([0])])
    seen = s.node("LessOrEqual", [row, column], "bool", (z.queries, z.keys), 0, 1)
    wide = s.moved("Unsqueeze", seen, (1, 1, z.queries, z.keys), [s.given([0, 1])])
    bias = s.node(
        "Where", [wide, s.given(0.0, "float32"), s.given(LOWEST, "float32")], "float32", wide.shape, LOWEST, 0
    )
    s.inner.add(bias.name)
    return bias


def _length(s: Sketch, dim: Dim) -> Value:
    """A dimension as a number: read from an input that has it, or a constant; sums are added."""
    if isinstance(dim, int):
        return s.given(dim)
    total: Value | None = None
    for name, times in dim.terms:
        part = s.given(times)
        if name:
            holder = next(v for v in map(s.values.get, s.inputs) if v and Length.symbol(name) in v.shape)
            whole = s.node("Shape", [holder], "int64", (len(holder.shape),), 0, 100)
            axis = s.given(holder.shape.index(Length.symbol(name)))
            part = s.node("Gather", [whole, axis], "int64", (), 0, 100, axis=0)
        total = part if total is None else s.node("Add", [total, part], "int64", (), 0, 100)
    assert total is not None
    return total


# -- as one operator ----------------------------------------------------------------------------------------------
def standard(s: Sketch) -> None:
    """ai.onnx Attention, 3-D or 4-D, with its masks, soft cap and cache."""
    s.opset = 23
    z = draw_sizes(s, past=s.chance(40))
    H, KV, D = z.heads, z.kv_heads, z.head_dim
    flat = s.chance(50)

    def operand(n: int) -> Value:
        shape = [z.batch, z.queries, n * D] if flat else [z.batch, n, z.queries, D]
        return s.input("float32", shape, -1, 1)

    q, k, v = operand(H), operand(KV), operand(KV)
    attrs: dict[str, int | float] = {"q_num_heads": H, "kv_num_heads": KV} if flat else {}
    more: list[Value | None] = []
    if s.chance(50):
        mask = s.input(
            s.choice(["float32", "float32"]), [*s.choice([[], [1, 1], [z.batch, 1]]), z.queries, z.keys], -4, 0
        )
        more = [mask]
    elif s.chance(50):
        attrs["is_causal"] = 1
    if s.chance(25):
        attrs["softcap"] = 5.0
    if s.chance(50):
        attrs["scale"] = 0.3
    _, error = attention_error(s, z, 1.0, q, k, v)
    result = Value("", "float32", q.shape, -1, 1, (error[0], error[1]))
    outputs: list[Value | None] = [result]
    if z.past:
        cache = [s.input("float32", [z.batch, KV, z.past, D], -1, 1) for _ in range(2)]
        more = [*(more or [None]), *cache]
        present = Value("", "float32", (z.batch, KV, z.keys, D), -1, 1)
        outputs += [present, present]
    s.nodes_of("Attention", [q, k, v, *more], outputs, **attrs)


def grouped(s: Sketch) -> None:
    """com.microsoft GroupQueryAttention with its cache and rope, every sequence of the batch equally long."""
    z = draw_sizes(s, past=True, even=True)
    z = replace(z, batch=1) if s.chance(50) else replace(z, queries=1)  # what onnxruntime asks for
    H, KV, D = z.heads, z.kv_heads, z.head_dim
    qkv: list[Value | None]
    q = s.input("float32", [z.batch, z.queries, H * D], -1, 1)
    if s.chance(50):
        q = s.input("float32", [z.batch, z.queries, (H + 2 * KV) * D], -1, 1)
        qkv = [q, None, None]
    else:
        qkv = [q, *(s.input("float32", [z.batch, z.queries, KV * D], -1, 1) for _ in range(2))]
    cache = [s.input("float32", [z.batch, KV, z.past, D], -1, 1) for _ in range(2)]
    total = _length(s, z.keys)
    last = s.node("Sub", [total, s.given(1)], "int64", (), 0, 100)
    batch = _length(s, z.batch)
    shape = s.moved("Unsqueeze", batch, (1,), [s.given([0])])
    rows = s.node("Expand", [last, shape], "int64", (z.batch,), 0, 100)
    lengths = s.node("Cast", [rows], "int32", (z.batch,), 0, 100, to=element_type("int32"))
    whole = s.node("Cast", [total], "int32", (), 0, 100, to=element_type("int32"))
    attrs: dict[str, int | float] = {"num_heads": H, "kv_num_heads": KV}
    more = []
    if s.chance(60) and D == 16:
        more = [s.constant("float32", [32, D // 2], -1, 1) for _ in range(2)]
        attrs |= {"do_rotary": 1, "rotary_interleaved": s.integer(0, 1)}
    wide = Value("", "float32", (), -2, 2, (1e-6, 1e-6))
    _, error = attention_error(s, z, D**-0.5, wide, wide, q)
    result = Value("", "float32", (z.batch, z.queries, H * D), -1, 1, (error[0], error[1]))
    shape4 = (z.batch, KV, z.keys, D)
    presents = [Value("", "float32", shape4, -2, 2, (1e-6, 1e-6)), Value("", "float32", shape4, -1, 1)]
    s.nodes_of("GroupQueryAttention", [*qkv, *cache, lengths, whole, *more], [result, *presents], MS, **attrs)


def multi_head(s: Sketch) -> None:
    """com.microsoft MultiHeadAttention, with a bias of the projections and of the scores."""
    z = draw_sizes(s, past=False)
    H, D = z.heads, z.head_dim
    operands = [s.input("float32", [z.batch, z.queries, H * D], -1, 1) for _ in range(3)]
    bias = s.constant("float32", [3 * H * D], -0.5, 0.5) if s.chance(50) else None
    added = s.input("float32", [s.choice([1, z.batch]), s.choice([1, H]), z.queries, z.keys], -4, 0)
    more = [bias, None, added] if s.chance(50) else [bias]
    wide = Value("", "float32", (), -1.5, 1.5, (1e-6, 1e-6))
    _, error = attention_error(s, z, D**-0.5, wide, wide, wide)
    attrs: dict[str, int] = {"num_heads": H}
    if s.chance(30):
        attrs["unidirectional"] = 1
    s.smooth(
        "MultiHeadAttention", [*operands, *more], [z.batch, z.queries, H * D], -1.5, 1.5, error, domain=MS, **attrs
    )


def rope(s: Sketch) -> None:
    """RotaryEmbedding of ai.onnx and of com.microsoft."""
    z = draw_sizes(s, past=False, even=True)
    H, D = z.heads, z.head_dim
    x = s.input("float32", [z.batch, H, z.queries, D], -1, 1)
    ids = s.input("int64", [z.batch, z.queries], 0, 15)
    cos, sin = (s.constant("float32", [16, D // 2], -1, 1) for _ in range(2))
    interleaved = s.integer(0, 1)
    error = np.full(2, ULPS * UNIT["float32"])
    if s.chance(50):
        s.opset = 23
        s.smooth("RotaryEmbedding", [x, cos, sin, ids], x.shape, -2, 2, error, interleaved=interleaved)
    else:
        s.smooth("RotaryEmbedding", [x, ids, cos, sin], x.shape, -2, 2, error, domain=MS, interleaved=interleaved)


STEPS = [spelled, spelled, spelled, standard, standard, grouped, multi_head, rope]
