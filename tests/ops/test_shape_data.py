"""Shapes that are known at run time alone: reshapes, slices, pads and the like, against onnxruntime."""

import numpy as np
import pytest

from .harness import Compiled, case, check

rng = np.random.default_rng(0)
X = rng.standard_normal((2, 3, 4)).astype(np.float32)
I64 = np.iinfo(np.int64)

CASES = [
    case("Reshape", X, np.array([4, 6])),
    case("Reshape", X, np.array([0, -1, 2]), label="inferred"),
    case("Reshape", X, np.array([0, -1]), dims={0: ("a", "b", 4)}),
    case("Expand", X[:, :1], np.array([2, 5, 4])),
    case("Expand", X, np.array([3, 1, 1, 1]), label="rank"),
    case("Tile", X, np.array([2, 1, 3])),
    case("ConstantOfShape", np.array([2, 0, 3]), label="empty"),
    case("ConstantOfShape", np.array([3, 2]), value=np.array([7], np.int32)),
    case("Range", np.array(2), np.array(11), np.array(3)),
    case("Range", np.array(1.0, np.float32), np.array(-2.0, np.float32), np.array(-0.5, np.float32), label="float"),
    case("Range", np.array(5, np.int32), np.array(1, np.int32), np.array(1, np.int32), label="empty"),
    case("OneHot", np.array([0, 2, -1]), np.array([4]), np.array([0, 1], np.float32)),
    case("TopK", X, np.array([2]), outputs=2),
    case("TopK", X, np.array([2]), outputs=2, axis=1, dims={0: ("a", "b", 4)}),
    case("Slice", X, np.array([0, 1]), np.array([2, 3]), np.array([0, 2]), const=[3]),
    case("Slice", X, np.array([-2, 5]), np.array([I64.max, -1]), np.array([1, 2]), const=[3], label="clamped"),
    case(
        "Slice",
        X,
        np.array([-1, 3]),
        np.array([I64.min, 0]),
        np.array([0, 2]),
        np.array([-1, -2]),
        const=[3, 4],
        label="backwards",
    ),
    case("Slice", X, np.array([1]), np.array([3]), np.array([1]), const=[3], dims={0: ("a", "b", 4)}),
    case("Pad", X, np.array([0, 1, 2, 0, 0, 1]), np.array(2, np.float32)),
    case("Pad", X, np.array([1, 2]), None, np.array([2]), const=[3], mode="reflect", label="reflect"),
    case("Pad", X, np.array([0, -1, 0, 0, 0, 1]), label="negative"),
]


@pytest.fixture(scope="module")
def compiled():
    return Compiled(CASES)


@pytest.mark.parametrize("c", CASES, ids=str)
def test_shape_data(compiled, c):
    check(compiled, c)
