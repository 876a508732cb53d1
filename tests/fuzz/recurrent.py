"""LSTM, GRU and RNN over a few steps."""

from __future__ import annotations

import numpy as np

from tests.fuzz.program import Value
from tests.fuzz.sketch import ULPS, UNIT, Sketch, size_of

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def recurrent(s: Sketch) -> None:
    """One layer in one or both directions. A state is within [-1, 1], but for the cell of an LSTM.

    The recurrent weights of a unit sum up to at most a half, so that a step at most doubles an error of the state: each
    of the gates' slopes is below 1, and no more than three of them meet in one product.
    """
    op = s.choice(list(GATES))
    steps, batch, width, H = s.dim(), s.choice([1, 2, s.symbol("N")]), s.choice([2, 5, 8]), s.choice([1, 4, 8])
    count = s.most([steps])
    if count > 8:
        return
    x = s.input("float32", [steps, batch, width], -1, 1)
    direction = s.choice(["forward", "reverse", "bidirectional"])
    D, gates = 2 if direction == "bidirectional" else 1, GATES[op]
    w = s.constant("float32", [D, gates * H, width], -0.5, 0.5)
    r = s.constant("float32", [D, gates * H, H], -0.5 / H, 0.5 / H)
    bias = s.constant("float32", [D, 2 * gates * H], -0.5, 0.5) if s.chance(60) else None
    attrs: dict[str, int | str] = {"hidden_size": H, "direction": direction}
    if op == "GRU":
        attrs["linear_before_reset"] = s.integer(0, 1)
    start = [s.operand("float32", [D, batch, H], -1, 1)] if s.chance(50) else []
    own = (width * (width + ULPS) * size_of(w) + H + 4 * ULPS) * UNIT["float32"]
    error = np.full(2, own * 4.0**count)
    states = (D, batch, H)
    outputs: list[Value | None] = [
        Value("", "float32", (steps, *states), -1, 1, (error[0], error[1])) if s.chance(70) else None,
        Value("", "float32", states, -1, 1, (error[0], error[1])),
    ]
    if op == "LSTM":
        most = count + 1.0
        outputs.append(Value("", "float32", states, -most, most, (error[0], error[1])))
    s.nodes_of(op, [x, w, r, bias, None, *start], outputs, **attrs)


STEPS = [recurrent]
