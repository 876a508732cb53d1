"""Measurements as the arrays from which the cost model learns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from llmc.targets.base import Target
from llmc.tune import features
from llmc.tune.task import Measurement, Point, Task

_LEAST_NOISE = 0.02  # log2: even a quiet measurement is not trusted more


@dataclass(frozen=True)
class Samples:
    """Measurements as arrays of n rows, one for each candidate and point.

    X [n, features]; built [n, features of machine code], NaN where unknown; y [n] log2(time / default's time), NaN
    where the candidate failed; noise [n] spread in the same unit; group [n] numbers the pairs of task and point,
    task [n] the tasks.
    """

    X: np.ndarray
    built: np.ndarray
    y: np.ndarray
    noise: np.ndarray
    group: np.ndarray
    task: np.ndarray

    @staticmethod
    def of(
        records: Iterable[tuple[Task, Measurement]], target: Target | None = None, threads: int | None = None
    ) -> Samples:
        """Records of other targets than `target` are marked as foreign."""
        by_task: dict[tuple[str, str, tuple[Point, ...]], tuple[Task, list[Measurement]]] = {}
        for task, measurement in records:
            by_task.setdefault((task.key, task.target.name, task.points), (task, []))[1].append(measurement)
        # A kernel that was measured at several sets of points is one task all the same.
        numbers: dict[tuple[str, str], int] = {}
        parts: list[tuple[np.ndarray, ...]] = []
        for task, found in by_task.values():
            number = numbers.setdefault((task.key, task.target.name), len(numbers))
            foreign = target is not None and task.target.name != target.name
            configs = [m.config for m in found]
            built = _built(task, found)
            for point in task.points:
                timings = [m.timings.get(str(point)) for m in found]
                kept = [i for i, m in enumerate(found) if m.status != "ok" or timings[i] is not None]
                X = features.matrix(task, point, [configs[i] for i in kept], threads, foreign)
                y = np.array([np.log2(t.ratio) if (t := timings[i]) else np.nan for i in kept])
                noise = np.array([t.spread / np.log(2) if (t := timings[i]) else 0.0 for i in kept])
                group = np.full(len(kept), len(parts))
                parts.append((X, built[kept], y, noise, group, np.full(len(kept), number)))
        if not parts:
            widths = len(features.names()), 2 * len(features.BUILT)
            return Samples(*(np.empty((0, n), np.float32) for n in widths), *(np.empty(0) for _ in range(4)))
        return Samples(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def __len__(self) -> int:
        return len(self.y)

    def take(self, rows: np.ndarray) -> Samples:
        """The rows of an index or mask."""
        return Samples(*(getattr(self, column.name)[rows] for column in fields(self)))

    def timed(self) -> Samples:
        """Those that did not fail."""
        return self.take(~np.isnan(self.y))

    def with_code(self) -> Samples:
        """Those whose machine code is known, moved from `built` into their vectors X."""
        known = self.take(~np.isnan(self.built).all(axis=1))
        return replace(known, X=np.hstack([known.X, known.built]), built=np.full_like(known.built, np.nan))

    @property
    def weight(self) -> np.ndarray:
        """How much each row counts: quiet measurements more, up to a limit."""
        return 1 / (1 + (self.noise / _LEAST_NOISE) ** 2 / 4)


def _built(task: Task, found: Sequence[Measurement]) -> np.ndarray:
    """What follows the vectors of a task's measurements. Verified ones are built for all sizes, others often for one:
    only the latter compare with each other."""
    default = task.kernel.template.default(task.kernel.workload, task.target)
    codes = [{} if m.verified else m.code for m in found]
    base = next((code for m, code in zip(found, codes, strict=True) if code and m.config == default), {})
    return np.stack([features.built_vector(code, base) for code in codes])
