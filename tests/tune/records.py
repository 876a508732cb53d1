"""Measurements made up for the tests of what stores them."""

from __future__ import annotations

from llmc.schedules.base import Kernel
from llmc.schedules.gemm.dense import DENSE, DenseLinearWorkload
from llmc.targets.detect import native
from llmc.tune.task import Measurement, Point, Status, Task, Timing

POINTS = (Point((("M", 1),)), Point((("M", 32),), 0.5))


def task(N: int = 96, K: int = 64, points: tuple[Point, ...] = POINTS) -> Task:
    return Task(Kernel(DENSE, DenseLinearWorkload(N, K)), native(), points)


def config(**changes: int) -> dict[str, int | str]:
    return {"MR": 8, "NV": 3, "KU": 4, "KC": 2048, "ahead": 4096} | changes


def measured(
    ratio: float,
    status: Status = "ok",
    verified: bool = True,
    spread: float = 0.01,
    points: tuple[Point, ...] = POINTS,
    **changes: int,
) -> Measurement:
    timings = {str(p): Timing(ratio * 1e-5, 1e-5, spread) for p in points} if status == "ok" else {}
    return Measurement(config(**changes), status, timings, "" if status == "ok" else "because", 0.25, verified)
