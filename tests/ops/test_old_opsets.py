"""Operators as opsets 7 to 10 had them, with attributes that became inputs later, against onnxruntime."""

import numpy as np
import pytest

from .harness import Compiled, case, check

rng = np.random.default_rng(0)
X = rng.standard_normal((2, 3, 4, 6)).astype(np.float32)
FLAT = rng.standard_normal((4, 5)).astype(np.float32)
SCALES = np.array([1, 1, 2, 1.5], np.float32)

CASES = [
    case("Clip", X, min=-0.5, max=0.7, opset=7),
    case("Clip", X, min=0.1, opset=10, dims={0: ("b", 3, "h", 6)}),
    case("Clip", X, opset=7, label="unbounded"),
    case("Slice", X, starts=[0, -2], ends=[1, 2**31 - 1], axes=[1, 3], opset=7),
    case("Slice", X, starts=[1], ends=[-1], axes=[2], opset=9, dims={0: ("b", 3, "h", 6)}),
    case("TopK", FLAT, k=2, axis=0, outputs=2, opset=9),
    case("TopK", FLAT, np.array([3]), const=[1], outputs=2, opset=10),
    case("TopK", FLAT, np.array([3]), outputs=2, label="runtime"),
    case("Upsample", X, scales=[1.0, 1.0, 2.0, 3.0], opset=7),
    case("Upsample", X, scales=[1.0, 1.0, 2.0, 2.0], mode="linear", opset=8, label="linear"),
    case("Upsample", X, SCALES, const=[1], opset=9),
    case("Resize", X, SCALES, const=[1], opset=10),
    case("Resize", X, SCALES, const=[1], mode="linear", opset=10, label="linear"),
    case("Pad", X, pads=[0, 1, 0, 2, 0, 0, 1, 0], value=1.5, opset=7),
    case("Pad", X, pads=[0, 0, 1, 2, 0, 0, 1, 2], mode="reflect", opset=10, label="reflect"),
    case("Squeeze", X[:, :1], axes=[1], opset=7),
    case("Unsqueeze", X, axes=[0, 3], opset=8),
    case("Split", X, axis=1, split=[1, 2], outputs=2, opset=7),
    case("Split", X, axis=3, outputs=3, opset=9, label="even"),
    case("ReduceSum", X, axes=[1, -1], keepdims=0, opset=7),
    case("ReduceLogSumExp", X, axes=[2], opset=10),
    case("Softmax", X, opset=7),
    case("LogSoftmax", X, axis=2, opset=9),
    case("Hardmax", X, axis=1, opset=7),
    case("Dropout", X, ratio=0.4, opset=7),
    case("BatchNormalization", X, *rng.random((4, 3)).astype(np.float32), opset=7),
    case("BatchNormalization", X, *rng.random((4, 3)).astype(np.float32), opset=9),
    case("Gemm", FLAT, FLAT.T.copy(), FLAT[:1, :4].copy(), alpha=0.5, opset=7),
    case("Flatten", X, axis=2, opset=8),
    case("Cast", X, to=7, opset=7),
    case("Expand", X[:, :, :1], np.array([2, 3, 4, 6]), const=[1], opset=8),
    case("Scatter", FLAT, np.array([[0, 2, 1, 0, 3]]), FLAT[:1] * 2, opset=9),
    case("OneHot", np.array([0, 2, 1]), np.array(4), np.array([0, 1], np.float32), const=[1], opset=9),
    case("ConstantOfShape", np.array([2, 3]), const=[0], opset=9),
    case("AveragePool", X, kernel_shape=[2, 2], strides=[1, 2], pads=[0, 1, 1, 0], opset=7),
    case("AveragePool", X, kernel_shape=[3, 3], ceil_mode=1, strides=[2, 2], opset=10),
    case("MaxPool", X, kernel_shape=[2, 2], opset=8),
    case("ArgMax", X, axis=1, opset=7),
    case("PRelu", X, FLAT[:3, :1].reshape(3, 1, 1).copy(), opset=7),
    case("Mean", X, X[:1], FLAT[:1, :1].copy(), opset=8),
    case("InstanceNormalization", X, *rng.random((2, 3)).astype(np.float32), opset=7, tolerance=1e-4),
]


@pytest.fixture(scope="module")
def compiled():
    return Compiled(CASES)


@pytest.mark.parametrize("c", CASES, ids=str)
def test_old_opsets(compiled, c):
    check(compiled, c)
