"""What a report says of tuning, against records that are known."""

from __future__ import annotations

import itertools
import math

import pytest
from scipy.stats import kendalltau

from llmc.targets.detect import machine, native
from llmc.tune.database import Database
from llmc.tune.held_out import quality
from llmc.tune.record import Key, Record
from llmc.tune.report import task_reports
from llmc.tune.search import upper_cost
from llmc.tune.task import Measurement, Task
from tests.tune.records import measured, task
from tests.tune.synthetic import Machine, dense, sample

SHAPES = [(576, 576), (1536, 384), (384, 1536), (1024, 2048)]


def history(shapes: list[tuple[int, int]] = SHAPES, count: int = 40) -> list[tuple[Task, Measurement]]:
    law = Machine(0.02)
    return [(t, m) for s in shapes for t in [dense(*s)] for m in law.measure(t, sample(t, count, seed=s[0]))]


def test_a_search_as_it_went(tmp_path):
    """As the search itself counts: upper ends of intervals, the default to begin with, failures among the trials."""
    work = task()
    search = [
        measured(1.2, verified=False, MR=1),
        measured(0.9, verified=False, spread=0.05, MR=2),
        measured(0, "timeout", verified=False, MR=3),
        measured(0.91, verified=False, spread=0.01, MR=4),
        measured(0, "build", verified=False, MR=5),
    ]
    with Database(tmp_path / "t.db") as database:
        for m in search[:4]:
            database.add(work, m)
        database.add(work, measured(0.93, MR=4))
        database.add(work, measured(0, "wrong", MR=2))
        database.add(work, search[4])
        (report,) = task_reports(database.records())
    assert report.key == Key.of(work)
    costs = [upper_cost(work, m) for m in search]
    assert [t.cost for t in report.trials] == pytest.approx([c if math.isfinite(c) else None for c in costs])
    assert [t.best for t in report.trials] == pytest.approx([min(1, c) for c in itertools.accumulate(costs, min)])
    assert [t.status for t in report.trials] == ["ok", "ok", "timeout", "ok", "build"]
    assert report.failures == {"build": 1, "timeout": 1, "wrong": 1}
    assert report.best is not None and report.best.config["MR"] == 4
    assert (report.best.cost, report.best.noise) == pytest.approx((0.93, 0.01))


def test_keys_are_told_apart():
    records = [Record(Key.of(task(N)), measured(1.1, verified=False)) for N in (96, 64, 96)]
    found = task_reports(records)
    assert [len(r.trials) for r in found] == [1, 2]
    assert [r.key for r in found] == sorted(r.key for r in found)
    assert all(r.best is None and not r.failures for r in found)
    assert {(r.key.cpu, r.key.cores) for r in found} == {(machine().cpu, machine().cores)}
    assert {r.key.target_name for r in found} == {native().name}


def test_tasks_left_out_are_predicted():
    known = history()
    found = quality(known)
    assert found is not None and found.kind in ("regression", "ranking")
    assert len(found.tasks) == len(SHAPES)
    for held in found.tasks:
        truth = [math.log2(m.cost(t.points)) for t, m in known
                 if t.kernel.workload.key() == held.workload and m.status == "ok"]  # fmt: skip
        assert held.measured == pytest.approx(truth)
        assert held.tau == pytest.approx(kendalltau(held.predicted, truth).statistic)
    assert sum(held.tau for held in found.tasks) / len(found.tasks) > 0.5


def test_what_is_held_out_was_not_learnt(monkeypatch):
    """The model that predicts a task has never seen its records, failures included."""
    from llmc.tune import held_out

    learnt: list[set[str]] = []

    class Blind(held_out.CostModel):
        def predict(self, task, configs, threads=None, foreign=False):
            assert task.kernel.workload.key() not in learnt[-1] and learnt[-1]
            return super().predict(task, configs, threads, foreign)

        @staticmethod
        def fit(samples, seed=0, kind=None):
            return Blind(kind or "regression")

    def of(records):
        learnt.append({t.kernel.workload.key() for t, _ in records})

    monkeypatch.setattr(held_out, "CostModel", Blind)
    monkeypatch.setattr(held_out.Samples, "of", of)
    found = quality(history(count=6))
    assert found is not None and len(found.tasks) == len(SHAPES)
    assert all(held.tau is None for held in found.tasks), "a model without opinion orders nothing"


def test_one_task_says_nothing_of_others():
    assert quality([]) is None
    assert quality(history(SHAPES[:1])) is None
    failed = [(dense(96, 64), Measurement({"MR": 14}, "build", {}, "because"))]
    assert quality(history(SHAPES[:1]) + failed) is None
