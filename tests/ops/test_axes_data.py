"""Axes, steps and other operands that are known at run time alone, against onnxruntime or ONNX's reference."""

import numpy as np
import pytest

from .harness import Compiled, case, check

rng = np.random.default_rng(0)
X = rng.standard_normal((2, 3, 4)).astype(np.float32)
IMAGE = rng.standard_normal((1, 2, 5, 4)).astype(np.float32)
ANY = {0: ("a", "b", 4)}
LIST = {1: ("n",)}  # as long as the run says


def numpy_of(f, **options):
    """A reference from a function of numpy and the values of the node's axes."""
    return lambda x, *rest: [f(x, *(tuple(r.tolist()) for r in rest), **options)]


CASES = [
    case("ReduceSum", X, np.array([1])),
    case("ReduceSum", X, np.array([-1, 0]), keepdims=0, dims=ANY),
    case("ReduceSum", X, np.array([], np.int64), label="all", dims=LIST),
    case("ReduceSum", X, np.array([2, 1]), label="some", dims=LIST),
    case("ReduceSum", X, np.array([], np.int64), noop_with_empty_axes=1, label="none", dims=LIST),
    case("ReduceSum", X, np.array([], np.int64), label="no elements"),
    case("ReduceMax", X, np.array([0, 2]), keepdims=0),
    case("ReduceMean", X, np.array([-2])),
    case("ReduceLogSumExp", X, np.array([1, 2]), keepdims=0),
    case("ReduceMin", (X * 100).astype(np.int32), np.array([0])),
    case("ReduceMin", X > 0, np.array([1]), opset=20, label="bool", reference=numpy_of(np.all, keepdims=True)),
    case("Squeeze", X[:1, :, :1], np.array([-1, 0])),
    case("Squeeze", X[:, :1], np.array([1]), dims={0: ("a", "b", "c")}),
    case("Unsqueeze", X, np.array([0, -1])),
    case("Unsqueeze", X, np.array([3, 1]), dims=ANY),
    case("CumSum", X, np.array(1), exclusive=1),
    case("CumSum", X, np.array(-1), reverse=1, dims=ANY),
    case("Trilu", X, np.array(-1)),
    case("Trilu", X, np.array(1), upper=0),
    case("Split", X, np.array([1, 3]), axis=2, outputs=2),
    case("Split", X, np.array([2, 0, 1]), axis=1, outputs=3, dims=ANY),
    case("Slice", X, np.array([1, 0]), np.array([3, -1]), np.array([2, 0]), np.array([1, 1]), label="axes"),
    case("Slice", X, np.array([-1]), np.array([-9]), np.array([1]), np.array([-2]), label="backwards", dims=ANY),
    case("Slice", X, np.array([0]), np.array([9]), np.array([-1]), np.array([2]), const=[1, 2], label="steps"),
    case("Pad", X, np.array([1, 0, 2, 1]), None, np.array([2, 0])),
    case("Pad", X, np.array([1, -1]), None, np.array([-1]), mode="edge", label="edge", dims=ANY),
    case("Resize", IMAGE, None, np.array([1, 1, 2, 1.5], np.float32)),
    case("Resize", IMAGE, None, np.array([1, 1, 0.6, 0.5], np.float32), mode="linear", antialias=1, label="antialias"),
    case("Resize", IMAGE, None, None, np.array([1, 2, 7, 3]), mode="cubic"),
    case("Resize", IMAGE, None, None, np.array([7, 3]), axes=[2, 3], mode="linear", dims={0: (1, 2, "h", "w")}),
    case(
        "Resize", IMAGE, None, None, np.array([9, 5]), axes=[2, 3], keep_aspect_ratio_policy="not_larger",
        label="ratio", dims={0: (1, 2, "h", "w")},
    ),
    case("Resize", IMAGE, None, np.array([1, 1, 0.5, 1.5], np.float32), const=[2], dims={0: (1, 2, "h", "w")}),
    case(
        "Resize", IMAGE, np.array([0.125, 0.25, 0.875, 1.25], np.float32), None, np.array([4, 6]), axes=[2, 3],
        mode="linear", coordinate_transformation_mode="tf_crop_and_resize", extrapolation_value=7.0, label="crop",
    ),
    case("AffineGrid", X[:, :2, :3], np.array([2, 1, 3, 5]), align_corners=1, reference="onnx"),
    case("AffineGrid", rng.standard_normal((1, 3, 4)).astype(np.float32), np.array([1, 1, 2, 3, 4]), reference="onnx"),
    case("Col2Im", rng.standard_normal((1, 8, 6)).astype(np.float32), np.array([3, 4]), np.array([2, 2])),
    case("DFT", IMAGE[..., :1], None, np.array(1), opset=20),
    case("DFT", IMAGE[..., :2], np.array(4), np.array(-2), opset=20, onesided=0, inverse=1),
    case("STFT", X.reshape(1, 24, 1), np.array(5), None, np.array(8)),
    case("Dropout", X, np.array(0.0, np.float32), np.array(True), outputs=2),
    case("Dropout", X, np.array(0.5, np.float32), np.array(False), outputs=2),
]  # fmt: skip


@pytest.fixture(scope="module")
def compiled():
    return Compiled(CASES)


@pytest.mark.parametrize("c", CASES, ids=str)
def test_axes_data(compiled, c):
    check(compiled, c)
