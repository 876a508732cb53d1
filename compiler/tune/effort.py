"""How much tuning a user asks for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Effort:
    """Trials for each task on average, candidates a batch, and seconds for everything, verification included."""

    trials: int
    batch: int
    seconds: float


EFFORTS = {
    "none": Effort(trials=0, batch=0, seconds=0),
    "quick": Effort(trials=16, batch=8, seconds=180),
    "full": Effort(trials=96, batch=8, seconds=900),
}
