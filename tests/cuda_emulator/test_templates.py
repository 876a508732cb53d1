"""A template's kernels under the emulator: what is launched, in which orders, and what a call leaves alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmc.emulator.emulator import Emulator, available
from llmc.emulator.templates import EmulatedKernel
from llmc.schedules.norm.cuda import CUDA_NORM
from llmc.schedules.norm.norm import NormWorkload
from llmc.targets.cuda import SM80

pytestmark = pytest.mark.skipif(not available(), reason="no g++ 12 for x86-64")


def test_equal_calls_run_their_threads_in_other_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds, launch = [], Emulator.launch

    def noted(self: Emulator, *arguments: Any) -> None:
        seeds.append(arguments[-1])
        launch(self, *arguments)

    monkeypatch.setattr(Emulator, "launch", noted)
    workload, rng = NormWorkload(96), np.random.default_rng(0)
    kernel = EmulatedKernel(CUDA_NORM, workload, SM80, {"threads": 32})
    inputs, weights = CUDA_NORM.example_inputs(workload, {"M": 3}, rng), CUDA_NORM.example_weights(workload, rng)
    given = {name: array.copy() for name, array in inputs.items()}
    packed = CUDA_NORM.prepack(weights, workload, kernel.config, SM80)
    first, second = (kernel.run(inputs, packed)["y"] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, CUDA_NORM.reference(workload, inputs, weights)["y"], atol=1e-5)
    assert len(seeds) == len(set(seeds)) == 2 and len(kernel.launched) == 1
    assert all((inputs[name] == array).all() for name, array in given.items())
