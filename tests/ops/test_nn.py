"""Rules of softmax and normalisations against onnxruntime, or the ONNX reference where it has no kernel."""

import numpy as np
import pytest

from .harness import Compiled, case, check

rng = np.random.default_rng(0)


def f32(*shape):
    return rng.standard_normal(shape).astype(np.float32)


X, IMAGE = f32(2, 5, 24) * 3 + 1, f32(2, 6, 4, 5) * 2 + 1
SYM = {0: ("b", "s", 24)}
LN = {"outputs": 1, "tolerance": 1e-5}

CASES = [
    *(case(op, X, axis=a, label=f"axis{a}") for op in ("Softmax", "LogSoftmax") for a in (-1, 1)),
    *(case(op, X, dims=SYM) for op in ("Softmax", "LogSoftmax")),
    *(case(op, X, axis=1, opset=11) for op in ("Softmax", "LogSoftmax", "Hardmax")),
    case("Softmax", f32(2, 3, 4, 7), dims={0: ("b", 3, "s", "t")}),
    case("Softmax", np.array([[-3e38, 0, 80, 90], [-3e38] * 4], np.float32), label="extreme"),
    case("Hardmax", X),
    case("LayerNormalization", X, f32(24), f32(24), outputs=1),
    case("LayerNormalization", X, f32(24), f32(24), dims=SYM, epsilon=1e-3, outputs=3),
    case("LayerNormalization", X, f32(5, 24), axis=1, label="axis"),
    case("LayerNormalization", X * 1e-3 + 100, f32(24), f32(24), label="offset", tolerance=2e-2),
    case("RMSNormalization", X, f32(24), opset=23, reference="onnx"),
    case("RMSNormalization", X, f32(24), opset=23, reference="onnx", dims=SYM),
    case("SimplifiedLayerNormalization", X, f32(24), dims=SYM, epsilon=1e-5, axis=-1, stash_type=1),
    case("BatchNormalization", IMAGE, f32(6), f32(6), f32(6), np.abs(f32(6)), dims={0: ("b", 6, 4, "w")}),
    case("BatchNormalization", f32(4, 6), f32(6), f32(6), f32(6), np.abs(f32(6)), opset=14, label="2d"),
    case("InstanceNormalization", IMAGE, f32(6), f32(6), dims={0: ("b", 6, "h", "w")}),
    case("GroupNormalization", IMAGE, f32(6), f32(6), num_groups=3, reference="onnx"),
    case("GroupNormalization", IMAGE, f32(3), f32(3), num_groups=3, opset=18, reference="onnx"),
    case("MeanVarianceNormalization", IMAGE),
    case("LpNormalization", X, axis=1, p=1),
    case("LpNormalization", X, label="l2"),
    case("LRN", IMAGE, size=3, alpha=0.01, beta=0.6, bias=1.5),
]


@pytest.fixture(scope="module")
def compiled():
    return Compiled(CASES)


@pytest.mark.parametrize("c", CASES, ids=str)
def test_nn(compiled, c):
    check(compiled, c)
