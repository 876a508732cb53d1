"""Rules of matrix products against onnxruntime."""

import numpy as np
import pytest

from .harness import Compiled, case, check

rng = np.random.default_rng(0)


def f32(*shape):
    return rng.standard_normal(shape).astype(np.float32)


def u8(*shape):
    return rng.integers(0, 255, shape).astype(np.uint8)


def i8(*shape):
    return rng.integers(-128, 127, shape).astype(np.int8)


SHAPES = [((3, 4), (4, 5)), ((4,), (4, 5)), ((3, 4), (4,)), ((4,), (4,)), ((2, 3, 4), (4, 5)), ((2, 3, 4), (2, 4, 5))]
SHAPES += [((2, 1, 3, 4), (5, 4, 2)), ((3, 4), (2, 4, 5)), ((4,), (2, 4, 5))]

CASES = [
    *(case("MatMul", f32(*a), f32(*b), label=f"{len(a)}x{len(b)}") for a, b in SHAPES),
    case("MatMul", f32(2, 3, 4), f32(4, 5), dims={0: ("b", "s", 4)}),
    case("MatMul", f32(2, 6, 3, 8), f32(2, 6, 8, 9), dims={0: ("b", 6, "s", "d"), 1: ("b", 6, "d", "t")}),
    case("MatMul", f32(2, 6, 3, 9), f32(2, 1, 9, 8), dims={0: ("b", 6, "s", "t"), 1: ("b", 1, "t", 8)}),
    case("MatMul", f32(3, 4).astype(np.float64), f32(4, 5).astype(np.float64), label="double"),
    case("MatMul", i8(3, 4).astype(np.int32), i8(4, 5).astype(np.int32), label="integers"),
    case("Gemm", f32(3, 4), f32(4, 5), f32(5), alpha=0.5, beta=2.0),
    case("Gemm", f32(4, 3), f32(5, 4), transA=1, transB=1, label="transposed"),
    case("Gemm", f32(3, 4), f32(5, 4), f32(3, 1), transB=1, dims={0: ("m", 4), 2: ("m", 1)}),
    case("MatMulInteger", u8(3, 8), i8(8, 5)),
    case("MatMulInteger", u8(2, 3, 8), i8(8, 5), np.uint8(7), i8(5), dims={0: ("b", "s", 8)}),
    case("MatMulInteger", u8(3, 8), u8(8, 5), np.uint8(7), np.uint8(99), label="scalars"),
    case(
        "QLinearMatMul",
        u8(3, 8),
        np.float32(0.1),
        np.uint8(3),
        u8(8, 5),
        np.float32(0.02),
        np.uint8(9),
        np.float32(0.7),
        np.uint8(100),
    ),
    case(
        "QLinearMatMul",
        u8(3, 8),
        np.float32(0.1),
        np.uint8(3),
        i8(8, 5),
        (rng.random(5) * 0.1).astype(np.float32),
        np.zeros(5, np.int8),
        np.float32(0.7),
        np.uint8(100),
        label="columns",
    ),
    *(
        case("Einsum", *xs, equation=e, label=e)
        for e, xs in [
            ("ij,jk->ik", (f32(3, 4), f32(4, 5))),
            ("bhqd,bhkd->bhqk", (f32(2, 3, 4, 5), f32(2, 3, 6, 5))),
            ("...ij,...jk", (f32(2, 3, 4), f32(2, 4, 5))),
            ("ii->i", (f32(4, 4),)),
            ("ij->", (f32(3, 4),)),
            ("i,j->ij", (f32(3), f32(4))),
        ]
    ),
    case("Einsum", f32(2, 4, 5), f32(2, 6, 5), equation="bqd,bkd->bqk", dims={0: ("b", "q", 5), 1: ("b", "k", 5)}),
]


@pytest.fixture(scope="module")
def compiled():
    return Compiled(CASES)


@pytest.mark.parametrize("c", CASES, ids=str)
def test_matmul(compiled, c):
    check(compiled, c)
