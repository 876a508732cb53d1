"""What a recurrent kernel computes: LSTM, GRU and RNN after their inputs were projected, and the same in numpy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from llmc.schedules.base import Arg, Arrays, Workload

GATES = {"lstm": 4, "gru": 3, "gru_after": 3, "rnn": 1}  # matrices that a cell's recurrent weight holds


@dataclass(frozen=True)
class RecurrentWorkload(Workload):
    """projected [steps, B, D * G * hidden] float32: x W^T and the biases that simply add, of D directions; steps and B
    are left to run time. With `initial` the states begin as h0 and, for an LSTM, c0 [D, B, hidden], else as zeros.

    y [steps, D, B, hidden] is the hidden state after every step, y_h and y_c [D, B, hidden] the last of each state.
    Gates stand in ONNX's order: lstm i, o, f, c; gru z, r, h. A gru's reset gate applies to the old state, that of
    gru_after to its product (ONNX's linear_before_reset), which adds a bias of its own before.
    """

    hidden: int
    cell: Literal["lstm", "gru", "gru_after", "rnn"] = "lstm"
    way: Literal["forward", "reverse", "bidirectional"] = "forward"
    initial: bool = False

    @property
    def gates(self) -> int:
        return GATES[self.cell]

    @property
    def directions(self) -> int:
        return 2 if self.way == "bidirectional" else 1

    def inputs(self) -> tuple[Arg, ...]:
        width = self.directions * self.gates * self.hidden
        states = self._states("h0", "c0") if self.initial else ()
        return (Arg("projected", ("steps", "B", width), "float32"), *states)

    def outputs(self) -> tuple[Arg, ...]:
        y = Arg("y", ("steps", self.directions, "B", self.hidden), "float32")
        return (y, *self._states("y_h", "y_c"))

    def _states(self, hidden: str, cell: str) -> tuple[Arg, ...]:
        names = (hidden, cell) if self.cell == "lstm" else (hidden,)
        return tuple(Arg(name, (self.directions, "B", self.hidden), "float32") for name in names)


def reference(w: RecurrentWorkload, inputs: Mapping[str, np.ndarray], weights: Mapping[str, Any]) -> Arrays:
    """The standard's equations in float64. `weights`: recurrent [D, G * hidden, hidden], and for gru_after bias
    [D, hidden]."""
    H, D = w.hidden, w.directions
    projected = inputs["projected"].astype(np.float64)
    steps, B, _ = projected.shape
    y = np.zeros((steps, D, B, H))
    last = {name: np.zeros((D, B, H)) for name in ("y_h", "y_c")}
    for d in range(D):
        R = np.asarray(weights["recurrent"][d], np.float64)
        x = projected[:, :, d * w.gates * H : (d + 1) * w.gates * H]
        h, c = (inputs[n][d].astype(np.float64) if n in inputs else np.zeros((B, H)) for n in ("h0", "c0"))
        backwards = w.way == "reverse" or d == 1
        for t in reversed(range(steps)) if backwards else range(steps):
            a, u = np.split(x[t], w.gates, -1), np.split(h @ R.T, w.gates, -1)
            if w.cell == "rnn":
                h = np.tanh(a[0] + u[0])
            elif w.cell == "lstm":
                i, o, f = (_sigmoid(a[g] + u[g]) for g in range(3))
                c = f * c + i * np.tanh(a[3] + u[3])
                h = o * np.tanh(c)
            else:
                z, r = (_sigmoid(a[g] + u[g]) for g in range(2))
                product = r * (u[2] + weights["bias"][d]) if w.cell == "gru_after" else (r * h) @ R[2 * H :].T
                h = (1 - z) * np.tanh(a[2] + product) + z * h
            y[t, d] = h
        last["y_h"][d], last["y_c"][d] = h, c
    return {arg.name: {"y": y, **last}[arg.name] for arg in w.outputs()}


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(x / 2))
