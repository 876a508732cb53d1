"""com.microsoft's normalisations and activations against onnxruntime, or numpy where it has no CPU kernel."""

from math import erf

import numpy as np
import pytest

from .contrib import Random, ms
from .harness import Compiled, case, check

R = Random()
f32 = R.f32
X = f32(2, 5, 48)
SYM = {0: ("b", "s", 48)}
PAIR = {0: ("b", "s", 48), 1: ("b", "s", 48)}


def quick_gelu(x):
    return [x / (1 + np.exp(-1.702 * x))]


def split_gelu(x, bias):
    left, right = np.split((x + bias).astype(np.float64), 2, -1)
    return [(left * 0.5 * right * (1 + np.vectorize(erf)(right / np.sqrt(2)))).astype(np.float32)]


def embed(*, segments=True, mask=None, positions=None, outputs=2, label="", dims=None, **attrs):
    tables = f32(9, 48), f32(6, 48), f32(2, 48)
    inputs = [
        R.i32(9, 2, 5),
        R.i32(2, 2, 5) if segments else None,
        tables[0],
        tables[1],
        tables[2] if segments else None,
        f32(48),
        f32(48),
        mask,
        positions,
    ]
    while inputs[-1] is None:
        inputs.pop()
    return ms("EmbedLayerNormalization", *inputs, outputs=outputs, label=label, dims=dims or {}, **attrs)


def q_embed(segments, mask=None, label=""):
    u8 = R.u8
    inputs = [R.i32(9, 2, 5), R.i32(2, 2, 5) if segments else None, u8(9, 48), u8(6, 48)]
    inputs += [u8(2, 48) if segments else None, u8(48), u8(48), mask]
    kept = [True, True, segments, True, True]
    inputs += [np.float32(0.02) if k else None for k in kept] + [np.uint8(120) if k else None for k in kept]
    return ms("QEmbedLayerNormalization", *inputs, outputs=2, label=label, tolerance=1e-4)


MASK = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.int32)
SKIP = "SkipLayerNormalization"
SIMPLE = "SkipSimplifiedLayerNormalization"
HALF = {"tolerance": 5e-3}

CASES = [
    case("SimplifiedLayerNormalization", X, f32(48), epsilon=1e-6, dims=SYM),
    case("SimplifiedLayerNormalization", X, f32(5, 48), axis=1, label="two-axes"),
    ms(SKIP, X, f32(2, 5, 48), f32(48), f32(48), f32(48), epsilon=1e-5, dims=PAIR),
    ms(SKIP, X, f32(2, 5, 48), f32(48), label="gamma"),
    ms(SKIP, X, f32(2, 5, 48), f32(48), f32(48), label="beta"),
    ms(SKIP, X, f32(2, 5, 48), f32(48), None, f32(48), label="bias"),
    ms(SKIP, X, f32(1, 5, 48), f32(48), f32(48), label="one"),
    ms(SKIP, X, f32(5, 48), f32(48), f32(48), label="flat", dims={0: ("b", "s", 48), 1: ("s", 48)}),
    ms(SKIP, f32(7, 48), f32(7, 48), f32(48), f32(48), label="tokens"),
    ms(SKIP, *(R.f16(*s) for s in ((2, 5, 48), (2, 5, 48), (48,), (48,))), label="half", **HALF),
    ms(SIMPLE, X, f32(2, 5, 48), f32(48), epsilon=1e-5, dims=PAIR),
    ms(SIMPLE, X, f32(2, 5, 48), f32(48), f32(48), label="bias"),
    ms(SIMPLE, X, f32(1, 5, 48), f32(48), label="one"),
    ms(SIMPLE, X, f32(5, 48), f32(48), label="flat"),
    ms(SIMPLE, f32(7, 48), f32(7, 48), f32(48), label="tokens", dims={0: ("m", 48), 1: ("m", 48)}),
    ms(SIMPLE, *(R.f16(*s) for s in ((2, 5, 48), (2, 5, 48), (48,))), label="half", **HALF),
    ms("GatedRMSNorm", f32(2, 5, 48), f32(48), f32(2, 5, 48), dims={0: ("b", "s", 48), 2: ("b", "s", 48)}),
    ms("GatedRMSNorm", f32(2, 5, 48), f32(16), f32(2, 5, 48), epsilon=1e-3, label="heads"),
    ms("GatedRMSNorm", f32(2, 5, 48), f32(48), f32(2, 5, 48), activation="sigmoid", label="sigmoid"),
    ms("GatedRMSNorm", R.f16(2, 5, 48), R.f16(16), R.f16(2, 5, 48), label="half", **HALF),
    ms("BranchwiseRMSNorm", f32(2, 3, 16), dims={0: ("b", 3, 16)}),
    ms("BranchwiseRMSNorm", f32(2, 5, 3, 16), f32(16), label="shared"),
    ms("BranchwiseRMSNorm", f32(2, 3, 16), f32(3, 16), label="own"),
    ms("BranchwiseRMSNorm", f32(2, 48), f32(48), num_branches=3, label="flat"),
    embed(mask=MASK, dims={0: ("b", "s"), 1: ("b", "s"), 7: ("b", "s")}),
    embed(label="no-mask"),
    embed(segments=False, label="no-segments"),
    embed(positions=R.i32(6, 2, 5), label="positions"),
    embed(positions=R.i32(6, 1, 5), mask=MASK, outputs=3, label="shared-positions"),
    embed(outputs=3, mask=MASK, epsilon=1e-5, label="sum"),
    q_embed(True, MASK),
    q_embed(False, label="no-segments"),
    ms("Gelu", X, dims=SYM),
    ms("FastGelu", X, dims=SYM),
    ms("FastGelu", X, f32(48), label="bias"),
    ms("BiasGelu", X, f32(48), dims=SYM),
    ms("QuickGelu", X, dims=SYM),
    ms("QuickGelu", X, alpha=0.7, label="alpha"),
    ms("QuickGelu", X, reference=quick_gelu, label="numpy"),
    ms("BiasSplitGelu", X, f32(48), reference=split_gelu),
    ms("BiasAdd", X, f32(48), f32(2, 5, 48), reference=lambda x, b, skip: [x + b + skip]),
    ms("ScaledSiLU", X, alpha=0.8, dims=SYM),
    ms("ScaledSiLU", X, np.float32(1.3), label="input"),
    ms("GatedAdd", X, f32(2, 5, 48), f32(2, 5, 1)),
    ms(
        "LinearAttentionGate",
        f32(2, 5, 4),
        f32(4),
        f32(4),
        f32(2, 5, 4),
        outputs=2,
        dims={0: ("b", "s", 4), 3: ("b", "s", 4)},
    ),
    ms("LinearAttentionGate", f32(2, 5, 4), f32(4), f32(4), label="decay"),
]


@pytest.fixture(scope="module")
def compiled():
    return Compiled(CASES)


@pytest.mark.parametrize("c", CASES, ids=str)
def test_contrib_norm(compiled, c):
    check(compiled, c)
