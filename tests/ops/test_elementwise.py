"""Rules of elementwise operators against onnxruntime, or the ONNX reference where it has no kernel."""

import math

import numpy as np
import pytest
from onnx import TensorProto

from .harness import Compiled, case, check

rng = np.random.default_rng(0)
X = (rng.standard_normal((3, 37)) * 3).astype(np.float32)
Y = (rng.standard_normal((3, 37)) * 3).astype(np.float32)
ROW = rng.standard_normal(37).astype(np.float32)
INT, OTHER = rng.integers(-9, 9, (4, 5)), rng.integers(1, 5, (4, 5)) * np.array([1, -1, 1, -1, 1])
BYTE = rng.integers(0, 255, (4, 5)).astype(np.uint8)
BOOL, BOOL2 = X > 0, Y > 0
UNIT = rng.uniform(-0.95, 0.95, (3, 37)).astype(np.float32)
SYMBOLIC = {0: ("m", "n"), 1: ("n",)}

UNARY = [
    *[
        "Abs",
        "Neg",
        "Sign",
        "Ceil",
        "Floor",
        "Exp",
        "Erf",
        "Sin",
        "Cos",
        "Tan",
        "Sinh",
        "Cosh",
        "Tanh",
        "Atan",
        "Asinh",
        "Relu",
        "LeakyRelu",
        "ThresholdedRelu",
        "Elu",
    ],
    *[
        "Selu",
        "Celu",
        "Sigmoid",
        "HardSigmoid",
        "HardSwish",
        "Softplus",
        "Softsign",
        "Mish",
        "Shrink",
        "Identity",
        "Round",
        "Reciprocal",
    ],
]
HALVES = np.arange(-5, 5, dtype=np.float32) / 2  # ties, which round to even
ODD = np.array([0, math.inf, -math.inf, math.nan, 1], np.float32)

CASES = [
    *(case(op, X) for op in UNARY),
    *(case(op, X, dims={0: ("m", "n")}) for op in ("Tanh", "Sigmoid", "Relu", "Softplus")),
    *(case(op, UNIT) for op in ("Asin", "Acos", "Atanh")),
    *(case(op, np.abs(X) + 1) for op in ("Sqrt", "Log", "Acosh")),
    *(case(op, X.astype(np.float64)) for op in ("Abs", "Neg", "Relu", "Sigmoid")),
    *(case(op, INT) for op in ("Abs", "Neg", "Sign")),
    case("Round", HALVES, label="ties"),
    case("IsNaN", ODD),
    case("IsInf", ODD),
    case("IsInf", ODD, detect_negative=0, label="positive"),
    case("Relu", ODD[:3], label="inf"),
    case("Softplus", np.array([-200, 0, 200], np.float32), label="extreme"),
    case("Sigmoid", np.array([-200, 0, 200], np.float32), label="extreme"),
    case("Elu", X, alpha=0.3, label="alpha"),
    case("HardSigmoid", X, alpha=0.3, beta=0.1, label="alpha"),
    case("Gelu", X, tolerance=1e-5),
    case("Gelu", X, approximate="tanh", label="tanh"),
    case("Swish", X, opset=24, alpha=1.5, reference="onnx"),
    case("SwiGLU", X, Y, opset=28, reference="onnx"),
    *(case(op, X, Y) for op in ("Add", "Sub", "Mul", "Div", "Min", "Max", "Greater", "Less", "PRelu")),
    *(case(op, X, ROW, dims=SYMBOLIC) for op in ("Add", "Mul", "Div", "Equal", "GreaterOrEqual", "LessOrEqual")),
    *(case(op, ROW, X, dims={1: ("m", 37)}, label="left") for op in ("Sub", "Div", "Pow")[:2]),
    case("Add", X, np.float32(2.5), const=[1], label="scalar"),
    case("Mul", np.full((1,), 2.5, np.float32), X, const=[0], label="scalar"),
    case("Mul", np.full((1, 1, 1), 2.5, np.float32), X, const=[0], label="rank", dims={1: ("m", "n")}),
    *(case(op, INT, OTHER) for op in ("Add", "Mul", "Div", "Mod", "Min", "Max", "Equal")),
    *(case(op, INT.astype(np.int32), OTHER.astype(np.int32), label="i32") for op in ("Div", "Mod", "Sub")),
    case("Mod", INT, OTHER, fmod=1, label="fmod"),
    case("Mod", X, Y, fmod=1, label="float"),
    case("Pow", np.abs(X), Y),
    *(case("Pow", np.abs(X), np.float32(p), const=[1], label=str(p)) for p in (0.5, 2, 3, 1.7)),
    case("Pow", X, np.array(2, np.int64), const=[1], label="integer"),
    case("Pow", INT, np.abs(OTHER), label="integers"),
    case("Pow", INT.astype(np.int32), np.float32(2), const=[1], label="mixed"),
    case("BitShift", BYTE, (BYTE % 8).astype(np.uint8), direction="LEFT"),
    case("BitShift", BYTE, (BYTE % 8).astype(np.uint8), direction="RIGHT", label="right"),
    *(case(op, INT.astype(np.int32), OTHER.astype(np.int32)) for op in ("BitwiseAnd", "BitwiseOr", "BitwiseXor")),
    case("BitwiseNot", BYTE),
    *(case(op, BOOL, BOOL2) for op in ("And", "Or", "Xor", "Equal")),
    case("Not", BOOL),
    *(case(op, X, Y, ROW, dims={0: ("m", 37), 1: ("m", 37)}) for op in ("Sum", "Mean", "Min", "Max")),
    case("Max", X, label="single"),
    case("Where", BOOL, X, Y),
    case("Where", BOOL[:, :1], X, np.float32(-3e38), dims={0: ("m", 1), 1: ("m", "n")}, const=[2]),
    case("Where", BOOL, INT[0, 0], INT[1, 1], label="integers"),
    case("Clip", X, np.float32(-1), np.float32(2), const=[1, 2]),
    case("Clip", X, None, np.float32(2), label="max"),
    case("Clip", INT, np.array(-2), None, label="integers"),
    case("Clip", X, opset=9 + 2, label="none"),
    case("Cast", X * 100, to=TensorProto.INT32),
    case("Cast", X, to=TensorProto.BOOL, label="bool"),
    case("Cast", BOOL, to=TensorProto.FLOAT, label="from-bool"),
    case("Cast", INT, to=TensorProto.FLOAT, label="from-int64"),
    case("Cast", X, to=TensorProto.FLOAT16, label="half"),
    case("Cast", X.astype(np.float16), to=TensorProto.FLOAT, label="from-half"),
    case("Cast", BYTE, to=TensorProto.INT64, label="from-byte"),
    case("CastLike", X, INT),
    case("Dropout", X, outputs=2, opset=13),
    case("Add", X.astype(np.float16), Y.astype(np.float16), label="half", tolerance=1e-3, reference="onnx"),
    case("Dropout", X, np.float32(0.4), opset=13, const=[1], label="ratio"),
]


@pytest.fixture(scope="module")
def compiled():
    return Compiled(CASES)


@pytest.mark.parametrize("c", CASES, ids=str)
def test_elementwise(compiled, c):
    check(compiled, c)
