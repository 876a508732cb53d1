"""The target for Hopper alone: what is in its artifacts, which GPU takes them, what is counted of its instructions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmc.emulator.emulator import available
from llmc.errors import ArtifactError
from llmc.gpu.fatbin import fatbin
from llmc.gpu.toolchain import find_toolchain
from llmc.package.device import device_kernels
from llmc.package.reader import open_artifact
from llmc.pipeline import compile
from llmc.runtime import load
from llmc.schedules.gemm.bf16 import Bf16LinearWorkload
from llmc.schedules.gemm.cuda_wgmma import WGMMA_BF16
from llmc.targets.cuda import SM90A
from tests.cuda_emulator.child import emulated
from tests.gpu.tools import SOURCE, arguments, counted, needs_compiler
from tests.graphs import linear
from tests.runtime.test_gpu_loading import write

needs_emulator = pytest.mark.skipif(not available(), reason="no g++ 12 for x86-64")


@needs_compiler
def test_there_is_no_ptx_for_later_gpus() -> None:
    binary = find_toolchain().compile(SOURCE, SM90A.mcpu)
    both, alone = fatbin(90, binary.cubin, binary.ptx), fatbin(90, binary.cubin, None)
    assert both[16 : len(alone)] == alone[16:] and binary.cubin in alone and b".target sm_90a" not in alone
    assert int.from_bytes(alone[8:16], "little") == len(alone) - 16


@needs_emulator
@pytest.mark.parametrize(("capability", "name"), [((8, 0), "sm_80"), ((10, 0), "sm_100")])
def test_another_gpu_does_not_take_it(capability: tuple[int, int], name: str, tmp_path: Path) -> None:
    artifact = write(tmp_path / "m.llmc", SM90A.mcpu, runtime=False)
    with emulated(capability) as gpu, pytest.raises(ArtifactError, match=f"GPU of sm_90a; this machine's is {name}\\b"):
        gpu(load, artifact)


def test_products_and_copies_are_counted() -> None:
    N, K, M = 256, 256, 128
    workload = Bf16LinearWorkload(N, K, activations="bf16")
    function = WGMMA_BF16.build(workload, SM90A, WGMMA_BF16.default(workload, SM90A))
    ((_, found),) = counted(function, arguments(function, workload, {"M": M}))
    assert found.tensor == {"bf16": 2.0 * M * N * K}
    assert 2 * N * K in found.reads.values()  # the weight, once


@pytest.mark.slow
@needs_compiler
@needs_emulator
def test_an_artifact_is_run_by_the_emulated_driver(tmp_path: Path) -> None:
    model, artifact = linear(tmp_path / "m.onnx", 96), tmp_path / "m.llmc"
    compile(model, target="cuda-sm90a", quantize="bf16").save(artifact)
    kernels = device_kernels(open_artifact(artifact))
    assert any(name.startswith("bf16_wgmma") and facts["hmma"] for name, facts in kernels.items())
    command = [
        sys.executable,
        "-m",
        "llmc",
        "check",
        str(artifact),
        str(model),
        "--emulate",
        "--dim",
        "rows=40",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    report = json.loads(done.stdout)
    assert report["emulated"] and report["passed"]
