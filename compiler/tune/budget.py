"""Which task the next trials go to: the one where they shorten the whole model most.

As the task scheduler of Ansor (Zheng et al., "Ansor: Generating High-Performance Tensor Programs for Deep Learning",
OSDI 2020), this follows the gradient of the model's time with respect to each task's trials, a blend of what its last
trials brought and of what may be hoped for. Ansor takes the hope from the task's speed compared with similar tasks;
here the cost model says how much it expects of the next trial. Gains count by the second of tuning, since a trial of
one kernel may cost ten of another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_PAST = 0.3  # weight of what the last trials brought


@dataclass(frozen=True)
class Standing:
    """Where one task's search stands.

    seconds: of the model's time, calls included, with the best configuration so far. trial_seconds: wall time of one
    trial. gained: log2 of the time a trial has taken off lately. hoped: log2 that the cost model expects of the next.
    """

    seconds: float
    trials: int
    trial_seconds: float
    gained: float
    hoped: float
    finished: bool

    @property
    def gain_rate(self) -> float:
        """Seconds off the model's time for each second of tuning."""
        gain = _PAST * self.gained + (1 - _PAST) * self.hoped
        return self.seconds * (1 - math.exp2(-gain)) / max(self.trial_seconds, 1e-9)


def next_task(standings: Sequence[Standing]) -> int | None:
    """Index of the task that gets the next batch; None if all are finished. Every task gets one, the longest first."""
    open_ = [i for i, s in enumerate(standings) if not s.finished]
    untried = [i for i in open_ if not standings[i].trials]
    if untried:
        return max(untried, key=lambda i: standings[i].seconds)
    return max(open_, key=lambda i: standings[i].gain_rate, default=None)
