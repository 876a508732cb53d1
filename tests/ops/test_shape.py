"""Rules of operators that move, select or make elements, against onnxruntime."""

import numpy as np
import pytest

from .harness import Compiled, case, check

rng = np.random.default_rng(0)
X = rng.standard_normal((2, 3, 4, 6)).astype(np.float32)
M = rng.standard_normal((4, 6)).astype(np.float32)
SYM = {0: ("b", 3, "s", 6)}


def i64(*values):
    return np.array(values, np.int64)


def shaped(op, x, *rest, **options):
    """A case whose inputs after the first are compile-time constants."""
    return case(op, x, *rest, const=[i + 1 for i, r in enumerate(rest) if r is not None], **options)


CASES = [
    shaped("Reshape", X, i64(2, 12, 6)),
    shaped("Reshape", X, i64(0, -1), dims=SYM, label="infer"),
    shaped("Reshape", X, i64(0, 3, -1, 3), dims=SYM, label="split"),
    shaped("Reshape", np.zeros((0, 3), np.float32), i64(3, 0), allowzero=1, label="zero"),
    case("Transpose", X),
    case("Transpose", X, perm=[0, 2, 1, 3], dims=SYM),
    case("Flatten", X, axis=2),
    case("Flatten", X, axis=-1, dims=SYM),
    case("Flatten", X, axis=0, label="rows"),
    shaped("Squeeze", X[:, :1], i64(1), dims={0: ("b", 1, "s", 6)}),
    case("Squeeze", X[:1, :1], label="all"),
    case("Squeeze", X[:1], axes=[0], opset=11),
    shaped("Unsqueeze", X, i64(0, -1), dims=SYM),
    case("Unsqueeze", X, axes=[1], opset=11),
    shaped("Expand", X[:, :, :1], i64(1, 4, 1)),
    shaped("Tile", M, i64(2, 3), dims={0: ("m", 6)}),
    case("Concat", X, X[:, :1], axis=1),
    case("Concat", X, X[:, :, :2], axis=-2, dims={0: ("b", 3, "s", 6), 1: ("b", 3, "t", 6)}),
    shaped("Split", X, i64(2, 4), axis=-1, outputs=2, dims=SYM),
    case("Split", X, axis=3, num_outputs=4, outputs=4, opset=18, label="uneven"),
    case("Split", X, axis=2, outputs=2, opset=13, label="equal"),
    case("Split", X, axis=3, split=[1, 5], outputs=2, opset=11),
    shaped("Slice", X, i64(1), i64(3), i64(2)),
    shaped("Slice", X, i64(1, 0), i64(2**63 - 1, -1), i64(2, 3), dims=SYM, label="open"),
    shaped("Slice", X, i64(-1), i64(2**63 - 1), i64(2), dims=SYM, label="last"),
    shaped("Slice", X, i64(0), i64(1), i64(2), dims=SYM, label="first"),
    shaped("Slice", X, i64(-1), i64(-(2**63)), i64(3), i64(-1), label="reverse"),
    shaped("Slice", X, i64(-1), i64(-(2**63)), i64(2), i64(-1), dims=SYM, label="reverse-symbolic"),
    shaped("Slice", X, i64(0), i64(5), i64(3), i64(2), label="step"),
    shaped("Slice", X, i64(-9), i64(9), i64(3), label="clamped"),
    shaped("Slice", X, i64(3), i64(1), i64(3), label="empty"),
    shaped("Slice", X, i64(1), i64(9), i64(2), dims=SYM, label="clamped-symbolic"),
    shaped("Slice", X, i64(0, 1), i64(1, 2), label="no-axes"),
    shaped("Pad", X, i64(0, 0, 1, 2, 0, 1, 0, 3), np.float32(1.5), dims=SYM),
    *(shaped("Pad", X, i64(0, 0, 1, 2, 0, 1, 0, 3), mode=m, label=m, opset=19) for m in ("edge", "reflect", "wrap")),
    shaped("Pad", X, i64(1, 2), None, i64(-1), label="axes"),
    shaped("Pad", X, i64(0, 0, -1, 0, 0, 0, 0, -2), label="crop"),
    case("Trilu", M),
    shaped("Trilu", M, np.array(-1, np.int64), upper=0, dims={0: ("m", "n")}),
    case("Shape", X, dims=SYM),
    case("Shape", X, start=1, end=-1),
    case("Size", X, dims=SYM),
    case("ConstantOfShape", i64(2, 3), value=np.array([7], np.int64), const=[0]),
    case("ConstantOfShape", i64(2, 3), const=[0], label="zeros"),
    case("Range", np.array(2), np.array(9), np.array(3), const=[0, 1, 2]),
    case("Range", np.array(9), np.array(2), np.array(-2), const=[0, 1, 2], label="down"),
    case("Range", np.float32(0), np.float32(1), np.float32(0.3), const=[0, 1, 2], label="float"),
    case("EyeLike", M, k=1),
    case("DepthToSpace", rng.standard_normal((1, 8, 2, 3)).astype(np.float32), blocksize=2),
    case("DepthToSpace", rng.standard_normal((1, 8, 2, 3)).astype(np.float32), blocksize=2, mode="CRD"),
    case("SpaceToDepth", rng.standard_normal((1, 2, 4, 6)).astype(np.float32), blocksize=2),
]


@pytest.fixture(scope="module")
def compiled():
    return Compiled(CASES)


@pytest.mark.parametrize("c", CASES, ids=str)
def test_shape(compiled, c):
    check(compiled, c)
