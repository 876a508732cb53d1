"""Measuring on a GPU, under the emulated driver: TVM's CUDA runtime, CUDA's events, everything but times that mean
anything."""

from __future__ import annotations

import math
import textwrap
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmc.emulator import driver
from llmc.emulator.emulator import available
from llmc.schedules.base import Config
from llmc.tune import features
from llmc.tune.gpu_code import compiled
from llmc.tune.measure import Measurer
from llmc.tune.record import Key
from llmc.tune.task import Measurement
from llmc.tune.worker import GO, Job, _serve
from tests.cuda_emulator.child import emulated
from tests.gpu.tools import needs_compiler
from tests.tune.gpu_tasks import SMALL, TASK

pytestmark = [needs_compiler, pytest.mark.skipif(not available(), reason="no g++ 12 for x86-64")]
# Workers import this before anything else: they then have a GPU, which knows every kernel that they load.
SITE = """
    from llmc.emulator import driver
    driver.install((8, 0))
    from tests.tune.test_gpu_subject import know_kernels
    know_kernels()
"""


def know_kernels() -> None:
    """What is loaded is made known to the emulated driver, which runs CUDA C and not machine code."""
    from llmc.tune import gpu_subject

    load = gpu_subject.load

    def known(function: Any) -> Any:
        for kernel in function.kernels.values():
            driver.register_kernel(kernel.name, kernel.source, kernel.module)
        return load(function)

    gpu_subject.load = known


class Parent:
    """The other end of a worker's connection."""

    def send(self, message: Any) -> None: ...

    def recv(self) -> str:
        return GO


def serve(configs: list[Config]) -> tuple[list[Any], int, Key]:
    """In a process that has an emulated GPU: measurements, quick and careful, how many kernels ran, and a key."""
    know_kernels()
    subjects: Any = OrderedDict()
    jobs = [Job(TASK, config, careful, 0) for config in configs for careful in (False, True)]
    measured = [_serve(job, subjects, Parent()) for job in jobs]  # type: ignore[arg-type]
    return measured, driver.launches(), Key.of(TASK)


@pytest.fixture(scope="module", autouse=True)
def in_the_cache() -> None:
    """NVIDIA's compiler does not run under the emulated driver: all is there when a worker wants it."""
    template, workload = TASK.kernel.template, TASK.kernel.workload
    for config in template.space(workload, SMALL):
        compiled(TASK, config, careful=False)


def test_candidates_are_checked_and_timed_by_events() -> None:
    with emulated() as call:
        (quick, careful, *wrong), launches, key = call(
            serve, [{"threads": 64, "fault": "none"}, {"threads": 64, "fault": "wrong"}]
        )
    for m in (quick, careful):
        assert isinstance(m, Measurement) and m.status == "ok", m
        assert set(m.timings) == {"M=1", "M=3"} and not m.predicted and m.verified == (m is careful)
        assert all(0 < t.seconds < math.inf and 0 < t.default_seconds < math.inf for t in m.timings.values())
        assert m.code["gpu_registers"] > 0 and set(m.code) == set(features.GPU_BUILT)
    assert [m.status for m in wrong] == ["wrong", "wrong"] and "y is off by" in wrong[0].detail
    assert launches > 100
    assert key.cpu.startswith("emulated GPU") and key.cores == SMALL.multiprocessors and not key.predicted


@pytest.fixture
def workers_with_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(SITE))
    monkeypatch.syspath_prepend(tmp_path)
    yield


def test_a_kernel_that_breaks_the_gpu_takes_its_process_along(workers_with_a_gpu: None) -> None:
    """And not the candidates after it."""
    configs = [{"threads": 32, "fault": "outside"}, {"threads": 64, "fault": "none"}]
    with Measurer(SMALL, workers=1) as measurer:
        broken, sound = measurer.measure(TASK, configs)
    assert broken.status == "crash" and sound.status == "ok", (broken, sound)
