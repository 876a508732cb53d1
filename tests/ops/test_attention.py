"""Rules of attention against onnxruntime and the ONNX reference."""

import numpy as np
import pytest

from .harness import Compiled, case, check

rng = np.random.default_rng(0)


def f32(*shape):
    return rng.standard_normal(shape).astype(np.float32)


B, S, P, H, KV, D = 2, 5, 7, 6, 2, 16
cos, sin = (
    np.cos(np.arange(32)[:, None] * rng.random(8)[None]).astype(np.float32),
    np.sin(np.arange(32)[:, None] * rng.random(8)[None]).astype(np.float32),
)
QKV = {0: ("b", "s", H * D), 1: ("b", "s", KV * D), 2: ("b", "s", KV * D)}
PAST = {3: ("b", KV, "p", D), 4: ("b", KV, "p", D)}


def gqa(tokens, past, lengths, *, packed=False, dims=False, label="", extra=(), **attrs):
    q = f32(B, tokens, (H + 2 * KV if packed else H) * D)
    k, v = (None, None) if packed else (f32(B, tokens, KV * D), f32(B, tokens, KV * D))
    pk, pv = f32(B, KV, past, D), f32(B, KV, past, D)
    total = np.array(past + tokens, np.int32)
    rope = (cos, sin) if attrs.get("do_rotary") else (None, None)
    symbolic = {**QKV, **PAST, 5: ("b",)} if dims else {}
    if packed and dims:
        symbolic = {0: ("b", "s", (H + 2 * KV) * D), **PAST, 5: ("b",)}
    return case(
        "GroupQueryAttention",
        q,
        k,
        v,
        pk,
        pv,
        np.array(lengths, np.int32) - 1,
        total,
        *rope,
        *extra,
        domain="com.microsoft",
        outputs=3,
        num_heads=H,
        kv_num_heads=KV,
        dims=symbolic,
        label=label,
        **attrs,
    )


def mha(s, t, *rest, label="", dims=False, **attrs):
    """MultiHeadAttention with s queries, t keys, and the inputs from bias on."""
    symbolic = {0: ("b", "s", H * D), 1: ("b", "t", H * D), 2: ("b", "t", H * D)} if dims else {}
    return case(
        "MultiHeadAttention",
        *(f32(B, s, H * D), f32(B, t, H * D), f32(B, t, H * D), *rest),
        domain="com.microsoft",
        num_heads=H,
        label=label,
        dims=symbolic,
        **attrs,
    )


def packed(qkv):
    """MultiHeadAttention of [B, S, H, 3, D], for which onnxruntime has no CPU kernel."""
    q, k, v = np.moveaxis(qkv.astype(np.float64), 3, 0).swapaxes(2, 3)
    scores = np.exp(q @ k.swapaxes(2, 3) / np.sqrt(D))
    out = scores / scores.sum(-1, keepdims=True) @ v
    return [out.swapaxes(1, 2).reshape(B, S, H * D).astype(np.float32)]


def onnx_attention(q, k, v, *rest, opset=23, **options):
    """ai.onnx Attention; onnxruntime lags behind its clarifications, so the reference is ONNX's."""
    return case("Attention", q, k, v, *rest, opset=opset, reference="onnx", **options)


def heads(n, s):
    return f32(B, n, s, D)


MASK = rng.random((B, 9)) > 0.3
MASK[:, 0] = True
FLAT = {"q_num_heads": H, "kv_num_heads": KV}
FLAT_DIMS = {0: ("b", "s", H * D), 1: ("b", "t", KV * D), 2: ("b", "t", KV * D)}
PAST4 = {4: ("b", KV, "p", D), 5: ("b", KV, "p", D)}
POSITIONS = rng.integers(0, 32, (B, S))

CASES = [
    gqa(S, 0, [S, S], do_rotary=1, label="prompt"),
    gqa(S, 0, [S, S], do_rotary=1, packed=True, dims=True, label="packed"),
    gqa(1, P, [P + 1, P + 1], do_rotary=1, dims=True, label="decode"),
    gqa(1, P, [P + 1, P - 2], do_rotary=1, dims=True, label="ragged"),
    gqa(1, P, [P + 1, P + 1], local_window_size=4, label="window"),
    gqa(S, 0, [S, S], local_window_size=2, softcap=5.0, dims=True, label="window-softcap"),
    gqa(S, 0, [S, S], do_rotary=1, rotary_interleaved=1, scale=0.3, label="interleaved"),
    gqa(S, 0, [S, S], smooth_softmax=1, label="smooth"),
    gqa(S, 0, [S, S], extra=(None, f32(B, 1, S, S)), label="bias"),
    gqa(S, 0, [S, S], extra=(None, None, f32(H)), label="sink"),
    mha(S, 9, dims=True),
    mha(S, 9, f32(3 * H * D), label="bias"),
    mha(S, 9, None, MASK.astype(np.int32), label="padding"),
    mha(S, 9, None, np.array([9, 4], np.int32), label="lengths"),
    mha(S, 9, None, None, f32(B, H, S, 9), label="attention-bias", scale=0.2),
    mha(S, S, None, None, None, f32(B, H, P, D), f32(B, H, P, D), label="past", outputs=3),
    mha(S, S, unidirectional=1, label="causal"),
    case(
        "MultiHeadAttention", f32(B, S, H, 3, D), domain="com.microsoft", num_heads=H, label="packed", reference=packed
    ),
    case(
        "MultiHeadAttention",
        f32(B, S, H * D),
        f32(B, H, 9, D),
        f32(B, H, 9, D),
        domain="com.microsoft",
        num_heads=H,
        label="cross",
    ),
    case("Attention", f32(B, S, 32), f32(32, 96), f32(96), domain="com.microsoft", num_heads=2, label="packed"),
    case(
        "Attention",
        f32(B, S, 32),
        f32(32, 96),
        f32(96),
        MASK[:, :S].astype(np.int32),
        domain="com.microsoft",
        num_heads=2,
        label="mask",
        dims={0: ("b", "s", 32), 3: ("b", "s")},
    ),
    case(
        "Attention",
        f32(B, S, 32),
        f32(32, 96),
        f32(96),
        None,
        f32(2, B, 2, P, 16),
        domain="com.microsoft",
        num_heads=2,
        unidirectional=1,
        outputs=2,
        label="past",
    ),
    onnx_attention(heads(H, S), heads(H, 9), heads(H, 9)),
    onnx_attention(f32(B, S, H * D), f32(B, 9, KV * D), f32(B, 9, KV * D), dims=FLAT_DIMS, **FLAT),
    onnx_attention(heads(H, S), heads(KV, S), heads(KV, S), is_causal=1, scale=0.2, label="causal"),
    onnx_attention(heads(H, S), heads(KV, 9), heads(KV, 9), MASK[:, None, None], label="bool"),
    onnx_attention(heads(H, S), heads(KV, 9), heads(KV, 9), np.zeros((S, 9), bool), label="hidden"),
    onnx_attention(
        heads(H, S),
        heads(KV, 9),
        heads(KV, 9),
        f32(B, 1, S, 9),
        softcap=3.0,
        label="softcap",
        dims={3: ("b", 1, "s", "t"), 0: ("b", H, "s", D), 1: ("b", KV, "t", D), 2: ("b", KV, "t", D)},
    ),
    onnx_attention(
        f32(B, S, H * D),
        f32(B, S, KV * D),
        f32(B, S, KV * D),
        None,
        heads(KV, P),
        heads(KV, P),
        is_causal=1,
        outputs=3,
        dims={**QKV, **PAST4},
        label="past",
        **FLAT,
    ),
    onnx_attention(
        heads(H, S),
        heads(KV, 9),
        heads(KV, 9),
        None,
        None,
        None,
        np.array([9, 6]),
        is_causal=1,
        opset=24,
        label="lengths",
    ),
    *(
        onnx_attention(
            heads(H, S), heads(KV, 9), heads(KV, 9), f32(S, 9), qk_matmul_output_mode=m, outputs=4, label=f"stage{m}"
        )
        for m in (0, 2, 3)
    ),
    onnx_attention(
        heads(H, S), heads(KV, S), heads(KV, S), left_window_size=2, right_window_size=1, opset=25, label="window"
    ),
    case(
        "RotaryEmbedding",
        f32(B, S, H * D),
        cos,
        sin,
        POSITIONS,
        opset=23,
        num_heads=H,
        reference="onnx",
        dims={0: ("b", "s", H * D), 3: ("b", "s")},
    ),
    case("RotaryEmbedding", heads(H, S), f32(B, S, 8), f32(B, S, 8), opset=23, interleaved=1, reference="onnx"),
    case(
        "RotaryEmbedding",
        heads(H, S),
        cos[:, :4],
        sin[:, :4],
        POSITIONS,
        opset=23,
        rotary_embedding_dim=8,
        reference="onnx",
        label="partial",
    ),
    case(
        "RotaryEmbedding",
        f32(B, S, H * D),
        POSITIONS,
        cos,
        sin,
        domain="com.microsoft",
        dims={0: ("b", "s", H * D), 1: ("b", "s")},
    ),
    case(
        "RotaryEmbedding", heads(H, S), np.array([3]), cos, sin, domain="com.microsoft", interleaved=1, label="offset"
    ),
]


@pytest.fixture(scope="module")
def compiled():
    return Compiled(CASES)


@pytest.mark.parametrize("c", CASES, ids=str)
def test_attention(compiled, c):
    check(compiled, c)
