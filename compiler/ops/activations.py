"""Activations by the names that recurrent and fused operators give them, with at most two parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmc.ops.scalar import const, exp, select, sigmoid, softplus, tanh
from llmc.tvm_shim import te

Scalar = Callable[[Any], Any]


@dataclass(frozen=True)
class Activation:
    """`build` takes a scalar and the parameters; `defaults` are the standard's, one for each parameter."""

    build: Callable[..., Any]
    defaults: tuple[float, ...] = ()

    def __call__(self, *parameters: float) -> Scalar:
        """The function of one scalar; parameters that are not given have their defaults."""
        values = (*parameters, *self.defaults[len(parameters) :])
        return lambda x: self.build(x, *(const(x, v) for v in values))


def _clip(x: Any, low: Any, high: Any) -> Any:
    return te.max(te.min(x, high), low)


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(lambda x: te.max(x, const(x, 0))),
    "tanh": Activation(tanh),
    "sigmoid": Activation(sigmoid),
    "softsign": Activation(lambda x: x / (const(x, 1) + te.abs(x))),
    "softplus": Activation(softplus),
    "affine": Activation(lambda x, alpha, beta: alpha * x + beta, (1.0, 0.0)),
    "leakyrelu": Activation(lambda x, alpha: select(x < const(x, 0), alpha * x, x), (0.01,)),
    "thresholdedrelu": Activation(lambda x, alpha: select(x > alpha, x, const(x, 0)), (1.0,)),
    "scaledtanh": Activation(lambda x, alpha, beta: alpha * tanh(beta * x), (1.0, 1.0)),
    "hardsigmoid": Activation(lambda x, alpha, beta: _clip(alpha * x + beta, const(x, 0), const(x, 1)), (0.2, 0.5)),
    "elu": Activation(lambda x, alpha: select(x < const(x, 0), alpha * (exp(x) - const(x, 1)), x), (1.0,)),
    "clip": Activation(_clip, (-3.4028234663852886e38, 3.4028234663852886e38)),
}
