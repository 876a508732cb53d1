"""The low-bit linear with outliers: against float64, and where it must be better than without."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmc.errors import KernelError
from llmc.schedules.gemm.lowbit import LOWBIT, LowBitLinearWorkload
from llmc.schedules.gemm.outliers import OUTLIERS, OutlierLinearWorkload
from llmc.targets.base import Target
from llmc.targets.detect import machine
from llmc.targets.x86 import AMX, AVX2, AVX512
from tests import amx_emulator
from tests.schedules.kernels import X86, Kernel, compile_kernels

SMALL = {"MR": 3, "NV": 2, "KU": 4, "blocks": 2, "skinny": 2, "ahead_one": 2048, "ahead_many": 0, "task_rows": 48}
ROWS = (1, 2, 3, 4, 7, 31)


def workloads(target: Target) -> list[OutlierLinearWorkload]:
    R = target.lanes
    return [
        OutlierLinearWorkload(R + 1, 95, 8, 95, zero=128.0),  # K is no whole number of registers
        OutlierLinearWorkload(74, 48, 8, 48, zero=128.0, bias=True, activation="silu_mul", residual=True, outliers=8),
        OutlierLinearWorkload(R, 129, 4, 32, symmetric=False, bias=True, outliers=4, scale_dtype="float16"),
    ]


def random_inputs(kernel: Kernel, weights: dict[str, Any], M: int, seed: int) -> dict[str, np.ndarray]:
    """Normal values; the outliers a hundred times as large."""
    rng = np.random.default_rng(seed)
    inputs = {a.name: rng.standard_normal((M, a.shape[1]), np.float32) for a in kernel.workload.inputs()}
    inputs["x"][:, weights["weight"].outliers.channels] *= 100
    return inputs


@pytest.fixture(scope="module", params=X86)
def kernels(request: pytest.FixtureRequest) -> list[Kernel]:
    target: Target = request.param
    return compile_kernels(OUTLIERS, [(w, SMALL) for w in workloads(target)], target)


def test_kernels_equal_the_reference(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        weights = OUTLIERS.example_weights(kernel.workload, np.random.default_rng(0))
        for M in ROWS:
            kernel.check(random_inputs(kernel, weights, M, seed=M), weights, 1e-5)


def test_tiles_equal_vnni() -> None:
    """On AMX the sums of int8 leave the tiles; what is added to them is the same."""
    if missing := machine().missing(AVX512):
        pytest.skip(f"CPU lacks {missing}")
    amx_emulator.enable()
    knobs = SMALL | {"MR": 32, "KU": 8}
    tiles, vnni = (
        compile_kernels(OUTLIERS, [(w, config) for w in workloads(target)[1:]], target)
        for target, config in ((AMX, knobs), (AVX512, SMALL))
    )
    for ours, theirs in zip(tiles, vnni, strict=True):
        weights = OUTLIERS.example_weights(ours.workload, np.random.default_rng(0))
        packed = OUTLIERS.prepack(weights, ours.workload, knobs, AMX)
        for M in (1, 5, 17, 40):
            inputs = random_inputs(ours, weights, M, seed=M)
            amx_emulator.emulator().reset()
            np.testing.assert_array_equal(ours.run(inputs, packed)["y"], theirs.run(inputs, packed)["y"])
            assert bool(amx_emulator.emulator().counts()) == (M > 2)


def test_workloads_that_mean_nothing_are_refused() -> None:
    for fields in ({"outliers": 0}, {"outliers": 6}, {"outliers": 44}, {"activations": "a32"}):
        with pytest.raises(KernelError):
            OutlierLinearWorkload(8, 40, 8, 40, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("target", [AVX2, AVX512, AMX], ids=lambda t: t.name)
def test_templates_keep_apart(target: Target) -> None:
    split, plain = (kind(64, 64, 8, 64, zero=128.0) for kind in (OutlierLinearWorkload, LowBitLinearWorkload))
    assert OUTLIERS.accepts(split, target) and not LOWBIT.accepts(split, target)
    assert LOWBIT.accepts(plain, target) and not OUTLIERS.accepts(plain, target)
    assert OUTLIERS.default(split, target) in OUTLIERS.space(split, target)
