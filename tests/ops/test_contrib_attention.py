"""com.microsoft's attention, rotary embeddings and recurrent states against onnxruntime; see test_attention.py, too."""

import numpy as np
import pytest

from .contrib import Random, ms
from .harness import Compiled, check

R = Random(4)
f32 = R.f32
B, S, P, H, KV, D = 2, 5, 7, 6, 2, 16
TURNS = np.arange(32)[:, None] * R.rng.random(D // 2)[None]
COS, SIN = np.cos(TURNS).astype(np.float32), np.sin(TURNS).astype(np.float32)
WIDE = D * H
PAST = {3: ("b", KV, "p", D), 4: ("b", KV, "p", D)}
QKV = {0: ("b", "s", WIDE), 1: ("b", "s", KV * D), 2: ("b", "s", KV * D)}


def trimmed(inputs):
    while inputs[-1] is None:
        inputs.pop()
    return inputs


def gqa(tokens, past, lengths, *extra, dims=False, packed=False, batch=B, label="", outputs=3, **attrs):
    """GroupQueryAttention; `extra` are the inputs from the position ids on."""
    q = f32(batch, tokens, (H + 2 * KV) * D if packed else WIDE)
    pair = (None, None) if packed else (f32(batch, tokens, KV * D), f32(batch, tokens, KV * D))
    cache = (f32(batch, KV, past, D), f32(batch, KV, past, D))
    rope = (COS, SIN) if attrs.get("do_rotary") else (None, None)
    seqlens = np.array(lengths, np.int32) - 1
    inputs = trimmed([q, *pair, *cache, seqlens, np.array(past + tokens, np.int32), *rope, *extra])
    symbolic = {**QKV, **PAST, 5: ("b",)} if dims else {}
    return ms(
        "GroupQueryAttention",
        *inputs,
        num_heads=H,
        kv_num_heads=KV,
        outputs=outputs,
        dims=symbolic,
        label=label,
        **attrs,
    )


def cached(tokens, past, bits, per_channel, *, lengths=None, dims=False, label=""):
    """GroupQueryAttention whose cache holds integers."""
    made = gqa(tokens, past, lengths or [past + tokens] * B)
    q, k, v, *_ = made.inputs
    shape = (1, KV, 1, D) if per_channel else (1,)
    scales = [R.scales(*shape) * (1 if bits == 8 else 10) for _ in "kv"]
    caches = [R.i8(B, KV, past, D) if bits == 8 else R.u8(B, KV, past, D // 2) for _ in "kv"]
    kind = "PER_CHANNEL" if per_channel else "PER_TENSOR"
    symbolic = {**QKV, **dict.fromkeys((3, 4), ("b", KV, "p", D * bits // 8)), 5: ("b",)} if dims else {}
    return ms(
        "GroupQueryAttention",
        *(q, k, v, *caches, *made.inputs[5:7], None, None, None, None, None, *scales),
        num_heads=H,
        kv_num_heads=KV,
        k_quant_type=kind,
        v_quant_type=kind,
        kv_cache_bit_width=bits,
        outputs=3,
        dims=symbolic,
        label=label,
    )


def padded(tokens, past, lengths, valid, **attrs):
    """GroupQueryAttention with query_seqlens."""
    return gqa(tokens, past, lengths, *[None] * 7, np.array(valid, np.int32), **attrs)


def mha(s, t, *rest, label="", **attrs):
    """MultiHeadAttention with s queries, t keys, and the inputs from bias on."""
    return ms(
        "MultiHeadAttention",
        f32(B, s, WIDE),
        f32(B, t, WIDE),
        f32(B, t, WIDE),
        *rest,
        num_heads=H,
        label=label,
        **attrs,
    )


def attention(*rest, label="", heads=2, width=96, **attrs):
    """Attention of [B, S, 32]; `rest` are the inputs from the mask on."""
    inputs = trimmed([f32(B, S, 32), f32(32, width), f32(width), *rest])
    return ms("Attention", *inputs, num_heads=heads, label=label, **attrs)


def q_attention(*, signed=False, columns=False, zeros=False, mask=None, past=None, label="", **attrs):
    weights = (R.i8 if signed else R.u8)(32, 96)
    scale = R.scales(96) if columns else np.float32(0.01)
    inputs = [R.u8(B, S, 32), weights, f32(96), np.float32(0.02), scale, mask]
    inputs += [np.uint8(120), np.array(5, weights.dtype)] if zeros else [None, None]
    inputs += [past]
    return ms("QAttention", *trimmed(inputs), num_heads=2, tolerance=1e-4, label=label, **attrs)


def rotary(x, ids, label="", cos=COS, sin=SIN, **attrs):
    return ms("RotaryEmbedding", x, ids, cos, sin, label=label, **attrs)


def m_rotary(x, sections, label="", **attrs):
    ids = R.rng.integers(0, 32, (3, B, S))
    return ms("MRotaryEmbedding", x, ids, COS, SIN, num_heads=H, mrope_section=sections, label=label, **attrs)


def linear(rule, *, heads=4, kv=4, dk=8, dv=12, per_key=False, past=True, shared=False, label="", **attrs):
    gated, delta = "gated" in rule, "delta" in rule
    k = f32(B, S, kv, dk)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    inputs = [f32(B, S, heads * dk), k.reshape(B, S, -1), f32(B, S, kv * dv), f32(B, kv, dk, dv) if past else None]
    inputs += [-R.rng.random((B, S, kv * (dk if per_key else 1))).astype(np.float32) if gated else None]
    inputs += [R.rng.random((B, S, 1 if shared else kv)).astype(np.float32) if delta else None]
    attrs |= {"q_num_heads": heads, "kv_num_heads": kv, "update_rule": rule, "outputs": 2}
    return ms("LinearAttention", *trimmed(inputs), label=label or rule, **attrs)


def delta_net(rule="gated_delta", *, heads=4, flat=False, packed=False, per_key=False, label="", **attrs):
    """GatedDeltaNet of two query heads."""
    gated, delta, lead = "gated" in rule, "delta" in rule, (B * S,) if flat or packed else (B, S)
    q, k, v = f32(*lead, 2, 8), f32(*lead, 2, 8), f32(*lead, heads, 12)
    if not attrs.get("qk_l2_norm"):
        k /= np.linalg.norm(k, axis=-1, keepdims=True)
    raw = attrs.get("gate_activation")
    width = (8,) if per_key else ()
    decay = f32(*lead, heads, *width) if raw else -R.rng.random((*lead, heads, *width)).astype(np.float32)
    inputs = [
        q,
        k,
        v,
        None,
        decay if gated else None,
        R.rng.random((*lead, heads)).astype(np.float32) if delta else None,
    ]
    if packed:
        inputs[:3] = [np.concatenate([x.reshape(*lead, -1) for x in (q, k, v)], -1), None, None]
    inputs += [f32(B, heads, 12, 8), f32(heads) if raw else None, f32(heads) if raw else None]
    attrs |= {"update_rule": rule, "outputs": 2}
    return ms("GatedDeltaNet", *trimmed(inputs), label=label or rule, **attrs)


def causal(x, taps, *, bias=False, past=False, last=False, dilation=1, label="", **attrs):
    channels = int(np.prod(x.shape[2:])) if last else x.shape[1]
    history = (taps - 1) * dilation
    state = (x.shape[0], history, *x.shape[2:]) if last else (*x.shape[:2], history)
    inputs = [x, f32(channels, 1, taps), f32(channels) if bias else None, f32(*state) if past else None]
    attrs |= {"dilation": dilation} if dilation > 1 else {}
    attrs |= {"channels_last": 1} if last else {}
    return ms("CausalConvWithState", *trimmed(inputs), outputs=2, label=label, **attrs)


IDS = R.rng.integers(0, 32, (B, S))
MASK = (R.rng.random((B, S + P)) > 0.3).astype(np.int32)
MASK[:, 0] = 1
SYM = {0: ("b", "s", 32)}
HEADS = f32(B, H, S, D)

CASES = [
    gqa(S, 0, [S, S], causal=0, label="both-ways"),
    gqa(S, 0, [S, S], do_rotary=1, causal=0, dims=True, label="both-ways-rotary"),
    gqa(1, P, [P + 1, P + 1], causal=0, label="both-ways-decode"),
    gqa(3, P, [P + 3], do_rotary=1, batch=1, dims=True, label="chunk"),
    gqa(3, P, [P + 3], do_rotary=1, batch=1, packed=True, label="chunk-packed"),
    gqa(3, P, [P + 3], batch=1, local_window_size=4, label="chunk-window"),
    gqa(1, P, [P + 1, P - 3], None, None, f32(H), label="sink-ragged"),
    gqa(1, P, [P + 1, P + 1], IDS[:, :1], do_rotary=1, label="positions"),
    gqa(1, P, [P + 1, P + 1], smooth_softmax=1, softcap=3.0, label="smooth-softcap"),
    gqa(1, P, [P + 1, P + 1], None, f32(1, H, 1, P + 1), label="bias-shared"),
    gqa(S, 0, [S, S], None, f32(B, H, S, S), softcap=4.0, label="bias-softcap"),
    gqa(S, 0, [S, S], do_rotary=1, scale=0.2, dims=True, label="scale"),
    gqa(S, 0, [S, S], qk_output=1, outputs=4, label="scores"),
    gqa(S, 0, [S, S], None, f32(B, H, S, S), qk_output=1, softcap=2.0, outputs=4, label="scores-bias"),
    gqa(1, P, [P + 1, P + 1], qk_output=2, outputs=4, label="weights"),
    cached(S, 0, 8, False, dims=True, label="8bit-cache"),
    cached(1, P, 8, True, label="8bit-cache-decode"),
    cached(1, P, 8, False, lengths=[P + 1, P - 2], label="8bit-cache-ragged"),
    cached(S, 0, 4, True, label="4bit-cache"),
    cached(1, P, 4, False, dims=True, label="4bit-cache-decode"),
    padded(3, P, [P + 3, P + 1], [3, 3], label="padded"),
    padded(3, P, [P + 3], [3], batch=1, do_rotary=1, local_window_size=4, label="padded-window"),
    mha(S, 9, None, None, f32(1, 1, S, 9), label="shared-bias"),
    mha(S, 9, None, None, f32(1, H, S, 9), label="heads-bias"),
    mha(S, 9, f32(3 * WIDE), MASK[:, :9], f32(B, H, S, 9), label="all"),
    mha(S, 9, None, R.i32(2, B, S, 9) | np.eye(S, 9, dtype=np.int32), label="mask-3d"),
    mha(S, S, None, None, None, f32(B, H, P, D), f32(B, H, P, D), unidirectional=1, outputs=3, label="past-causal"),
    mha(S, S, f32(3 * WIDE), MASK, None, f32(B, H, P, D), f32(B, H, P, D), outputs=3, label="past-mask"),
    mha(1, 1, None, None, None, f32(B, H, P, D), f32(B, H, P, D), outputs=3, label="decode"),
    mha(S, 9, scale=0.3, mask_filter_value=-50.0, label="scale"),
    mha(S, 9, None, MASK[:, :9], mask_filter_value=-1.5, label="filter"),
    attention(unidirectional=1, dims=SYM, label="causal"),
    attention(np.array([5, 3], np.int32), label="lengths"),
    attention(np.array([5, 4, 1, 0], np.int32), label="ends-starts"),
    attention(R.i32(2, B, S, S) | np.eye(S, dtype=np.int32), label="mask-3d"),
    attention(None, None, f32(B, 2, S, S), label="bias"),
    attention(None, None, f32(1, 1, S, S), scale=0.4, label="shared-bias"),
    attention(MASK, f32(2, B, 2, P, 16), outputs=2, label="past-mask"),
    attention(qkv_hidden_sizes=[32, 32, 64], width=128, label="wide-values"),
    attention(MASK[:, :S], unidirectional=1, mask_filter_value=-20.0, label="filter"),
    q_attention(),
    q_attention(zeros=True, unidirectional=1, label="zeros"),
    q_attention(signed=True, columns=True, label="columns"),
    q_attention(mask=np.array([5, 3], np.int32), zeros=True, label="lengths"),
    q_attention(past=f32(2, B, 2, P, 16), outputs=2, unidirectional=1, label="past"),
    rotary(f32(B, S, WIDE), IDS, label="interleaved", interleaved=1),
    rotary(HEADS, IDS, label="heads", dims={0: ("b", H, "s", D), 1: ("b", "s")}),
    rotary(f32(B, S, WIDE), IDS, "partial", COS[:, :4], SIN[:, :4], rotary_embedding_dim=8, num_heads=H),
    rotary(f32(B, S, WIDE), np.array([3]), label="offset"),
    rotary(
        *(a.astype(np.float16) if a.dtype == np.float32 else a for a in (HEADS, IDS)),
        "half",
        COS.astype(np.float16),
        SIN.astype(np.float16),
        tolerance=5e-3,
    ),
    m_rotary(f32(B, S, WIDE), [4, 2, 2], dims={0: ("b", "s", WIDE), 1: (3, "b", "s")}),
    m_rotary(HEADS, [2, 3, 3], label="heads"),
    m_rotary(f32(B, S, WIDE), [4, 2, 2], mrope_layout=1, label="alternating"),
    m_rotary(HEADS, [4, 2, 2], interleaved=1, label="interleaved"),
    linear("linear", dims={0: ("b", "s", 32), 1: ("b", "s", 32), 2: ("b", "s", 48), 3: ("b", 4, 8, 12)}),
    linear("gated"),
    linear("gated", per_key=True, label="gated-keys"),
    linear("delta"),
    linear("delta", shared=True, label="delta-shared"),
    linear("gated_delta", past=False, label="gated-delta-fresh"),
    linear("gated_delta", heads=8, label="gated-delta-groups"),
    linear("gated_delta", heads=2, label="gated-delta-inverse"),
    linear("gated_delta", per_key=True, scale=0.3, label="gated-delta-scale"),
    delta_net(
        dims={i: ("b", "s", *d) for i, d in ((0, (2, 8)), (1, (2, 8)), (2, (4, 12)), (4, (4,)), (5, (4,)))}
        | {6: ("b", 4, 12, 8)}
    ),
    delta_net("linear"),
    delta_net("delta", heads=2, flat=True),
    delta_net("gated", per_key=True),
    delta_net(packed=True, beta_activation="sigmoid", label="packed"),
    delta_net(qk_l2_norm=1, gate_activation="softplus", label="raw"),
    delta_net(qk_l2_norm=1, gate_activation="kda", gate_lower_bound=-3.0, per_key=True, scale=0.4, label="bounded"),
    causal(f32(B, 6, S), 4, dims={0: ("b", 6, "l")}),
    causal(f32(B, 6, S), 4, bias=True, past=True, activation="silu", label="state"),
    causal(f32(B, 6, 1), 4, past=True, activation="swish", label="decode"),
    causal(f32(B, 6, S), 3, past=True, dilation=2, label="dilated"),
    causal(f32(B, S, 6), 4, bias=True, past=True, last=True, label="last"),
]


@pytest.fixture(scope="module")
def compiled():
    return Compiled(CASES)


@pytest.mark.parametrize("c", CASES, ids=str)
def test_contrib_attention(compiled, c):
    check(compiled, c)
