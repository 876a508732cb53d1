"""Rules that read images between pixels, against onnxruntime; DeformConv against ONNX's reference."""

import numpy as np
import pytest

from .harness import Compiled, case, check

rng = np.random.default_rng(0)


def f32(*shape):
    return rng.standard_normal(shape).astype(np.float32)


X, GRID = f32(2, 3, 6, 7), 1.4 * f32(2, 4, 5, 2)
ROIS = np.array([[0.5, 0.2, 4.3, 5.1], [1.0, 2.0, 6.5, 4.0], [-2.0, -1.0, 9.0, 8.0]], np.float32)
BATCH = np.array([0, 1, 0])
OFFSETS = f32(1, 2 * 4 * 2, 5, 5)
POOLED = np.concatenate(
    [np.array([[0], [1], [1]], np.float32), np.array([[0, 0, 5, 4], [2, 1, 3, 3], [1, 0, 6, 5]], np.float32)], 1
)

GRIDS = [
    case("GridSample", X, GRID, mode=m, padding_mode=p, align_corners=c, opset=20, label=f"{m}-{p}-{c}", tolerance=1e-4)
    for m in ("linear", "nearest", "cubic")
    for p in ("zeros", "border", "reflection")
    for c in (0, 1)
]
CASES = [
    *GRIDS,
    case("GridSample", X, GRID, mode="bilinear", opset=16, dims={0: ("b", 3, "h", "w"), 1: ("b", "p", "q", 2)}),
    case("GridSample", f32(1, 2, 3, 4, 5), f32(1, 2, 2, 3, 3), opset=20, label="volume", tolerance=1e-4),
    *(
        case(
            "RoiAlign",
            X,
            ROIS,
            BATCH,
            output_height=3,
            output_width=2,
            sampling_ratio=r,
            mode=m,
            opset=16,
            label=f"{m}-{r}",
            tolerance=1e-4,
        )
        for m in ("avg", "max")
        for r in (0, 2)
    ),
    case("RoiAlign", X, ROIS, BATCH, output_height=2, output_width=2, sampling_ratio=2, opset=10, tolerance=1e-4),
    case("RoiAlign", X, ROIS, BATCH, sampling_ratio=1, opset=16, dims={0: ("b", 3, "h", "w"), 1: ("r", 4), 2: ("r",)}),
    case("MaxRoiPool", X, POOLED, pooled_shape=[2, 3], spatial_scale=1.0),
    case("MaxRoiPool", X, POOLED, pooled_shape=[2, 2], spatial_scale=0.5, dims={0: ("b", 3, 6, 7), 1: ("r", 5)}),
    case(
        "DeformConv",
        f32(1, 2, 6, 6),
        f32(3, 2, 2, 2),
        OFFSETS[:, :8],
        f32(3),
        opset=19,
        tolerance=1e-4,
        reference="onnx",
    ),
    case(
        "DeformConv",
        f32(1, 2, 6, 6),
        f32(4, 1, 2, 2),
        OFFSETS,
        None,
        rng.random((1, 8, 5, 5)).astype(np.float32),
        group=2,
        offset_group=2,
        opset=19,
        tolerance=1e-4,
        reference="onnx",
        label="grouped",
    ),
]


@pytest.fixture(scope="module")
def compiled():
    return Compiled(CASES)


@pytest.mark.parametrize("c", CASES, ids=str)
def test_sampling(compiled, c):
    check(compiled, c)
