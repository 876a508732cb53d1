"""Where a search starts: with what the tasks most like it were tuned to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmc.schedules.base import Config
from llmc.tune import features
from llmc.tune.task import Measurement, Task

_NEIGHBOURS, _EACH = 3, 1


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
        best = sorted(measured, key=lambda m: m.cost(other.points))[:_EACH]
        found += [m.config for m in best if m.cost(other.points) < 1 and m.config not in found]
    return found


def distance(a: Task, b: Task) -> float:
    """Between two tasks of one template: of what the model sees of them, in factors of two."""
    x, y = (features.task_vector(t, t.points[0]) for t in (a, b))
    return float(np.sqrt(np.nansum((x - y) ** 2)))
