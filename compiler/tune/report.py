"""What tuning did, as reports tell it: every task's trials in order, and what was kept in the end."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from llmc.tune.record import Best, Key, Record, best_of, parse_points
from llmc.tune.task import Status


@dataclass(frozen=True)
class Trial:
    """One candidate of a search. Costs are times relative to the default's, upper ends of their intervals.

    `cost` is its own, None if it failed; `best` the least up to here, at most 1: the default itself.
    """

    status: Status
    cost: float | None
    best: float


@dataclass(frozen=True)
class TaskReport:
    """The records under one key. `failures` counts those of any kind, by status; `trials` holds the search's alone.

    `best` is the best verified configuration, None if none beats the default beyond the noise.
    """

    key: Key
    trials: tuple[Trial, ...]
    failures: Mapping[str, int]
    best: Best | None


def task_reports(records: Iterable[Record]) -> tuple[TaskReport, ...]:
    """A report for every key, in the order of keys, from records that are in the order of their making."""
    by_key: defaultdict[Key, list[Record]] = defaultdict(list)
    for record in records:
        by_key[record.key].append(record)
    return tuple(_report(key, found) for key, found in sorted(by_key.items()))


def _report(key: Key, records: list[Record]) -> TaskReport:
    points = parse_points(key.points)
    trials, best = list[Trial](), 1.0
    for m in (r.measurement for r in records if not r.measurement.verified):
        cost = m.cost(points) * (1 + m.noise(points)) if m.status == "ok" else None
        best = best if cost is None else min(best, cost)
        trials.append(Trial(m.status, cost, best))
    statuses: list[str] = [r.measurement.status for r in records]
    failures = dict(sorted(Counter(s for s in statuses if s != "ok").items()))
    return TaskReport(key, tuple(trials), failures, best_of(records, points))
