"""Candidates are measured, and whatever they do to their workers is recorded by kind and leaves nothing behind."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from llmc.errors import KernelError, OptionError
from llmc.schedules.attention.attention import ATTENTION
from llmc.schedules.attention.kv_append import KV_APPEND
from llmc.schedules.attention.workloads import AttentionWorkload, KVAppendWorkload
from llmc.schedules.base import Kernel
from llmc.schedules.embedding.lowbit import LOWBIT_EMBEDDING, LowBitEmbeddingWorkload
from llmc.schedules.gemm.dense import DENSE, DenseLinearWorkload
from llmc.schedules.gemm.lowbit import LOWBIT, LowBitLinearWorkload
from llmc.targets.detect import native
from llmc.tune import features, machine_code
from llmc.tune.measure import Measurer
from llmc.tune.subject import Rejected, Subject, undisturbed
from llmc.tune.task import Point, Task

from . import faults

pytestmark = pytest.mark.alone
WORKER = "llmc.tune.worker"
ATTEND = {"B": 2, "S": 1, "CB": 2, "C": 100, "T": 100}
TASKS = {
    "lowbit": Task(
        Kernel(LOWBIT, LowBitLinearWorkload(96, 64, 4, 32, True, 8.0, bias=True, residual=True)),
        native(),
        (Point((("M", 1),)), Point((("M", 50),), 0.5)),
    ),
    "dense": Task(Kernel(DENSE, DenseLinearWorkload(70, 33, activation="silu_mul")), native(), (Point((("M", 40),)),)),
    "embedding": Task(
        Kernel(LOWBIT_EMBEDDING, LowBitEmbeddingWorkload(50, 64, 8, 64, False)), native(), (Point((("M", 3),)),)
    ),
    "attention": Task(
        Kernel(ATTENTION, AttentionWorkload(4, 2, 16, 0.25, key_bias=True)), native(), (Point(tuple(ATTEND.items())),)
    ),
    "append": Task(
        Kernel(KV_APPEND, KVAppendWorkload(4, 2, 16, in_place=True)),
        native(),
        (Point((("B", 2), ("S", 1), ("CB", 2), ("C", 128))),),
    ),
}


@pytest.fixture(scope="module")
def measurer() -> Iterator[Measurer]:
    with Measurer(native(), timeout_s=2, memory_bytes=1 << 30) as measurer:
        yield measurer
    assert not processes_of(os.getpid())


def processes_of(parent: int) -> list[Path]:
    """Workers whose parent is `parent`, alive or not."""
    return [p for p in faults.processes(WORKER) if (p / "stat").read_text().rsplit(")", 1)[1].split()[1] == str(parent)]


def state(process: Path) -> str:
    return (process / "stat").read_text().rsplit(")", 1)[1].split()[0]


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("careful", [False, True])
def test_every_kind_of_kernel_has_a_subject(name: str, careful: bool) -> None:
    """The default equals the reference on the template's examples, at all corners if careful; and can be timed."""
    task = TASKS[name]
    subject = Subject(task, careful, seed=1)
    timings = subject.time(subject.default)
    assert set(timings) == {str(p) for p in task.points}
    assert all(t.seconds > 0 and t.default_seconds > 0 and t.spread >= 0 for t in timings.values())


def test_a_wrong_expectation_is_noticed() -> None:
    subject = Subject(TASKS["attention"], True, seed=0)
    subject.checked[-1].expected["out"][-1, -1, -1] += 0.01
    with pytest.raises(Rejected, match=r"out is off by 0\.01") as info:
        subject.check(subject.default)
    assert info.value.status == "wrong"


def test_measures_every_config_once(measurer: Measurer) -> None:
    task = TASKS["dense"]
    configs = [dict(c, MR=mr) for mr in (3, 4, 6) for c in [DENSE.default(task.kernel.workload, task.target)]]
    results = list(measurer.measure(task, iter(configs)))
    assert sorted(r.config["MR"] for r in results) == [3, 4, 6]
    assert all(r.status == "ok" and not r.verified and r.build_seconds > 0 for r in results)
    assert all(0.1 < r.cost(task.points) < 10 and r.noise(task.points) > 0 for r in results)
    assert all(set(r.code) == (set(features.CPU_BUILT) if machine_code.readable() else set()) for r in results)
    careful = list(measurer.measure(task, configs[:1], careful=True))
    assert [r.verified for r in careful] == [True]


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        ("none", "ok"),
        ("loop", "timeout"),
        ("children", "timeout"),
        ("segfault", "crash"),
        ("abort", "crash"),
        # Filling gigabytes delays its neighbours at times, beyond their limit.
        pytest.param("memory", "memory", marks=pytest.mark.slow),
        ("wrong", "wrong"),
        ("random", "unstable"),
        ("build", "build"),
        ("build_abort", "crash"),
        ("build_loop", "timeout"),
    ],
)
def test_faults_are_recorded_by_kind(measurer: Measurer, fault: str, status: str) -> None:
    """The fault's neighbours are measured as if nothing had happened."""
    configs = [{"fault": "none"}, {"fault": fault}, {"fault": "none"}]
    results = list(measurer.measure(faults.task(), configs))
    got = sorted(r.status for r in results)
    assert got == sorted(["ok", "ok", status]), [r.detail for r in results]
    assert all(r.detail for r in results if r.status != "ok")
    shown = machine_code.readable() and status in ("ok", "wrong", "unstable")
    assert all(bool(r.code) == shown for r in results if r.status == status)
    assert not any(state(p) == "T" for p in processes_of(os.getpid()))
    assert not faults.processes(faults.SLEEPER)


def test_corners_are_checked_with_care(measurer: Measurer) -> None:
    """Right at the size that is timed, wrong at others."""
    config = {"fault": "tail"}
    assert [m.status for m in measurer.measure(faults.task(), [config])] == ["ok"]
    careful = list(measurer.measure(faults.task(), [config], careful=True))
    assert [m.status for m in careful] == ["wrong"] and "M=4" in careful[0].detail


def test_a_default_that_fails_is_an_error(measurer: Measurer) -> None:
    task = faults.task(faults.DoubleWorkload(default_fails=True))
    with pytest.raises(KernelError, match="default configuration cannot be measured: SIGABRT"):
        list(measurer.measure(task, [{"fault": "none"}]))
    assert [m.status for m in measurer.measure(faults.task(), [{"fault": "none"}])] == ["ok"]


def test_stopping_in_the_middle_leaves_the_measurer_usable(measurer: Measurer) -> None:
    results = measurer.measure(faults.task(), [{"fault": "none"}, *[{"fault": "loop"}] * 3])
    assert next(results).status == "ok"
    results.close()
    assert [m.status for m in measurer.measure(faults.task(), [{"fault": "none"}])] == ["ok"]


def test_nothing_outlives_a_killed_tuner() -> None:
    """One worker runs, the other stands still for it, when the tuner is killed."""
    script = """
        from llmc.targets.detect import native
        from llmc.tune.measure import Measurer
        from tests.tune import faults
        with Measurer(native()) as measurer:
            for result in measurer.measure(faults.task(), [{"fault": "none"}, *[{"fault": "loop"}] * 2]):
                print(result.status, flush=True)
    """
    root = Path(__file__).parents[2]
    tuner = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=root, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not any(state(p) == "T" for p in processes_of(tuner.pid)) and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = processes_of(tuner.pid)
    assert len(workers) == 2
    tuner.send_signal(signal.SIGKILL)
    tuner.communicate()
    while any(p.exists() and state(p) != "Z" for p in workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(p.exists() and state(p) != "Z" for p in workers)


def test_other_machines_code_is_refused() -> None:
    alien = dataclasses.replace(native(), requires=("flux_capacitor",))
    with pytest.raises(OptionError, match="lacks flux_capacitor"):
        Measurer(alien)


def test_interruptions_do_not_move_the_estimate() -> None:
    """Half of the calls are interrupted, and take a hundred times as long."""
    rng = np.random.default_rng(0)
    seconds = rng.normal(1.0, 0.01, 1000) * np.where(rng.random(1000) < 0.5, 1, 100)
    middle, spread = undisturbed(list(seconds))
    assert abs(middle - 1.0) < 0.01 and spread < 0.01
    assert undisturbed([1.0, 2.0, 3.0, 4.0, 5.0])[1] > 0.5  # few and far apart: nothing is known


def test_what_models_read_from_memory_is_not_in_the_cache() -> None:
    """Keys and values of other layers pass between two calls of attention; its queries were just computed."""
    kernel = Kernel(ATTENTION, AttentionWorkload(4, 2, 16, 0.25))
    point = Point((("B", 1), ("S", 2), ("CB", 4), ("C", 256)))
    subject = Subject(Task(kernel, native(), (point,)), careful=False, seed=0)
    (case,) = subject.timed
    first, second = (dict(zip(case.inputs, next(subject._inputs(case)), strict=True)) for _ in range(2))
    assert first["q"] is second["q"] and first["kv_len"] is second["kv_len"]
    assert first["kp"] is not second["kp"] and first["v"] is not second["v"]
    np.testing.assert_array_equal(first["v"].numpy(), second["v"].numpy())
