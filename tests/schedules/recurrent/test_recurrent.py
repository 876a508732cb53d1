"""The recurrent kernel against float64: cells, directions, sizes around the vector width, shared and not."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np
import pytest

from llmc.schedules.recurrent.recurrent import RECURRENT
from llmc.schedules.recurrent.workload import GATES, RecurrentWorkload
from llmc.targets.base import Target
from llmc.targets.x86 import AVX2, AVX512
from llmc.tvm_shim import tvm
from tests.schedules.kernels import X86, Kernel, compile_kernels

CELLS = tuple(GATES)
# Widths (registers, and units more than these), ways, registers side by side, rows of a block. Calls of 3,000
# multiplications and more are shared, which some of the sizes below have.
CASES = [
    ("lstm", (2, 3), "forward", {"NV": 1, "MR": 3, "share": "units"}),
    ("lstm", (1, -1), "bidirectional", {"NV": 2, "MR": 2, "share": "sequences"}),
    ("gru", (2, 0), "bidirectional", {"NV": 2, "MR": 2, "share": "units"}),
    ("gru", (1, 1), "reverse", {"NV": 1, "MR": 3, "share": "sequences"}),
    ("gru_after", (2, -1), "reverse", {"NV": 1, "MR": 1, "share": "units"}),
    ("gru_after", (2, 2), "bidirectional", {"NV": 1, "MR": 4, "share": "sequences"}),
    ("rnn", (3, 1), "bidirectional", {"NV": 2, "MR": 4, "share": "units"}),
    ("rnn", (0, 1), "forward", {"NV": 4, "MR": 2, "share": "sequences"}),
]


@cache
def kernels(target: Target) -> list[Kernel]:
    """Every second one begins with given states."""
    cases = []
    for i, (cell, (registers, more), way, config) in enumerate(CASES):
        workload = RecurrentWorkload(registers * target.lanes + more, cell, way, initial=i % 2 == 0)
        cases.append((workload, {"KU": 4, "grain": 3000, **config}))
    return compile_kernels(RECURRENT, cases, target)


def check(kernel: Kernel, dims: Mapping[str, int], seed: int) -> None:
    w, rng = kernel.workload, np.random.default_rng(seed)
    weights, inputs = RECURRENT.example_weights(w, rng), RECURRENT.example_inputs(w, dims, rng)
    packed = RECURRENT.prepack(weights, w, kernel.config, kernel.target)
    wanted = RECURRENT.reference(w, inputs, weights)
    outputs = {name: tvm.runtime.tensor(np.full(y.shape, np.nan, np.float32)) for name, y in wanted.items()}
    arguments = [tvm.runtime.tensor(np.ascontiguousarray(a)) for a in (*inputs.values(), *packed.values())]
    kernel.call(*arguments, *outputs.values())
    for name, want in wanted.items():
        what = f"{name} of {w} at {dims}, {kernel.config}"
        np.testing.assert_allclose(outputs[name].numpy(), want, rtol=0, atol=2e-6, err_msg=what)


@pytest.mark.parametrize("target", X86)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_equals_reference(target: Target, steps: int) -> None:
    for seed, kernel in enumerate(kernels(target)):
        for B in (1, 2, 3, 4, 7, 11):
            check(kernel, {"steps": steps, "B": B}, seed)


@pytest.mark.parametrize("target", X86)
def test_nothing_to_do(target: Target) -> None:
    """No rows at all, and no steps: the last states are the first."""
    for kernel in kernels(target):
        check(kernel, {"steps": 2, "B": 0}, 0)
        check(kernel, {"steps": 0, "B": 2}, 0)


@pytest.mark.parametrize("target", X86)
def test_gates_that_are_full_or_shut(target: Target) -> None:
    """Sums of hundreds saturate, and yield no NaN."""
    for kernel in kernels(target):
        w, rng = kernel.workload, np.random.default_rng(3)
        weights, inputs = RECURRENT.example_weights(w, rng), RECURRENT.example_inputs(w, {"steps": 3, "B": 2}, rng)
        inputs["projected"] *= 300
        packed = RECURRENT.prepack(weights, w, kernel.config, kernel.target)
        wanted = RECURRENT.reference(w, inputs, weights)
        outputs = [tvm.runtime.tensor(np.zeros(y.shape, np.float32)) for y in wanted.values()]
        arguments = [tvm.runtime.tensor(np.ascontiguousarray(a)) for a in (*inputs.values(), *packed.values())]
        kernel.call(*arguments, *outputs)
        for got, want in zip(outputs, wanted.values(), strict=True):
            np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("target", [AVX2, AVX512], ids=lambda t: t.name)
@pytest.mark.parametrize("cell", CELLS)
def test_defaults_are_in_the_space(cell: str, target: Target) -> None:
    for hidden in (64, 1024):
        workload = RecurrentWorkload(hidden, cell, "bidirectional")
        assert RECURRENT.accepts(workload, target)
        assert RECURRENT.default(workload, target) in RECURRENT.space(workload, target)


def test_work_counts_the_weight_once() -> None:
    work = RECURRENT.work(RecurrentWorkload(100, "lstm"), {"steps": 10, "B": 2})
    assert work.ops == 2 * 10 * 2 * 4 * 100 * 100
    assert work.bytes == 4 * (4 * 100 * 100 + 10 * 2 * 100 * 5 + 2 * 100 * 2)
