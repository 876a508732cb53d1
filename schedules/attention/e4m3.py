"""Numbers of 8 bits as caches hold them: sign, 4 bits of exponent, 3 of mantissa ("FP8 formats for deep learning",
Micikevicius et al., 2022), up to 448.

Shifted by 20 bits a code is the float32 that is 2**120 times smaller, subnormal numbers included: no instructions are
needed that only some machines have. A code is an int8: the byte, whose upper bit is the sign.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llmc.tvm_shim import T

LARGEST = 448
_MANTISSA = 20  # bits of float32's that are left out
_SIGN_AND_NUMBER = -0x78100000  # of a shifted code: bits 31 and 26 to 20
_DOWN, _UP = 2.0**-120, 2.0**120  # between exponents' biases


def rounded(y: Any, n: int = 1) -> Any:
    """Codes, as int32, of `n` float32 in [-448, 448]: to nearest, ties to even. Zero has one code."""
    bits = T.bind(T.reinterpret(_vector("int32", n), y * _splat(T.float32(_DOWN), n)))
    number = T.bind(T.bitwise_and(bits, _i32(0x7FFFFFFF, n)))
    even = T.bitwise_and(T.shift_right(number, _i32(_MANTISSA, n)), _i32(1, n))
    number = T.bind(T.shift_right(number + even + _i32((1 << _MANTISSA - 1) - 1, n), _i32(_MANTISSA, n)))
    sign = T.shift_right(bits, _i32(31, n))  # 0, or all bits
    return number + T.Select(number > _i32(0, n), sign * _i32(128, n), _i32(0, n))


def rounded_number(y: Any, n: int = 1) -> Any:
    """`rounded`, as the float32 that has the code's number."""
    return T.Cast(_vector("float32", n), rounded(y, n))


def widened(codes: Any, n: int = 1) -> Any:
    """The float32 of `n` codes, which are int32."""
    bits = T.bitwise_and(T.shift_left(codes, _i32(_MANTISSA, n)), _i32(_SIGN_AND_NUMBER, n))
    return T.reinterpret(_vector("float32", n), bits) * _splat(T.float32(_UP), n)


def rounded_array(y: np.ndarray) -> np.ndarray:
    """`rounded` for float32 of any shape, as int8."""
    bits = (y.astype(np.float32) * np.float32(_DOWN)).view(np.int32)
    number = bits & 0x7FFFFFFF
    number = (number + (number >> _MANTISSA & 1) + ((1 << _MANTISSA - 1) - 1)) >> _MANTISSA
    return (number + np.where(number > 0, (bits >> 31) * 128, 0)).astype(np.int8)


def widened_array(codes: np.ndarray) -> np.ndarray:
    """`widened` for int8 of any shape."""
    bits = codes.astype(np.int32) << _MANTISSA & np.int32(_SIGN_AND_NUMBER)
    return np.asarray(bits.view(np.float32) * np.float32(_UP))


def _vector(dtype: str, n: int) -> str:
    return dtype if n == 1 else f"{dtype}x{n}"


def _i32(value: int, n: int) -> Any:
    return _splat(T.int32(value), n)


def _splat(value: Any, n: int) -> Any:
    return value if n == 1 else T.broadcast(value, n)
