"""Rules of com.microsoft's operators against onnxruntime, or numpy where it has no CPU kernel."""

import numpy as np
import pytest

from .harness import Compiled, case, check

rng = np.random.default_rng(0)
MS = "com.microsoft"


def f32(*shape):
    return rng.standard_normal(shape).astype(np.float32)


def u8(*shape):
    return rng.integers(0, 255, shape).astype(np.uint8)


def i8(*shape):
    return rng.integers(-128, 127, shape).astype(np.int8)


X = f32(2, 5, 48)
SYM = {0: ("b", "s", 48)}
SKIP_SYM = {0: ("b", "s", 48), 1: ("b", "s", 48)}
N, K, BLOCK = 24, 48, 16
SCALES = (rng.random((N, 3)) * 0.1).astype(np.float32)


def nbits(bits, *rest, **options):
    """MatMulNBits with constant weights."""
    codes = u8(N, 3, BLOCK * bits // 8)
    inputs = (X, codes, SCALES, *rest)
    const = [i for i in range(1, len(inputs)) if inputs[i] is not None]
    return case(
        "MatMulNBits", *inputs, domain=MS, const=const, N=N, K=K, bits=bits, block_size=BLOCK, tolerance=1e-4, **options
    )


def quick_gelu(x):
    return [x / (1 + np.exp(-1.702 * x))]


def split_gelu(x, bias):
    from math import erf

    left, right = np.split((x + bias).astype(np.float64), 2, -1)
    return [(left * 0.5 * right * (1 + np.vectorize(erf)(right / np.sqrt(2)))).astype(np.float32)]


TABLE, IDS = u8(7, 16), rng.integers(0, 7, (2, 3))
TABLE_SCALES = (rng.random((7, 2)) * 0.1).astype(np.float32)

CASES = [
    nbits(4, label="4bit", dims=SYM),
    nbits(4, u8(N, 2), label="4bit-zeros"),
    nbits(4, rng.random((N, 3)).astype(np.float32) * 15, label="4bit-float-zeros"),
    nbits(8, label="8bit"),
    nbits(4, None, None, f32(N), label="4bit-bias"),
    case("SkipLayerNormalization", X, f32(2, 5, 48), f32(48), f32(48), f32(48), domain=MS, epsilon=1e-5, dims=SKIP_SYM),
    case("SkipSimplifiedLayerNormalization", X, f32(2, 5, 48), f32(48), domain=MS, epsilon=1e-5, dims=SKIP_SYM),
    case("SkipSimplifiedLayerNormalization", X, f32(2, 5, 48), f32(48), f32(48), domain=MS, label="bias"),
    case(
        "EmbedLayerNormalization",
        rng.integers(0, 9, (2, 5)).astype(np.int32),
        rng.integers(0, 2, (2, 5)).astype(np.int32),
        f32(9, 48),
        f32(6, 48),
        f32(2, 48),
        f32(48),
        f32(48),
        domain=MS,
        outputs=2,
    ),
    *(case(op, X, domain=MS, dims=SYM) for op in ("Gelu", "FastGelu")),
    *(case(op, X, f32(48), domain=MS) for op in ("BiasGelu", "FastGelu")),
    case("QuickGelu", X, domain=MS, reference=quick_gelu),
    case("BiasSplitGelu", X, f32(48), domain=MS, reference=split_gelu),
    case("BiasAdd", X, f32(48), f32(2, 5, 48), domain=MS, reference=lambda x, b, skip: [x + b + skip]),
    case("FusedMatMul", f32(2, 4, 3), f32(2, 5, 4), domain=MS, transA=1, transB=1, alpha=0.5),
    case("FusedMatMul", f32(2, 3, 4), f32(4, 5), domain=MS, dims={0: ("b", 3, 4)}),
    case("FusedGemm", f32(3, 4), f32(4, 5), f32(5), domain=MS, activation="Relu"),
    case("FusedGemm", f32(3, 4), f32(4, 5), domain=MS, activation="LeakyRelu", activation_alpha=0.1, label="leaky"),
    case("FusedConv", f32(1, 3, 6, 6), f32(4, 3, 3, 3), f32(4), domain=MS, activation="Relu"),
    case(
        "DynamicQuantizeMatMul", X, i8(48, 6), np.float32(0.02), np.int8(0), f32(6), domain=MS, tolerance=1e-4, dims=SYM
    ),
    case(
        "MatMulIntegerToFloat",
        u8(3, 8),
        i8(8, 5),
        np.float32(0.1),
        (rng.random(5) * 0.1).astype(np.float32),
        np.uint8(9),
        np.zeros(5, np.int8),
        f32(5),
        domain=MS,
    ),
    case(
        "GatherBlockQuantized",
        TABLE[:, :8],
        IDS,
        TABLE_SCALES[:, :1],
        domain=MS,
        bits=4,
        block_size=16,
        const=[0, 2],
        dims={1: ("b", "s")},
        label="4bit",
    ),
    case(
        "GatherBlockQuantized",
        u8(7, 32),
        IDS,
        TABLE_SCALES,
        u8(7, 2),
        domain=MS,
        bits=8,
        block_size=16,
        const=[0, 2, 3],
        label="8bit",
    ),
    case(
        "QLinearAdd",
        u8(3, 8),
        np.float32(0.1),
        np.uint8(9),
        u8(3, 8),
        np.float32(0.2),
        np.uint8(100),
        np.float32(0.3),
        np.uint8(50),
        domain=MS,
    ),
    case(
        "QLinearMul",
        u8(3, 8),
        np.float32(0.1),
        np.uint8(9),
        u8(3, 8),
        np.float32(0.2),
        np.uint8(100),
        np.float32(2.0),
        np.uint8(120),
        domain=MS,
    ),
    case(
        "QLinearSigmoid",
        u8(3, 8),
        np.float32(0.1),
        np.uint8(128),
        np.float32(1 / 256),
        np.uint8(0),
        domain=MS,
        const=[1, 2, 3, 4],
    ),
    case(
        "QLinearLeakyRelu",
        u8(3, 8),
        np.float32(0.1),
        np.uint8(128),
        np.float32(0.1),
        np.uint8(99),
        domain=MS,
        alpha=0.3,
        const=[1, 2, 3, 4],
    ),
]


@pytest.fixture(scope="module")
def compiled():
    return Compiled(CASES)


@pytest.mark.parametrize("c", CASES, ids=str)
def test_contrib(compiled, c):
    check(compiled, c)
