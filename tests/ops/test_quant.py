"""Rules of quantisation against onnxruntime."""

import ml_dtypes
import numpy as np
import pytest

from .harness import Compiled, case, check

rng = np.random.default_rng(0)
X = (rng.standard_normal((4, 64)) * 3).astype(np.float32)
I8 = rng.integers(-128, 127, (4, 64)).astype(np.int8)
U8 = rng.integers(0, 255, (4, 64)).astype(np.uint8)
I4 = rng.integers(-8, 7, (4, 64)).astype(ml_dtypes.int4)
U4 = rng.integers(0, 15, (4, 64)).astype(ml_dtypes.uint4)
SCALE = np.float32(0.05)
ROWS = (rng.random(4) * 0.1 + 0.01).astype(np.float32)
BLOCKS = (rng.random((4, 4)) * 0.1 + 0.01).astype(np.float32)
SYM = {0: ("m", 64)}


def dequantized(x, scale, zero=None):
    zero = 0 if zero is None else np.repeat(zero, 16, 1).astype(np.float32)
    return [(x.astype(np.float32) - zero) * np.repeat(scale, 16, 1)]


CASES = [
    case("QuantizeLinear", X, SCALE, np.uint8(128), dims=SYM),
    case("QuantizeLinear", X, SCALE, np.int8(3)),
    case("QuantizeLinear", X, SCALE, label="default"),
    case("QuantizeLinear", X, SCALE, np.int16(3), label="int16"),
    case("QuantizeLinear", X, ROWS, np.zeros(4, np.int8), axis=0, label="axis"),
    case("QuantizeLinear", X, BLOCKS, np.zeros((4, 4), np.int8), axis=1, block_size=16, label="blocked"),
    case("QuantizeLinear", np.arange(-5, 6, dtype=np.float32) / 2, np.float32(1), np.int8(0), label="ties"),
    case("DequantizeLinear", U8, SCALE, np.uint8(128), dims=SYM),
    case("DequantizeLinear", I8, SCALE),
    case("DequantizeLinear", I8, ROWS, np.arange(4, dtype=np.int8), axis=0, label="axis"),
    case("DequantizeLinear", I8, BLOCKS, rng.integers(-9, 9, (4, 4)).astype(np.int8), axis=1, block_size=16),
    case("DequantizeLinear", X.astype(np.int32), SCALE, label="int32"),
    case("DequantizeLinear", I4, BLOCKS, axis=1, block_size=16, const=[0], label="int4", reference=dequantized),
    case(
        "DequantizeLinear",
        U4,
        BLOCKS,
        rng.integers(0, 15, (4, 4)).astype(ml_dtypes.uint4),
        axis=-1,
        block_size=16,
        const=[0, 2],
        label="uint4",
        reference=dequantized,
    ),
    case("DynamicQuantizeLinear", X, outputs=3, dims={0: ("m", "n")}),
    case("DynamicQuantizeLinear", np.abs(X), outputs=3, label="positive"),
    case("DynamicQuantizeLinear", np.zeros((3, 4), np.float32), outputs=3, label="zeros"),
]


@pytest.fixture(scope="module")
def compiled():
    return Compiled(CASES)


@pytest.mark.parametrize("c", CASES, ids=str)
def test_quant(compiled, c):
    check(compiled, c)
