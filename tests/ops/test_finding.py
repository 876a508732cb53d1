"""Rules whose result is as long as the data decides, against onnxruntime."""

import numpy as np
import pytest

from .harness import Compiled, case, check

rng = np.random.default_rng(0)
SPARSE = np.where(rng.random((3, 4, 5)) < 0.4, rng.standard_normal((3, 4, 5)), 0).astype(np.float32)
REPEATED = rng.integers(0, 6, 40)
ROWS = rng.integers(0, 2, (12, 3)).astype(np.float32)
BOXES = np.sort(rng.random((2, 30, 2, 2)), axis=2).reshape(2, 30, 4).astype(np.float32)  # y1 x1 y2 x2
SCORES = rng.random((2, 3, 30)).astype(np.float32)
THRESHOLDS = (np.array([8]), np.array([0.3], np.float32), np.array([0.2], np.float32))

CASES = [
    case("NonZero", SPARSE),
    case("NonZero", SPARSE, dims={0: ("a", 4, "c")}),
    case("NonZero", SPARSE > 0, label="bool"),
    case("NonZero", REPEATED, label="integers"),
    case("NonZero", np.zeros((2, 3), np.float32), label="nothing"),
    case("Compress", SPARSE, np.array([True, False, True]), axis=0),
    case("Compress", SPARSE, np.array([False, True, True]), axis=1, label="shorter"),
    case("Compress", SPARSE, REPEATED > 2, label="flat"),
    case("Compress", SPARSE, np.array([True, False, True, True]), axis=-2, dims={0: ("a", "b", 5), 1: ("b",)}),
    case("Unique", REPEATED, outputs=4),
    case("Unique", REPEATED, outputs=4, sorted=0, label="first"),
    case("Unique", REPEATED, outputs=4, sorted=0, dims={0: ("n",)}),
    case("Unique", ROWS, outputs=4, axis=0, label="rows"),
    case("Unique", ROWS.T.copy(), outputs=4, axis=1, sorted=0, label="columns"),
    case("Unique", ROWS, label="flat"),
    case("Unique", np.array([2.5], np.float32), outputs=4, label="one"),
    case("NonMaxSuppression", BOXES, SCORES, *THRESHOLDS),
    case("NonMaxSuppression", BOXES, SCORES, *THRESHOLDS, dims={0: ("b", "m", 4), 1: ("b", "c", "m")}),
    case("NonMaxSuppression", BOXES, SCORES, *THRESHOLDS, center_point_box=1, label="centred"),
    case("NonMaxSuppression", BOXES, SCORES, np.array([40]), THRESHOLDS[1], label="all"),
    case("NonMaxSuppression", BOXES, SCORES, label="none"),
]


@pytest.fixture(scope="module")
def compiled():
    return Compiled(CASES)


@pytest.mark.parametrize("c", CASES, ids=str)
def test_finding(compiled, c):
    check(compiled, c)
