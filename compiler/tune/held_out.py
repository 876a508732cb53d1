"""How well the cost model knows what it has not seen: predictions for tasks that were left out of its training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmc.tune.cost_model import CostModel, Kind, Samples, tau
from llmc.tune.task import Measurement, Task

_FOLDS = 5  # and drawn as `cost_model.cross_validate` draws them


@dataclass(frozen=True)
class HeldOut:
    """A task's candidates: log2 of the time relative to the default's, as predicted without it and as measured.

    `tau` is Kendall's between the two, None where all of one side are equal.
    """

    template: str
    workload: str
    target: str
    predicted: tuple[float, ...]
    measured: tuple[float, ...]
    tau: float | None


@dataclass(frozen=True)
class Quality:
    """The kind of model that a search would take, and what it makes of each task that it did not learn from."""

    kind: Kind
    tasks: tuple[HeldOut, ...]


def quality(history: Sequence[tuple[Task, Measurement]], seed: int = 0) -> Quality | None:
    """Cross-validation over whole tasks; None where fewer than two were ever timed."""
    by_task: dict[tuple[str, str], list[tuple[Task, Measurement]]] = {}
    for task, measurement in history:
        by_task.setdefault((task.key, task.target.name), []).append((task, measurement))
    tasks = [found for found in by_task.values() if any(m.status == "ok" for _, m in found)]
    if len(tasks) < 2:
        return None
    kind = CostModel.fit(Samples.of(history), seed).kind
    folds = np.random.default_rng(seed).permutation(len(tasks)) % min(_FOLDS, len(tasks))
    held = list[HeldOut]()
    for fold in range(folds.max() + 1):
        others = [record for found, f in zip(tasks, folds, strict=True) if f != fold for record in found]
        model = CostModel.fit(Samples.of(others), seed, kind)
        held += [_held_out(model, found) for found, f in zip(tasks, folds, strict=True) if f == fold]
    return Quality(kind, tuple(sorted(held, key=lambda h: (h.template, h.workload, h.target))))


def _held_out(model: CostModel, found: Sequence[tuple[Task, Measurement]]) -> HeldOut:
    """One task's records; those that were measured at different points are predicted apart, at their own."""
    by_points: dict[Task, list[Measurement]] = {}
    for task, m in found:
        if m.status == "ok":
            by_points.setdefault(task, []).append(m)
    predicted, measured = list[float](), list[float]()
    for task, measurements in by_points.items():
        predicted += model.predict(task, [m.config for m in measurements]).mean.tolist()
        measured += [math.log2(m.cost(task.points)) for m in measurements]
    agreement = tau(np.array(predicted), np.array(measured))
    kernel = found[0][0].kernel
    return HeldOut(
        kernel.template.name,
        kernel.workload.key(),
        found[0][0].target.name,
        tuple(predicted),
        tuple(measured),
        None if math.isnan(agreement) else agreement,
    )
