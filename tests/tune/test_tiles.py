"""Tuning for AMX: workers ask before they use tiles; a machine without tiles says so; under the emulator it works."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmc.cli import main
from llmc.errors import KernelError
from llmc.schedules.attention.attention import ATTENTION
from llmc.schedules.attention.workloads import AttentionWorkload
from llmc.schedules.base import Kernel
from llmc.schedules.gemm.bf16 import BF16, Bf16LinearWorkload
from llmc.schedules.gemm.lowbit import LOWBIT, LowBitLinearWorkload
from llmc.targets.detect import machine
from llmc.targets.x86 import AMX, AVX512, TARGETS
from llmc.tune import features, worker
from llmc.tune.logs import shipped
from llmc.tune.measure import Measurer
from llmc.tune.record import Key
from llmc.tune.task import Point, Task
from tests import amx_emulator

MANY = Point((("M", 20),))
LOWBIT_TASK = Task(Kernel(LOWBIT, LowBitLinearWorkload(32, 64, 4, 32, zero=8.0)), AMX, (MANY,))
BF16_TASK = Task(Kernel(BF16, Bf16LinearWorkload(64, 100, activations="bf16")), AMX, (MANY,))
PROMPT = Point((("B", 1), ("S", 33), ("CB", 2), ("C", 100), ("T", 100)))
ATTENTION_TASK = Task(Kernel(ATTENTION, AttentionWorkload(4, 2, 64, 0.125, causal=False, bf16=True)), AMX, (PROMPT,))


@pytest.mark.skipif(amx_emulator.NATIVE, reason="this CPU has tiles")
def test_a_machine_without_tiles_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--workload", "norm NormWorkload(K=64)", "--target", "x86-amx"]) == 2
    said = capfd.readouterr().err
    assert "target x86-amx: this machine cannot tune for it: it lacks amx_bf16, amx_int8, amx_tile" in said
    assert "hint: name a device with --tracker and --key, or tune on a machine that runs the target" in said


def test_workers_ask_for_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(worker, "permit_tiles", lambda: asked.append(True))
    worker._permit(AVX512)
    assert not asked
    worker._permit(AMX)
    assert asked == [True]


def test_a_refusal_ends_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(worker, "permit_tiles", refuse)
    job = worker.Job(LOWBIT_TASK, {}, careful=False, seed=0)
    refused = worker._serve(job, worker.OrderedDict(), None)  # type: ignore[arg-type] - it says nothing before
    assert isinstance(refused, KernelError) and refused.exit_code == 8
    assert "does not let this process use AMX tiles: Operation not permitted" in str(refused)
    assert refused.where == "target x86-amx" and "x86-avx512" in str(refused.hint)


@pytest.fixture
def tiled_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with tiles, its workers included."""
    if missing := machine().missing(AVX512):
        pytest.skip(f"CPU lacks {missing}")
    if amx_emulator.NATIVE:
        yield
        return
    amx_emulator.pretend(tmp_path, monkeypatch)
    yield
    machine.cache_clear()


@pytest.mark.alone
def test_candidates_are_measured(tiled_machine: None) -> None:
    """On tiles, each right. What the emulator took is recorded as another CPU's: it is never taken for a real one's."""
    default = LOWBIT.default(LOWBIT_TASK.kernel.workload, AMX)
    with Measurer(AMX, workers=1, timeout_s=120) as measurer:
        found = list(measurer.measure(LOWBIT_TASK, [default | {"MR": 16}, default | {"NV": 1}]))
    assert [m.status for m in found] == ["ok", "ok"], found
    assert all(m.code.get("dots", 1) > 0 for m in found)
    if not amx_emulator.NATIVE:
        assert Key.of(LOWBIT_TASK).cpu.startswith("emulated")
    assert not any(r.key.cpu.startswith("emulated") for t in TARGETS.values() for r in shipped(t))


def value(task: Task, name: str, **knobs: int | str) -> float:
    config = task.kernel.template.default(task.kernel.workload, task.target) | knobs
    vector = features.matrix(task, task.points[0], [config], threads=2)[0]
    return float(2.0 ** vector[features.names().index(name)])


def test_features_count_tiles() -> None:
    """By hand; the kernels' own tests compare such counts with what the emulator counted."""
    # 2 tiles of rows, 2 row blocks, 2 groups of one step. A load of x serves NV row blocks, one of weights MR / 16
    # tiles of rows.
    assert value(LOWBIT_TASK, "tile_dots") == pytest.approx(2 * 2 * 2)
    assert value(LOWBIT_TASK, "tile_loads", MR=32, NV=2) == pytest.approx(1 / 2 + 1 / 2 + 1)
    assert value(LOWBIT_TASK, "tile_loads", MR=16, NV=1) == pytest.approx(1 + 1 + 1)
    # 100 k are 4 steps; 4 row blocks.
    assert value(BF16_TASK, "tile_dots") == pytest.approx(2 * 4 * 4)
    assert value(BF16_TASK, "tile_loads", MR=32, NV=2) == pytest.approx(1 / 2 + 1 / 2 + 1 / 4)
    # 2 heads, 66 rows in 5 tiles, 2 blocks of keys: 2 steps times 4 tiles of keys, 2 steps times 4 of values.
    assert value(ATTENTION_TASK, "tile_dots") == pytest.approx(2 * 5 * 2 * 16)
    assert value(ATTENTION_TASK, "tile_loads") == pytest.approx((2 * 5 + 4 + 2 * 5 + 2 * 4) / 16)


def test_features_know_where_tiles_are_not() -> None:
    few = Task(LOWBIT_TASK.kernel, AMX, (Point((("M", 1),)),))
    other = Task(LOWBIT_TASK.kernel, AVX512, (MANY,))
    for task, knobs in ((few, {}), (other, {}), (ATTENTION_TASK, {"body": "vectors"})):
        assert value(task, "tile_dots", **knobs) != value(task, "tile_dots", **knobs)  # NaN: missing
