"""Types of a byte or less: every value read and made, against ml_dtypes."""

import ml_dtypes
import numpy as np
import pytest
from onnx import helper

from llmc.graph import NARROW
from llmc.ops.narrow import BITS

from .harness import Compiled, case

rng = np.random.default_rng(0)
FLOATS = sorted(t for t in NARROW - set(BITS) if t != "float8_e8m0fnu" and "float6" not in t)
EDGES = [
    0.0,
    -0.0,
    np.inf,
    -np.inf,
    np.nan,
    1e-7,
    -1e-7,
    1e6,
    -1e6,
    448.0,
    464.0,
    465.0,
    57344.0,
    61440.0,
    240.0,
    248.0,
    6.0,
]
NUMBERS = np.concatenate(
    [EDGES, rng.standard_normal(400), rng.standard_normal(400) * 2.0 ** rng.integers(-18, 18, 400)]
)
NUMBERS = NUMBERS.astype(np.float32)


def dtype(name):
    return np.dtype(getattr(ml_dtypes, name))


def code(name):
    return helper.np_dtype_to_tensor_dtype(dtype(name))


def every(name):
    """All values of a type, each once."""
    return np.arange(1 << ml_dtypes.finfo(dtype(name)).bits, dtype=np.uint8).view(dtype(name))


def whole(name):
    low, high = int(ml_dtypes.iinfo(dtype(name)).min), int(ml_dtypes.iinfo(dtype(name)).max)
    return np.arange(low, high + 1).astype(dtype(name))


def saturated(name):
    def cast(x):
        info = ml_dtypes.finfo(dtype(name))
        return [np.clip(x, np.float32(info.min), np.float32(info.max)).astype(dtype(name))]

    return cast


CASES = [
    *(
        case("Cast", every(t), to=1, opset=25, label=f"from-{t}", reference=lambda x: [x.astype(np.float32)])
        for t in FLOATS
    ),
    *(
        case("Cast", whole(t), to=1, opset=25, label=f"from-{t}", reference=lambda x: [x.astype(np.float32)])
        for t in BITS
    ),
    *(case("Cast", NUMBERS, to=code(t), opset=25, label=f"to-{t}", reference=saturated(t)) for t in FLOATS),
    *(
        case(
            "Cast",
            NUMBERS,
            to=code(t),
            saturate=0,
            opset=25,
            label=f"beyond-{t}",
            reference=lambda x, t=t: [x.astype(dtype(t))],
        )
        for t in FLOATS
        if t != "float4_e2m1fn"
    ),
    *(
        case(
            "Cast",
            np.arange(-20, 20),
            to=code(t),
            opset=25,
            label=f"to-{t}",
            reference=lambda x, t=t: [x.astype(dtype(t))],
        )
        for t in BITS
    ),
    case("Transpose", whole("int4").reshape(4, 4), opset=25, label="int4", reference=lambda x: [x.T]),
    case("Reshape", whole("uint2"), np.array([2, -1]), const=[1], opset=25, reference=lambda x, _: [x.reshape(2, -1)]),
]


@pytest.fixture(scope="module")
def compiled():
    return Compiled(CASES)


@pytest.mark.parametrize("c", CASES, ids=str)
def test_narrow(compiled, c):
    """Bit for bit, except that a NaN may have any of its codes."""
    (got,), (want,) = compiled.run(c), c.reference(*c.inputs)
    assert got.dtype == want.dtype
    a, b = got.astype(np.float32), want.astype(np.float32)
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(np.signbit(a[a == 0]), np.signbit(b[b == 0]))


POWERS = np.array([0.124, 0.25, 0.5, 0.7, 0.75, 0.8, 1.1, 1.5, 3.0, 2.0**100, np.inf, np.nan], np.float32)


def power(exponents):
    return [np.array([*exponents, 227, 254, 255], np.uint8).view(ml_dtypes.float8_e8m0fnu)]


ROUNDED = {"up": [124, 125, 126, 127, 127, 127, 128, 128, 129], "down": [123, 125, 126, 126, 126, 126, 127, 127, 128]}


@pytest.mark.parametrize("mode", ROUNDED)
def test_powers_of_two(mode):
    c = case("Cast", POWERS, to=code("float8_e8m0fnu"), round_mode=mode, opset=25)
    (got,), (want,) = Compiled([c]).run(c), power(ROUNDED[mode])
    np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8))
