"""Where a search starts: with what the tasks most like it were tuned to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmc.schedules.base import Config
from llmc.tune import features
from llmc.tune.search import upper_cost
from llmc.tune.task import Measurement, Task

_NEIGHBOURS = 3


def starts(task: Task, history: Sequence[tuple[Task, Measurement]]) -> list[Config]:
    """The best configurations of the nearest other tasks of the same template, as far as they beat the default."""
    known: dict[tuple[str, str], list[tuple[Task, Measurement]]] = {}
    for other, m in history:
        same = other.key == task.key and other.target == task.target
        if not same and other.kernel.template.name == task.kernel.template.name and m.status == "ok":
            known.setdefault((other.key, other.target.name), []).append((other, m))
    near = sorted(known.values(), key=lambda measured: distance(task, measured[0][0]))[:_NEIGHBOURS]
    found: list[Config] = []
    for measured in near:  # perhaps at several sets of points: each counts at its own
        other, best = min(measured, key=lambda pair: upper_cost(*pair))
        if upper_cost(other, best) < 1 and best.config not in found:
            found.append(best.config)
    return found


def distance(a: Task, b: Task) -> float:
    """Between two tasks of one template: of what the model sees of them, in factors of two."""
    x, y = (features.task_vector(t, t.points[0]) for t in (a, b))
    return float(np.sqrt(np.nansum((x - y) ** 2)))
