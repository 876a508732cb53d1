"""MaxPool's places, MaxUnpool and Col2Im against onnxruntime."""

import numpy as np
import pytest

from .harness import Compiled, case, check

rng = np.random.default_rng(0)
X = rng.standard_normal((2, 3, 6, 8)).astype(np.float32)
COLUMNS = rng.standard_normal((2, 3 * 4, 5 * 4)).astype(np.float32)


def pooled(x):
    """2 x 2 maxima with their flat places."""
    n, c, h, w = x.shape
    tiles = x.reshape(n, c, h // 2, 2, w // 2, 2).transpose(0, 1, 2, 4, 3, 5).reshape(n, c, h // 2, w // 2, 4)
    flat = np.arange(x.size).reshape(x.shape)
    places = flat.reshape(n, c, h // 2, 2, w // 2, 2).transpose(0, 1, 2, 4, 3, 5).reshape(n, c, h // 2, w // 2, 4)
    best = tiles.argmax(-1)[..., None]
    return np.take_along_axis(tiles, best, -1)[..., 0], np.take_along_axis(places, best, -1)[..., 0]


CASES = [
    case("MaxPool", X, kernel_shape=[3, 2], strides=[2, 2], pads=[1, 0, 1, 1], outputs=2),
    case("MaxPool", X, kernel_shape=[2, 2], outputs=2, dims={0: ("b", "c", "h", "w")}),
    case("MaxPool", X, kernel_shape=[2, 3], outputs=2, storage_order=1, label="columns"),
    case("MaxPool", X, kernel_shape=[2, 2], dilations=[2, 2], outputs=2, label="dilated"),
    case("MaxUnpool", *pooled(X), kernel_shape=[2, 2], strides=[2, 2]),
    case(
        "MaxUnpool",
        *pooled(X),
        kernel_shape=[2, 2],
        strides=[2, 2],
        dims={0: ("b", 3, "h", "w"), 1: ("b", 3, "h", "w")},
    ),
    case("Col2Im", COLUMNS, np.array([6, 5]), np.array([2, 2]), const=[1, 2], opset=18),
    case("Col2Im", COLUMNS, np.array([6, 5]), np.array([2, 2]), const=[1, 2], opset=18, dims={0: ("b", 12, 20)}),
    case(
        "Col2Im",
        COLUMNS,
        np.array([5, 5]),
        np.array([2, 2]),
        const=[1, 2],
        opset=18,
        dilations=[1, 2],
        pads=[0, 0, 1, 1],
        label="dilated",
    ),
]


@pytest.fixture(scope="module")
def compiled():
    return Compiled(CASES)


@pytest.mark.parametrize("c", CASES, ids=str)
def test_unpool(compiled, c):
    check(compiled, c)


def test_max_unpool_into_a_larger_image(compiled):
    """Zeros lie behind what the window says; onnxruntime takes the places for the larger image's instead."""
    values, places = pooled(X)
    c = case("MaxUnpool", values, places, np.array([2, 3, 7, 9]), kernel_shape=[2, 2], strides=[2, 2], reference="onnx")
    check(Compiled([c]), c)
