"""Sampling on GPUs, emulated, against a reference that sorts, and against the sampler on the host."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.emulator.emulator import available
from llmc.emulator.templates import EmulatedKernel
from llmc.gpu.binary import resources
from llmc.gpu.sources import template_sources
from llmc.gpu.toolchain import find_toolchain
from llmc.runtime.sampling import Sampling, candidates
from llmc.schedules.base import Arrays
from llmc.schedules.sampling.cuda import CUDA_SAMPLE
from llmc.schedules.sampling.sample import SampleWorkload, reference
from llmc.targets.cuda import SM80, SM90, CudaTarget
from tests.gpu.tools import needs_compiler

emulated = pytest.mark.skipif(not available(), reason="the emulator of CUDA C needs g++ for x86-64")


def rows(V: int, seed: int) -> Arrays:
    """Rows of every kind: the template's own, ties, masked tokens, numbers out of range, and one likely token."""
    rng = np.random.default_rng(seed)
    inputs = CUDA_SAMPLE.example_inputs(SampleWorkload(V), {"R": 16}, rng)
    logits = inputs["logits"]
    logits[5:8] = np.round(logits[5:8])  # ties, zeros of both signs
    logits[8, ::2] = -np.inf
    logits[9] = 1.5
    logits[10, V // 2] = 60
    logits[11] = -np.inf
    logits[12, V - 1] = np.nan
    logits[13, 0] = np.inf
    inputs["top_k"][14], inputs["top_p"][15] = 3 * V, 1e-6
    return inputs


@emulated
@pytest.mark.parametrize(
    ("V", "threads"), [(1000, 256), (77, 128), (1, 256), (4099, 512), pytest.param(151937, 512, marks=pytest.mark.slow)]
)
def test_matches_reference(V: int, threads: int) -> None:
    kernel = EmulatedKernel(CUDA_SAMPLE, SampleWorkload(V), SM80, {"threads": threads})
    inputs = rows(V, seed=V)
    np.testing.assert_array_equal(kernel.run(inputs, {})["token"], reference(inputs)["token"])


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (7, 1.0), (0, 0.7), (12, 0.8)])
def test_reference_has_the_hosts_distribution(top_k: int, top_p: float) -> None:
    """Sweeping `uniform` draws each of the host's candidates as often as its weight says, and nothing else."""
    logits = np.random.default_rng(3).standard_normal(50, np.float32)
    tokens, weights = candidates(logits, Sampling(0.7, top_k, top_p))
    R = 4000
    inputs = {
        "logits": np.broadcast_to(logits, (R, 50)),
        "temperature": np.full(R, 0.7, np.float32),
        "top_k": np.full(R, top_k),
        "top_p": np.full(R, top_p, np.float32),
        "uniform": ((np.arange(R) + 0.5) / R).astype(np.float32),
    }
    drawn = np.bincount(reference(inputs)["token"], minlength=50) / R
    expected = np.zeros(50)
    expected[tokens] = weights / weights.sum()
    np.testing.assert_allclose(drawn, expected, atol=1.01 / R)


@needs_compiler
@pytest.mark.parametrize("target", [SM80, pytest.param(SM90, marks=pytest.mark.slow)], ids=lambda t: t.name)
def test_machine_code(target: CudaTarget) -> None:
    """Nothing spills, and logits are read 16 bytes at a time."""
    w = SampleWorkload(49152)
    (source,) = template_sources(CUDA_SAMPLE.build(w, target, CUDA_SAMPLE.default(w, target)), target).values()
    found = resources(find_toolchain().compile(source.source, target.mcpu))
    assert found.spill_bytes == 0 and found.accesses["LDG.16"]
