"""The tests for hardware, run without it: under the emulated driver, in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import llmc
from llmc.emulator import driver
from llmc.emulator.emulator import available
from llmc.targets.cuda import SM80
from tests.cuda_emulator.child import emulated
from tests.gpu import hardware
from tests.gpu.tools import needs_compiler
from tests.graphs import Decoder, Shape, decoder_feeds

pytestmark = [needs_compiler, pytest.mark.skipif(not available(), reason="no g++ 12 for x86-64")]
FAST = ("w4a16", "norm")


@pytest.fixture(scope="module")
def gpu() -> Iterator[Any]:
    with emulated() as call:
        yield call


def kernel(name: str, sizes: slice) -> tuple[float, int]:
    """In the child process."""
    with driver.judged():
        return hardware.check_kernel(name, lambda k: driver.register_kernel(k.name, k.source, k.module), sizes)


def model(path: Path, artifact: Path) -> None:
    with driver.judged():
        hardware.check_model(path, artifact, decoder_feeds(Shape(), 2, 4, 3), driver.load)


def session(cpu: Path, artifact: Path) -> None:
    with driver.judged():
        hardware.check_session(cpu, artifact, driver.load)


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in hardware.CASES]
)
def test_kernels(name: str, gpu: Any) -> None:
    hardware.compiled(hardware.CASES[name][0], SM80)  # into the cache: NVIDIA's compiler does not run over there
    sizes = slice(1, 3) if name in FAST else slice(None)
    worst, calls = gpu(kernel, name, sizes)
    assert 0 <= worst <= 1 and calls == len(hardware.CASES[name][1][sizes])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_model_and_a_session(gpu: Any, tmp_path: Path) -> None:
    path = Decoder(Shape()).plain(tmp_path / "decoder.onnx")
    for target in ("native", "cuda-sm80"):
        llmc.compile(path, target=target).save(tmp_path / f"{target}.llmc")
    gpu(model, path, tmp_path / "cuda-sm80.llmc")
    gpu(session, tmp_path / "native.llmc", tmp_path / "cuda-sm80.llmc")
