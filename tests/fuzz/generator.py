"""Random programs: a few steps of all kinds and now and then a motif, drawn by hypothesis."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis
import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tests.fuzz import elementwise, matrices, motifs, quantised, reduce, shapes
from tests.fuzz.program import Program
from tests.fuzz.sketch import Sketch

FAMILIES = (elementwise, elementwise, shapes, shapes, reduce, matrices, quantised)
MOST_STEPS = 10
BYTES = 8192  # more than a program takes


@st.composite
def programs(draw: Callable[[st.SearchStrategy], object]) -> Program:
    """Valid programs of one motif, some steps, or both."""
    s = Sketch(draw)
    if s.chance(25):
        s.float = "float32"
        s.choice(motifs.STEPS)(s)
        steps = s.integer(0, 3)
    else:
        steps = s.integer(1, MOST_STEPS)
    while steps or not s.nodes:
        s.choice(s.choice(FAMILIES).STEPS)(s)
        steps = max(0, steps - 1)
    return s.program()


def generate(seed: int, number: int) -> Program:
    """The program of that number, the same one whenever it is asked for.

    Bytes are drawn here and hypothesis reads them: left to itself, it makes many examples from parts of earlier ones.
    """
    made: list[Program] = []

    @settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @hypothesis.given(programs())
    def collect(program: Program) -> None:
        if program.outputs:  # none is left where all values are too large to compare
            made.append(program)

    random = np.random.default_rng([seed, number])
    while not made:  # bytes that do not suffice give nothing
        collect.hypothesis.fuzz_one_input(random.bytes(BYTES))
    return made[0]
