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
    known: dict[tuple[str, str], tuple[Task, list[Measurement]]] = {}
    for other, m in history:
        same = other.key == task.key and other.target == task.target
        if not same and other.kernel.template.name == task.kernel.template.name and m.status == "ok":
            known.setdefault((other.key, other.target.name), (other, []))[1].append(m)
    near = sorted(known.values(), key=lambda item: distance(task, item[0]))[:_NEIGHBOURS]
    found: list[Config] = []
    for other, measured in near:
        best = min(measured, key=lambda m: upper_cost(other, m))
        if upper_cost(other, best) < 1 and best.config not in found:
            found.append(best.config)
    return found


def distance(a: Task, b: Task) -> float:
    """Between two tasks of one template: of what the model sees of them, in factors of two."""
    x, y = (features.task_vector(t, t.points[0]) for t in (a, b))
    return float(np.sqrt(np.nansum((x - y) ** 2)))
