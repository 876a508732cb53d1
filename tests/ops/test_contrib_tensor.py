"""com.microsoft's operators on plain tensors against onnxruntime."""

import numpy as np
import pytest

from .contrib import Random, ms
from .harness import Compiled, check

R = Random(3)
f32 = R.f32


def matrices(*shape, dtype=np.float32):
    """Invertible, but not diagonally dominant: elimination has to exchange rows."""
    return (f32(*shape) + 0.1 * np.eye(shape[-1])).astype(dtype)


SWAPPED = np.array([[0, 2, 1], [1, 0, 0], [0, 1, 0]], np.float32)
IMAGE, GRID = f32(1, 2, 5, 6), (R.rng.random((1, 4, 3, 2)) * 2.4 - 1.2).astype(np.float32)

CASES = [
    ms("Inverse", matrices(4, 4), tolerance=1e-4),
    ms("Inverse", matrices(2, 3, 5, 5), tolerance=1e-3, dims={0: (2, "b", 5, 5)}),
    ms("Inverse", SWAPPED, label="swapped"),
    ms("Inverse", matrices(3, 4, 4, dtype=np.float64), label="double"),
    ms("Inverse", SWAPPED.astype(np.float16), label="half", tolerance=1e-3),
    ms("Trilu", f32(3, 4, 5), dims={0: (3, "m", "n")}),
    ms("Trilu", f32(4, 4), np.array(1), upper=0, const=[1], label="lower"),
    ms("Trilu", R.rng.integers(0, 9, (4, 4)), np.array(-1), const=[1], label="int64"),
    ms("ExpandDims", f32(2, 3), np.array(1, np.int32), const=[1], dims={0: ("m", 3)}),
    ms("ExpandDims", f32(2, 3), np.array(-1, np.int32), const=[1], label="last"),
    ms("ExpandDims", R.i8(2, 3), np.array(0, np.int32), const=[1], label="first"),
    ms("Pad", f32(2, 3), np.array([0, 1, 2, 0]), const=[1], dims={0: ("m", 3)}),
    ms("Pad", f32(2, 3), np.array([[1, 1, 1, 1]]), np.float32(7), const=[1, 2], label="value"),
    ms("Pad", f32(4, 3), np.array([1, 1, 1, 1]), const=[1], mode="reflect", label="reflect"),
    ms("Pad", f32(4, 3), np.array([1, 1, 1, 1]), const=[1], mode="edge", label="edge"),
    ms("Pad", f32(4, 5), np.array([-1, 1, 0, -2]), const=[1], label="negative"),
    ms("Range", np.array(1), np.array(9), np.array(2), const=[0, 1, 2]),
    ms("Range", np.float32(1), np.float32(4), const=[0, 1], label="default"),
    ms("Range", np.array(3), np.array(9), label="data"),
    ms("ExpandDims", f32(2, 3), np.array(-1, np.int32), label="data"),
    ms("Pad", f32(2, 3), np.array([[1, 0, 0, 2]]), label="data"),
    ms("Unique", np.array([3, 1, 3, 2, 1], np.float32), outputs=3),
    ms("GatherND", f32(3, 4, 5), R.rng.integers(0, 3, (2, 2)), dims={1: ("m", 2)}),
    ms("GatherND", f32(3, 4), R.i32(3, 5, 1), label="rows"),
    ms("UnfoldTensor", f32(2, 9), size=3, step=2, dims={0: ("m", 9)}),
    ms("UnfoldTensor", f32(6, 4), dim=0, size=2, label="first"),
    ms("CDist", f32(3, 8), f32(5, 8), metric="sqeuclidean", tolerance=1e-4, dims={0: ("m", 8), 1: ("n", 8)}),
    ms("CDist", f32(3, 8), f32(5, 8), metric="euclidean", tolerance=1e-4, label="euclidean"),
    ms("GridSample", IMAGE, GRID),
    ms("GridSample", IMAGE, GRID, padding_mode="border", align_corners=1, label="border"),
    ms("GridSample", IMAGE, GRID, mode="nearest", padding_mode="reflection", label="nearest"),
    ms("ConvTransposeWithDynamicPads", f32(1, 3, 4, 4), f32(3, 2, 3, 3), np.array([1, 1, 1, 1]), const=[2]),
    ms(
        "ConvTransposeWithDynamicPads",
        f32(1, 3, 4, 4),
        f32(3, 2, 3, 3),
        np.array([0, 1, 1, 0]),
        f32(2),
        const=[2],
        strides=[2, 2],
        label="strides",
    ),
]


@pytest.fixture(scope="module")
def compiled():
    return Compiled(CASES)


@pytest.mark.parametrize("c", CASES, ids=str)
def test_contrib_tensor(compiled, c):
    check(compiled, c)
