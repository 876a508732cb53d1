"""The norm kernel against float64: kinds, options, sizes around the vector width, and hard numbers."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.errors import KernelError
from llmc.schedules.norm.norm import NORM, NormWorkload
from llmc.targets.base import Target
from llmc.targets.x86 import AVX512
from tests.schedules.kernels import X86, Kernel, compile_kernels

CONFIG = {"unroll": 2, "grain": 2000}  # calls of 2000 elements and more run in parallel


@pytest.fixture(scope="module", params=X86)
def kernels(request: pytest.FixtureRequest) -> list[Kernel]:
    target: Target = request.param
    lanes = target.lanes
    cases = [NormWorkload(K, kind) for K in (1, lanes - 1, lanes, 2 * lanes + 1, 101) for kind in ("rms", "layer")]
    for kind in ("rms", "layer"):
        cases.append(NormWorkload(101, kind, 1e-6, bias=True))
        cases.append(NormWorkload(101, kind, 1e-6, residual=True))
        cases.append(NormWorkload(101, kind, 1e-6, bias=True, residual=True, sum_output=True))
    return compile_kernels(NORM, [*((w, CONFIG) for w in cases), (NormWorkload(576), None)], target)


def random_case(workload: NormWorkload, M: int, seed: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    inputs = {a.name: rng.standard_normal((M, workload.K), np.float32) for a in workload.inputs()}
    return inputs, {n: rng.standard_normal(workload.K, np.float32) for n in ("weight", "bias")[: 1 + workload.bias]}


@pytest.mark.parametrize("M", [1, 2, 19, 20, 53])
def test_equals_reference(kernels: list[Kernel], M: int) -> None:
    for seed, kernel in enumerate(kernels):
        inputs, weights = random_case(kernel.workload, M, seed)
        kernel.check(inputs, weights, tolerance=1e-6)


def test_layer_norm_of_a_large_mean_keeps_its_digits(kernels: list[Kernel]) -> None:
    """The mean of squares minus the square of the mean would lose all but one digit of the variance here."""
    for kernel in kernels:
        if kernel.workload.kind == "layer" and kernel.workload.K > 1:
            inputs, weights = random_case(kernel.workload, 3, 1)
            inputs["x"] += 1000
            kernel.check(inputs, weights, tolerance=1e-3)  # the mean, rounded, is off by up to 1e-4


def test_zeros_and_large_values(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        inputs, weights = random_case(kernel.workload, 3, 2)
        inputs["x"][:] *= np.array([[0], [1e-12], [1e15]], np.float32)
        kernel.check(inputs, weights, tolerance=1e-6)


def test_sum_needs_a_residual() -> None:
    with pytest.raises(KernelError, match="residual"):
        NormWorkload(8, sum_output=True)


def test_default_is_in_the_space() -> None:
    workload = NormWorkload(576)
    assert NORM.accepts(workload, AVX512)
    assert NORM.default(workload, AVX512) in NORM.space(workload, AVX512)
    assert NORM.work(workload, {"M": 2}).bytes == 4 * (2 * 2 * 576 + 576)
