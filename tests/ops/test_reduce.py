"""Rules of reductions against onnxruntime."""

import numpy as np
import pytest

from .harness import Compiled, case, check

rng = np.random.default_rng(0)
X = (rng.standard_normal((3, 4, 5)) + 0.2).astype(np.float32)
POSITIVE, INT = np.abs(X) + 0.1, rng.integers(-9, 9, (3, 4, 5))
TIES = rng.integers(0, 3, (4, 9)).astype(np.float32)
OPS = [
    "ReduceSum",
    "ReduceMean",
    "ReduceMax",
    "ReduceMin",
    "ReduceProd",
    "ReduceL1",
    "ReduceL2",
    "ReduceSumSquare",
    "ReduceLogSumExp",
]
SYM = {0: ("m", "n", 5)}

CASES = [
    *(case(op, X, np.array([-1]), const=[1], opset=18) for op in OPS),
    *(case(op, X, np.array([1, 2]), const=[1], opset=18, keepdims=0, dims=SYM) for op in OPS),
    *(case(op, X, opset=18, label="all") for op in OPS),
    case("ReduceLogSum", POSITIVE, np.array([1]), const=[1], opset=18),
    *(case(op, X, axes=[0, -1], keepdims=0, opset=11) for op in OPS if op != "ReduceSum"),
    case("ReduceSum", X, axes=[1], opset=11),
    case("ReduceSum", X, noop_with_empty_axes=1, label="noop"),
    *(case(op, INT, np.array([1]), const=[1], opset=18) for op in ("ReduceSum", "ReduceMax", "ReduceMin")),
    case("ReduceMean", INT.astype(np.int32), np.array([1]), const=[1], opset=18, label="integers"),
    *(case(op, TIES, axis=1) for op in ("ArgMax", "ArgMin")),
    *(case(op, TIES, axis=-1, keepdims=0, select_last_index=1, dims={0: ("m", "n")}) for op in ("ArgMax", "ArgMin")),
]


@pytest.fixture(scope="module")
def compiled():
    return Compiled(CASES)


@pytest.mark.parametrize("c", CASES, ids=str)
def test_reduce(compiled, c):
    check(compiled, c)


NOTHING = np.zeros((2, 0, 3), np.float32)
HIDDEN = np.full((2, 3), -np.inf, np.float32)
EDGES = [
    *(
        case(f"Reduce{op}", NOTHING, np.array([1]), const=[1], opset=20, reference="onnx", label="nothing")
        for op in ("Sum", "Max", "Min", "Prod", "SumSquare", "L1", "L2", "LogSum", "LogSumExp")
    ),
    case("ReduceMax", HIDDEN, np.array([1]), const=[1], opset=20, reference="onnx", label="infinite"),
    case("ReduceMin", -HIDDEN, np.array([0]), const=[1], opset=20, reference="onnx", label="infinite"),
    case("ReduceMax", HIDDEN < 0, np.array([0]), const=[1], opset=20, reference="onnx", label="bool"),
]


@pytest.mark.parametrize("c", EDGES, ids=str)
def test_edges(edges, c):
    """Nothing to reduce, nothing but infinities, and booleans."""
    check(edges, c)


@pytest.fixture(scope="module")
def edges():
    return Compiled(EDGES)
