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


CASES = [
    gqa(S, 0, [S, S], do_rotary=1, label="prompt"),
    gqa(S, 0, [S, S], do_rotary=1, packed=True, dims=True, label="packed"),
    gqa(1, P, [P + 1, P + 1], do_rotary=1, dims=True, label="decode"),
    gqa(1, P, [P + 1, P - 2], do_rotary=1, dims=True, label="ragged"),
    gqa(1, P, [P + 1, P + 1], local_window_size=4, label="window"),
    gqa(S, 0, [S, S], local_window_size=2, softcap=5.0, dims=True, label="window-softcap"),
    gqa(S, 0, [S, S], do_rotary=1, rotary_interleaved=1, scale=0.3, label="interleaved"),
    gqa(S, 0, [S, S], smooth_softmax=1, label="smooth"),
]


@pytest.fixture(scope="module")
def compiled():
    return Compiled(CASES)


@pytest.mark.parametrize("c", CASES, ids=str)
def test_attention(compiled, c):
    check(compiled, c)
