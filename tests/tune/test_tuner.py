from __future__ import annotations

import dataclasses
import time

import pytest

from llmc.errors import KernelError
from llmc.schedules.attention.kv_append import KV_APPEND
from llmc.schedules.attention.workloads import KVAppendWorkload
from llmc.schedules.base import Kernel
from llmc.schedules.embedding.lowbit import LOWBIT_EMBEDDING, LowBitEmbeddingWorkload
from llmc.targets.x86 import AVX512
from llmc.tune.task import Measurement, Timing
from llmc.tune.tasks import points_of, tasks_of
from llmc.tune.tuner import tune
from tests.tune.synthetic import Journal, Machine, Still, attention, dense, norm

SMALL, LARGE = dense(576, 576), dense(1024, 2048)


def test_every_task_ends_faster_or_with_its_default():
    journal = Journal()
    results = tune([SMALL, LARGE], Machine(0.01), journal, trials=32, seed=1)
    for task, result in zip((SMALL, LARGE), results, strict=True):
        assert result.task is task
        assert Machine().cost(task, result.config) == result.ratio
        assert result.ratio < 0.97 if result.verified else result.ratio == 1
        assert result.curve[-1] == min(result.curve)
    assert any(r.verified for r in results)
    assert len(journal.records) > sum(len(r.trials) for r in results), "all trials, and verifications"


def test_what_is_lucky_once_is_not_kept():
    machine = Still(noise=0.1)
    results = tune([SMALL], machine, Journal(), trials=24)
    assert any(t.measurement.cost(SMALL.points) < 0.95 for t in results[0].trials), "some candidate looked faster"
    assert any(careful for _, _, careful in machine.asked)
    assert results[0].verified is None
    assert results[0].config == SMALL.kernel.template.default(SMALL.kernel.workload, AVX512)


def test_a_winner_is_nowhere_slower():
    def careful(*ratios: float, spread: float = 0.005, status: str = "ok") -> Measurement:
        timings = {str(p): Timing(r, 1.0, spread) for p, r in zip(SMALL.points, ratios, strict=True)}
        return Measurement({}, status, timings)  # type: ignore[arg-type]

    assert careful(0.9, 0.95, 1.0).is_faster(SMALL.points)
    assert not careful(0.7, 0.9, 1.1).is_faster(SMALL.points), "slower at one point"
    assert not careful(0.97, 0.97, 0.97, spread=0.04).is_faster(SMALL.points), "within the noise"
    assert not Measurement({}, "wrong", {}).is_faster(SMALL.points)


def test_trials_are_bounded_and_go_to_the_longer_task():
    heavy = dataclasses.replace(LARGE, calls=1000)
    results = tune([SMALL, heavy], Machine(0.005), Journal(), trials=24, seed=2)
    counts = [len(r.trials) for r in results]
    assert sum(counts) <= 48
    assert counts[1] > counts[0] >= 4, "every task gets a batch, and the rest goes where most can be won"


@pytest.mark.alone
def test_time_budget():
    class Slow(Machine):
        def measure(self, task, configs, *, careful=False):
            for m in super().measure(task, configs, careful=careful):
                time.sleep(0.02)
                yield m

    begin = time.monotonic()
    results = tune([SMALL, LARGE], Slow(), Journal(), trials=10_000, time_budget_s=1.5)
    assert time.monotonic() - begin < 3
    assert all(r.trials for r in results)


def test_what_is_known_is_not_measured_again():
    journal = Journal()
    tune([SMALL], Machine(), journal, trials=16)
    before = {tuple(sorted(m.config.items())) for _, m in journal.records}
    machine = Machine()
    tune([SMALL], machine, Journal(), trials=16, history=journal.records)
    after = {tuple(sorted(config.items())) for _, config, careful in machine.asked if not careful}
    assert after and not after & before


def test_known_winners_need_no_trials():
    journal = Journal()
    first = tune([SMALL], Machine(), journal, trials=32)
    again = tune([SMALL], Machine(), Journal(), trials=0, history=journal.records)
    assert not again[0].trials and again[0].ratio <= first[0].ratio


def test_interrupts_keep_what_was_measured():
    journal, machine = Journal(), Machine(interrupt_after=13)
    results = tune([SMALL], machine, journal, trials=1000)
    assert len(results[0].trials) == 13
    assert len([m for _, m in journal.records]) >= 13
    assert results[0].verified is not None, "the best of them was still verified"


def test_progress_tells_where_the_run_stands():
    events = []
    tune([SMALL, LARGE], Machine(0.01), Journal(), trials=16, time_budget_s=60, progress=events.append)
    assert [e.done for e in events if e.phase == "search"] == list(range(1, 33))
    assert {e.task.key for e in events} == {SMALL.key, LARGE.key}
    assert all(e.total == 32 and 0 <= e.seconds_left <= 60 and e.trials_per_second > 0 for e in events)
    assert events[-1].phase == "verify" and events[-1].best < 1
    failures = [sum(e.failures.values()) for e in events]
    assert failures == sorted(failures)


def test_the_same_seed_tunes_the_same():
    runs = [tune([SMALL], _NoFailures(), Journal(), trials=16, seed=7) for _ in range(2)]
    assert [[t.measurement.config for t in r.trials] for r in runs[0]] == [
        [t.measurement.config for t in r.trials] for r in runs[1]
    ]


class _NoFailures(Still):
    def __init__(self) -> None:
        super().__init__(0.02, seed=3)


def test_a_broken_default_spoils_its_own_task_only():
    class Broken(Machine):
        def measure(self, task, configs, *, careful=False):
            if task is LARGE:
                raise KernelError("its default configuration cannot be measured")
            return super().measure(task, configs, careful=careful)

    broken, sound = tune([LARGE, SMALL], Broken(), Journal(), trials=32)
    assert "cannot be measured" in broken.error and broken.verified is None and not broken.trials
    assert sound.verified and not sound.error


def test_only_what_is_allowed_is_tried():
    machine = Machine()
    tune([SMALL], machine, Journal(), trials=16, allowed=lambda task, config: config["NV"] == 3)
    assert {config["NV"] for _, config, _ in machine.asked} == {3}


def test_nothing_to_tune():
    assert tune([], Machine(), Journal(), trials=8) == []


def test_tasks_are_kernels_with_a_choice():
    append = Kernel(KV_APPEND, KVAppendWorkload(9, 3, 64, in_place=True))
    fixed = Kernel(LOWBIT_EMBEDDING, LowBitEmbeddingWorkload(1000, 576, 4, 32))
    calls = {SMALL.kernel: 30, append: 60, fixed: 1}
    tasks = tasks_of(calls, AVX512)
    assert [(t.kernel, t.calls) for t in tasks] == [(SMALL.kernel, 30), (append, 60)]


def test_points_fit_their_workloads():
    for task in (SMALL, norm(), attention()):
        for decoder in (True, False):
            points = points_of(task.kernel, decoder)
            assert abs(sum(p.weight for p in points) - 1) < 1e-9
            assert all(task.kernel.template.work(task.kernel.workload, p.sizes()).ops > 0 for p in points)
            one = sum(p.weight for p in points if 1 in (p.sizes().get("M"), p.sizes().get("S")))
            assert (one >= 0.5) == decoder
    symbols = {s for p in points_of(attention().kernel) for s in p.sizes()}
    assert symbols == {"B", "S", "CB", "C"}
