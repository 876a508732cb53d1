"""Rules of convolutions, pooling and resizing against onnxruntime."""

import numpy as np
import pytest

from .harness import Compiled, case, check

rng = np.random.default_rng(0)


def f32(*shape):
    return rng.standard_normal(shape).astype(np.float32)


def u8(*shape):
    return rng.integers(0, 255, shape).astype(np.uint8)


X, W = f32(2, 4, 9, 8), f32(6, 4, 3, 3)
NONE = np.zeros(0, np.float32)


def resize(x, *, scales=None, sizes=None, **options):
    last = np.array(scales, np.float32) if scales else None
    rest = (None, last) if scales else (None, None, np.array(sizes, np.int64))
    return case("Resize", x, *rest, const=[2] if scales else [3], opset=19, tolerance=1e-4, **options)


CASES = [
    case("Conv", X, W, f32(6)),
    case("Conv", X, W, f32(6), pads=[1, 1, 1, 1], dims={0: ("b", 4, "h", "w")}, tolerance=1e-4),
    case("Conv", X, W, strides=[2, 2], pads=[1, 0, 2, 1], dilations=[2, 1], label="strided"),
    case("Conv", X, f32(8, 2, 3, 3), group=2, auto_pad="SAME_UPPER", label="grouped"),
    case("Conv", X, f32(4, 1, 3, 3), group=4, auto_pad="SAME_LOWER", strides=[2, 2], label="depthwise"),
    case("Conv", f32(2, 4, 16), f32(5, 4, 3), label="1d", dims={0: ("b", 4, "t")}, pads=[2, 0]),
    case("Conv", f32(1, 2, 5, 6, 4), f32(3, 2, 2, 3, 1), label="3d"),
    case("ConvInteger", u8(1, 3, 6, 5), u8(4, 3, 3, 3), np.uint8(9), np.uint8(120), pads=[1, 1, 1, 1]),
    case(
        "QLinearConv",
        u8(1, 3, 6, 5),
        np.float32(0.1),
        np.uint8(9),
        u8(4, 3, 3, 3),
        np.float32(0.02),
        np.uint8(120),
        np.float32(0.9),
        np.uint8(100),
        rng.integers(-99, 99, 4).astype(np.int32),
    ),
    case("ConvTranspose", X, f32(4, 3, 3, 3), f32(3), tolerance=1e-4),
    case(
        "ConvTranspose", X, f32(4, 3, 3, 2), strides=[2, 3], pads=[1, 0, 0, 1], output_padding=[1, 0], label="strided"
    ),
    case("ConvTranspose", X, f32(4, 2, 3, 3), group=2, dilations=[2, 1], label="grouped", tolerance=1e-4),
    case("ConvTranspose", X, f32(4, 2, 3, 3), strides=[2, 2], auto_pad="SAME_UPPER", label="same", tolerance=1e-4),
    case("ConvTranspose", f32(1, 2, 7), f32(2, 3, 4), strides=[2], dims={0: ("b", 2, "t")}),
    case("MaxPool", X, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    case("MaxPool", X, kernel_shape=[3, 2], strides=[2, 2], ceil_mode=1, label="ceil"),
    case("MaxPool", X, kernel_shape=[2, 2], dilations=[2, 2], dims={0: ("b", 4, "h", "w")}),
    case("AveragePool", X, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    case("AveragePool", X, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], count_include_pad=1, label="padded"),
    case("AveragePool", X, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1, label="ceil"),
    case("AveragePool", X, kernel_shape=[2, 2], auto_pad="SAME_UPPER", label="same"),
    case("LpPool", X, kernel_shape=[2, 2], p=3, tolerance=1e-4),
    *(case(op, X, dims={0: ("b", 4, "h", "w")}) for op in ("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")),
    *(resize(X, scales=[1, 1, 2, 1.5], mode=m, label=m) for m in ("nearest", "linear", "cubic")),
    *(
        resize(X, sizes=[2, 4, 5, 11], mode="linear", coordinate_transformation_mode=c, label=c)
        for c in ("asymmetric", "align_corners", "pytorch_half_pixel", "half_pixel_symmetric")
    ),
    *(
        resize(
            X,
            scales=[1, 1, 2, 0.7],
            mode="nearest",
            nearest_mode=m,
            coordinate_transformation_mode="asymmetric",
            label=m,
        )
        for m in ("floor", "ceil", "round_prefer_ceil", "round_prefer_floor")
    ),
    resize(X, scales=[1, 1, 0.6, 0.5], mode="linear", antialias=1, label="antialias"),
    resize(X, scales=[1, 1, 0.6, 1.8], mode="cubic", exclude_outside=1, cubic_coeff_a=-0.5, label="exclude"),
    resize(X, scales=[1, 1, 2, 2], label="batch", dims={0: ("b", 4, 9, 8)}),
]


@pytest.fixture(scope="module")
def compiled():
    return Compiled(CASES)


@pytest.mark.parametrize("c", CASES, ids=str)
def test_conv(compiled, c):
    check(compiled, c)
