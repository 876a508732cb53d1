"""What a linear does with its sums while they are still in registers: activations, as vectors and in numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from llmc.errors import KernelError
from llmc.targets.intrinsics import Simd
from llmc.targets.threads import Scalar
from llmc.tvm_shim import T

ACTIVATIONS = ("none", "relu", "relu6", "hard_swish", "gelu", "gelu_tanh", "silu", "silu_mul")
SINGLE = tuple(a for a in ACTIVATIONS if a != "silu_mul")  # those that act on one register


def apply(simd: Simd | Scalar, activation: str, value: Any) -> Any:
    """`activation` of one register of float32. `silu_mul` takes two registers: see `silu_mul`.

    gelu is x/2 (1 + erf(x/sqrt 2)), gelu_tanh its approximation 0.5x(1 + tanh(sqrt(2/pi)(x + 0.044715 x^3)))
    (Hendrycks and Gimpel, arXiv:1606.08415), written as x sigmoid(2z), which is the same function.
    """
    match activation:
        case "none":
            return value
        case "relu":
            return T.max(value, simd.f32(0))
        case "relu6":
            return T.min(T.max(value, simd.f32(0)), simd.f32(6))
        case "hard_swish":  # x max(0, min(1, x/6 + 1/2))
            gate = simd.fma(value, simd.f32(1 / 6), simd.f32(0.5))
            return value * T.min(T.max(gate, simd.f32(0)), simd.f32(1))
        case "silu":
            return value * simd.sigmoid(value)
        case "gelu":
            half = simd.f32(0.5)
            return value * simd.fma(simd.erf(value * simd.f32(math.sqrt(0.5))), half, half)
        case "gelu_tanh":
            cubic = simd.fma(value * value, simd.f32(0.044715), simd.f32(1))
            return value * simd.sigmoid(value * cubic * simd.f32(2 * math.sqrt(2 / math.pi)))
    raise KernelError(f"activation {activation!r} is not one that acts on a single register")


def silu_mul(simd: Simd | Scalar, gate: Any, up: Any) -> Any:
    """silu(gate) * up, one register of float32 each (SwiGLU, Shazeer, arXiv:2002.05202)."""
    return gate * simd.sigmoid(gate) * up


def reference(activation: str, y: np.ndarray) -> np.ndarray:
    """`activation` in float64. `y` [..., N]; silu_mul takes the gate from its first half, returns [..., N/2]."""
    y = y.astype(np.float64)
    match activation:
        case "none":
            return y
        case "relu":
            return np.maximum(y, 0)
        case "relu6":
            return np.clip(y, 0, 6)
        case "hard_swish":
            return y * np.clip(y / 6 + 0.5, 0, 1)
        case "silu":
            return y * _sigmoid(y)
        case "gelu":
            return y * 0.5 * (1 + np.vectorize(math.erf, otypes=[float])(y / math.sqrt(2)))
        case "gelu_tanh":
            return 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        case "silu_mul":
            gate, up = np.split(y, 2, axis=-1)
            return gate * _sigmoid(gate) * up
    raise KernelError(f"no activation is called {activation!r}")


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(x / 2))
