"""Recurrent layers on GPUs, emulated, against float64 numpy; and what their machine code is made of."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.emulator.emulator import available
from llmc.emulator.templates import EmulatedKernel
from llmc.gpu.binary import resources
from llmc.gpu.sources import template_sources
from llmc.gpu.toolchain import find_toolchain
from llmc.schedules.recurrent.cuda import CUDA_RECURRENT
from llmc.schedules.recurrent.workload import RecurrentWorkload
from llmc.targets.cuda import SM80, SM90, CudaTarget
from tests.gpu.tools import needs_compiler

emulated = pytest.mark.skipif(not available(), reason="the emulator of CUDA C needs g++ for x86-64")

LSTM = RecurrentWorkload(37, "lstm", "bidirectional", initial=True)
CELLS = [
    LSTM,
    RecurrentWorkload(36, "gru", "reverse"),
    RecurrentWorkload(33, "gru_after", "bidirectional", initial=True),
    RecurrentWorkload(5, "rnn"),
]


@emulated
@pytest.mark.parametrize("w", CELLS, ids=lambda w: w.cell)
def test_matches_reference(w: RecurrentWorkload) -> None:
    """Rows that no block is full of, units that no warp is."""
    kernel, rng = EmulatedKernel(CUDA_RECURRENT, w, SM80), np.random.default_rng(0)
    weights = CUDA_RECURRENT.example_weights(w, rng)
    packed = CUDA_RECURRENT.prepack(weights, w, kernel.config, SM80)
    for steps, B in ((1, 1), (5, 6), (2, 4), (0, 3)):
        inputs = CUDA_RECURRENT.example_inputs(w, {"steps": steps, "B": B}, rng)
        found = kernel.run(inputs, packed)
        for name, expected in CUDA_RECURRENT.reference(w, inputs, weights).items():
            np.testing.assert_allclose(found[name], expected, atol=1e-5, err_msg=f"{name}, {steps} steps, batch {B}")


@needs_compiler
@pytest.mark.parametrize("target", [SM80, pytest.param(SM90, marks=pytest.mark.slow)], ids=lambda t: t.name)
@pytest.mark.parametrize("hidden", [256, pytest.param(1024, marks=pytest.mark.slow)])
def test_machine_code(hidden: int, target: CudaTarget) -> None:
    """Nothing spills; weights are loaded 16 bytes at a time."""
    w = RecurrentWorkload(hidden)
    function = CUDA_RECURRENT.build(w, target, CUDA_RECURRENT.default(w, target))
    (source,) = template_sources(function, target).values()
    found = resources(find_toolchain().compile(source.source, target.mcpu))
    assert found.spill_bytes == 0 and found.accesses["LDG.16"]
    assert int(source.launch.shared) <= target.block_shared_bytes
