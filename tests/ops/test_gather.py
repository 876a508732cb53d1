"""Rules of gathers, scatters and searches against onnxruntime."""

import numpy as np
import pytest

from .harness import Compiled, case, check

rng = np.random.default_rng(0)
X = rng.standard_normal((4, 5, 6)).astype(np.float32)
PLACES = rng.integers(-4, 4, (2, 3))
GRID = np.argsort(rng.random((4, 5, 6)), axis=1)[:, :3] - 2  # distinct along axis 1, some negative
UPDATES = rng.standard_normal(GRID.shape).astype(np.float32)
PAIRS = np.array([[0, 1], [3, -1], [-2, 2]])
LAST = np.array(-1, np.int64)


def f32(*shape):
    return rng.standard_normal(shape).astype(np.float32)


CASES = [
    case("Gather", X, PLACES),
    case("Gather", X, PLACES.astype(np.int32), axis=0, dims={0: ("v", 5, 6), 1: ("b", "s")}),
    case("Gather", X, np.array(-1), axis=1, label="scalar"),
    case("Gather", X, PLACES, axis=-1, const=[1], label="constant"),
    case("GatherElements", X, GRID, axis=1),
    case("GatherElements", X, GRID, axis=1, dims={0: ("m", 5, 6), 1: ("m", "k", 6)}),
    case("GatherND", X, PAIRS),
    case("GatherND", X, np.array([[1], [0], [-1], [2]]), batch_dims=1, dims={0: ("m", 5, 6), 1: ("m", 1)}),
    case("ScatterElements", X, GRID, UPDATES, axis=1),
    *(case("ScatterElements", X, GRID, UPDATES, axis=1, reduction=r, label=r) for r in ("add", "mul", "min", "max")),
    case("ScatterElements", X, GRID, UPDATES, axis=1, dims={0: ("m", 5, 6), 1: ("m", 3, 6), 2: ("m", 3, 6)}),
    case("ScatterND", X, PAIRS, f32(3, 6)),
    case("ScatterND", X, PAIRS, f32(3, 6), dims={0: ("m", 5, 6), 1: ("n", 2), 2: ("n", 6)}),
    *(case("ScatterND", X, PAIRS, f32(3, 6), reduction=r, label=r) for r in ("add", "mul")),
    case("OneHot", PLACES, np.array(4), f32(2), const=[1]),
    case("OneHot", PLACES, np.array([4]), np.array([3, 9]), axis=0, const=[1], dims={0: ("a", "b")}),
    case("TopK", X, np.array([3]), const=[1], outputs=2),
    case("TopK", X, np.array([2]), const=[1], outputs=2, axis=1, largest=0, label="smallest"),
    case("TopK", X, np.array([2]), const=[1], outputs=2, dims={0: ("m", 5, 6)}),
    case("CumSum", X, LAST, const=[1]),
    case("CumSum", X, np.array(1), const=[1], exclusive=1, label="exclusive", dims={0: ("m", "n", 6)}),
    case("CumSum", X, np.array(1), const=[1], reverse=1, exclusive=1, label="reverse"),
    case("CumSum", PLACES, np.array(1, np.int32), const=[1], label="integers"),
]


@pytest.fixture(scope="module")
def compiled():
    return Compiled(CASES)


@pytest.mark.parametrize("c", CASES, ids=str)
def test_gather(compiled, c):
    check(compiled, c)
