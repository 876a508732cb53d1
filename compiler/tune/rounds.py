"""Two kernels timed on a device in short rounds, in turns: what slows it meets both, and leaves their ratio alone."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

import numpy as np

from llmc.tune.subject import undisturbed
from llmc.tune.task import Timing

BURST = 3  # calls in a round of one kernel
_LEAST = 4  # rounds at least
_BUDGET, _CAREFUL_BUDGET = 0.5, 2.0  # seconds at one point, those on the way to the device included
_NARROW, _CAREFUL_NARROW = 0.01, 0.004  # half-width of the ratio's interval that is tight enough
_HOPELESS = 1.2  # a candidate that is surely slower than this times the default need not be known better

Round = Callable[[], Sequence[float]]  # seconds of its calls


def alternate(candidate: Round, default: Round, careful: bool) -> Timing:
    """Rounds of both until their ratio is known, or the time for it is spent; longer with `careful`."""
    narrow, budget = (_CAREFUL_NARROW, _CAREFUL_BUDGET) if careful else (_NARROW, _BUDGET)
    ours: list[float] = []
    theirs: list[float] = []
    start = time.perf_counter()
    for turn in itertools.count(1):
        if turn % 2:
            theirs += default()
            ours += candidate()
        else:
            ours += candidate()
            theirs += default()
        (seconds, width), (usual, usual_width) = undisturbed(ours), undisturbed(theirs)
        ratio, spread = seconds / usual, float(np.hypot(width, usual_width))
        known = spread < narrow or ratio * (1 - spread) > _HOPELESS
        if turn >= _LEAST and (known or time.perf_counter() - start > budget):
            break
    return Timing(seconds, usual, spread)
