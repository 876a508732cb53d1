"""What is tuned, and what one measurement of it says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from llmc.schedules.base import Config, Kernel
from llmc.targets.base import Target

Status = Literal["ok", "build", "gate", "wrong", "unstable", "crash", "timeout", "memory"]
# How far a prediction was examined: compiled, its gates passed, ranked by a model of the machine; or its results seen
# to be right, too, where kernels are emulated.
Predicted = Literal["", "ranked", "emulated"]

LEAST_GAIN = 0.01  # a kernel is kept only if it is faster by this, beyond the noise
SLOWER = 0.03  # no point may be slower than the default by more


@dataclass(frozen=True)
class Point:
    """Sizes at which a kernel is timed, as (symbol, size) pairs, and how much this point counts."""

    dims: tuple[tuple[str, int], ...]
    weight: float = 1.0

    def sizes(self) -> dict[str, int]:
        return dict(self.dims)

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in self.dims)


@dataclass(frozen=True)
class Task:
    """One kernel on one target, with the points at which its configurations are compared.

    `calls` is how often the model runs the kernel: budgets follow calls times time.
    """

    kernel: Kernel
    target: Target
    points: tuple[Point, ...]
    calls: int = 1

    @property
    def key(self) -> str:
        """Names the task in databases and logs: template, its version, and the workload."""
        return f"{self.kernel.template.name}.{self.kernel.template.version}:{self.kernel.workload.key()}"


@dataclass(frozen=True)
class Timing:
    """Seconds a call at one point: the candidate, and the default configuration timed in turns with it. Those of a
    prediction are an analytic model's.

    `spread` is the relative half-width of the candidate-to-default ratio's interval.
    """

    seconds: float
    default_seconds: float
    spread: float

    @property
    def ratio(self) -> float:
        """Below 1 the candidate is faster than the default."""
        return self.seconds / self.default_seconds


@dataclass(frozen=True)
class Measurement:
    """What became of one candidate. `timings` by point (its text form), empty unless status is "ok".

    `verified`: measured with care, as every winner is before it is kept: the kernel as models use it, right at the
    template's corner sizes with three sets of inputs, and timed for longer. Only such records are ever chosen.

    `predicted`: empty for what was measured. Otherwise nobody ran it: `timings` are what an analytic model says, and a
    verified one is emulated, where that is possible, on a small workload of its configuration.

    `code`: what its machine code shows, as `features.BUILT` explains; empty where unknown.
    """

    config: Config
    status: Status
    timings: Mapping[str, Timing]
    detail: str = ""  # why it failed
    build_seconds: float = 0.0  # of CPU time
    verified: bool = False
    code: Mapping[str, float] = field(default_factory=dict)
    predicted: Predicted = ""

    def cost(self, points: tuple[Point, ...]) -> float:
        """Weighted geometric mean of the ratios to the default: what the search minimises. Infinite if not ok."""
        if self.status != "ok":
            return float("inf")
        total = sum(p.weight for p in points)
        product = 1.0
        for p in points:
            product *= self.timings[str(p)].ratio ** (p.weight / total)
        return product

    def noise(self, points: tuple[Point, ...]) -> float:
        """Relative half-width of the cost's interval: the points' spreads, by their weights."""
        total = sum(p.weight for p in points)
        return sum(self.timings[str(p)].spread * p.weight / total for p in points)

    def is_faster(self, points: tuple[Point, ...]) -> bool:
        """Is it faster than the default beyond the noise, and at no point slower by more than SLOWER?"""
        if self.status != "ok" or self.is_slower(points):
            return False
        return self.cost(points) * (1 + self.noise(points)) < 1 - LEAST_GAIN

    def is_slower(self, points: tuple[Point, ...]) -> bool:
        """Is it slower than the default at any point?"""
        return any(self.timings[str(p)].ratio > 1 + SLOWER for p in points)
