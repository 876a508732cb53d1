"""Sessions on a GPU, under the emulated driver: TVM's own CUDA runtime, llmc's own loader, and kernels on the CPU.

The same calls go to the same model compiled for the CPU. Both compute in float32, in other orders of sums.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llmc
from llmc.emulator import driver
from llmc.emulator.emulator import available
from llmc.package.layout import LIBRARY
from llmc.package.reader import open_artifact
from llmc.runtime import Model, Session, generate, generate_all
from llmc.runtime.cuda import Pointer
from tests.cuda_emulator.child import emulated
from tests.gpu.decoder import gpu_decoder
from tests.gpu.tools import needs_compiler
from tests.runtime.conftest import DECODER, Models

pytestmark = [needs_compiler, pytest.mark.skipif(not available(), reason="no g++ 12 for x86-64")]
Call = Callable[..., Any]
Artifacts = tuple[Path, Path]
CACHES = ("float32", *(pytest.param(name, marks=pytest.mark.slow) for name in ("paged", "int4", "int8,paged")))
# Of logits up to 4: sums of a hundred terms in other orders, through two layers. A rounded cache may round differently.
TOLERANCE = {"float32": 1e-5, "int8": 2e-2, "int4": 2e-1}


@pytest.fixture(scope="module")
def gpu() -> Iterator[Call]:
    with emulated() as call:
        yield call


@pytest.fixture(scope="module", params=CACHES)
def artifacts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, models: Models) -> Artifacts:
    """The same model for the CPU and for the GPU."""
    # In float32 it makes no difference to results whether a cache lies in pages.
    cpu = models("paged" if request.param == "float32" else request.param).artifact.path
    return cpu, gpu_decoder(tmp_path_factory, request.param) / "m.llmc"


# What runs in the child process.


@cache
def loaded(artifacts: Artifacts) -> tuple[Model, Model]:
    return llmc.load(artifacts[0]), driver.load(artifacts[1])


class Both:
    """A session on the CPU and one on the GPU, which are to give the same."""

    def __init__(self, cpu: Session, gpu: Session) -> None:
        self.cpu, self.gpu = cpu, gpu
        self.tolerance = TOLERANCE[gpu.decoder.kv_cache]

    @staticmethod
    def of(artifacts: Artifacts, *arguments: Any, **named: Any) -> Both:
        cpu, gpu = loaded(artifacts)
        return Both(cpu.session(*arguments, **named), gpu.session(*arguments, **named))

    def fork(self, rows: list[int] | None = None) -> Both:
        return Both(self.cpu.fork(rows), self.gpu.fork(rows))

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **named: Any) -> None:
            expected = getattr(self.cpu, name)(*arguments, **named)
            found = getattr(self.gpu, name)(*arguments, **named)
            assert self.cpu.lengths == self.gpu.lengths
            if isinstance(expected, np.ndarray):
                np.testing.assert_allclose(found, expected, rtol=0, atol=self.tolerance)

        return call


def ids(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, DECODER.shape.vocab, shape)


def one_row(artifacts: Artifacts) -> None:
    with driver.judged(), warnings.catch_warnings():
        warnings.simplefilter("error")  # graphs are captured
        session = Both.of(artifacts)
        session.append(ids(5))
        for n in range(4):
            session.append(ids(1) + n)
        session.append(ids(3), all=True)
        twin = session.fork()
        session.truncate(3)
        for n in range(3):
            session.append(ids(1) + n)
            twin.append(ids(1) - n)
        session.reserve(600)  # caches move
        for n in range(3):
            session.append(ids(1) + n)
        session.reset()
        session.append(ids(2))


def several_rows(artifacts: Artifacts) -> None:
    with driver.judged():
        session = Both.of(artifacts)
        session.append(ids(5))
        rows = session.fork([0, 0, 0])
        for n in range(3):
            rows.append(ids(3, 1) + n)
        rows.append([[1], [2, 3, 4], []])
        rows.append([[1], list(range(12)), []])
        rows.append([[1], [], [5]])
        rows.truncate([0, 3, 4])
        rows.append(ids(3, 2), all=True)
        rows.fork([2, 1]).append(ids(2, 1))


def trees(artifacts: Artifacts) -> None:
    with driver.judged():
        session = Both.of(artifacts)
        session.append(ids(62))
        session.verify([5, 6, 7, 8], [-1, 0, 0, 2])
        session.accept([0, 2, 3])  # across a block's end
        session.append(ids(1))
        session.verify([5, 6], [-1, -1])
        session.accept([])
        session.append(ids(1))


def a_window(artifacts: Artifacts) -> None:
    with driver.judged():
        session = Both.of(artifacts, window=128)
        session.append(ids(140))
        session.append(ids(1))
        session.append(ids(60))
        twin = session.fork()
        for each in (session, twin):
            each.append(ids(2))


def replayed(artifacts: Artifacts) -> tuple[int, int]:
    """Plain calls and replayed ones give the same bits; how many kernels each launches for a token."""
    model = loaded(artifacts)[1]
    with driver.judged():
        texts, launches = [], []
        for graphs in (False, True):
            model.memory.graphs = graphs  # type: ignore[attr-defined]
            session = model.session()
            logits = [session.append(ids(5))]
            for n in range(5):
                before = driver.launches()
                logits.append(session.append([n]))
            launches.append(driver.launches() - before)
            calls = list(session._calls.kept.values())
            assert [call.replayed._graph is not None for call in calls] == [graphs]  # type: ignore[union-attr]
            texts.append(np.concatenate(logits))
        np.testing.assert_array_equal(texts[0].view(np.uint32), texts[1].view(np.uint32))
    return launches[0], launches[1]


def not_captured(artifacts: Artifacts) -> str:
    """Something that cannot be captured: what is said, once, and nothing else changes."""
    model = loaded(artifacts)[1]
    memory: Any = model.memory
    capture = memory.cuda.capture

    def waits(launch: Call) -> Any:
        def wrong(stream: int) -> Any:
            launch(stream)
            memory.cuda.call("cudaStreamSynchronize", Pointer(stream))

        return capture(wrong)

    memory.cuda.capture = waits
    try:
        with driver.judged(), warnings.catch_warnings(record=True) as said:
            session = Both.of(artifacts)
            session.append(ids(2))
            for n in range(4):
                session.append([n])
    finally:
        memory.cuda.capture, memory.graphs = capture, True
    (warning,) = said
    return str(warning.message)


def generated(artifacts: Artifacts) -> None:
    cpu, gpu = loaded(artifacts)
    with driver.judged():
        for options in ({}, {"temperature": 0.9, "top_k": 1, "seed": 1}):
            one, other = (list(generate(model.session(), [3, 1, 4], 6, **options)) for model in (cpu, gpu))
            assert one == other and len(one) == 6
        drawn = [list(generate(gpu.session(), [3, 1], 5, temperature=1.5, top_p=0.9, seed=s)) for s in (7, 7, 8)]
        assert drawn[0] == drawn[1] != drawn[2]
        prompts = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5, 8, 9]]
        one, other = (list(generate_all(model.session(3), prompts, 3)) for model in (cpu, gpu))
        assert one == other


# What the tests say.


def test_no_host_function_takes_memory_that_may_move(artifacts: Artifacts) -> None:
    assert b"TVMBackendAllocWorkspace" not in open_artifact(artifacts[1]).read(LIBRARY)


@pytest.mark.parametrize("scenario", [one_row, several_rows, trees, a_window, generated])
def test_sessions_equal_those_on_the_cpu(scenario: Call, gpu: Call, artifacts: Artifacts) -> None:
    gpu(scenario, artifacts)


def test_replayed_launches_give_the_same_bits(gpu: Call, artifacts: Artifacts) -> None:
    plain, graphs = gpu(replayed, artifacts)
    assert plain == graphs > 10


def test_where_nothing_can_be_captured(gpu: Call, artifacts: Artifacts) -> None:
    assert "CUDA graphs are not used: cudaStreamSynchronize failed" in gpu(not_captured, artifacts)
