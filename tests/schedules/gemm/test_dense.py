"""The fp32 linear kernel against float64, at every edge of its tiles."""

from __future__ import annotations

import time

import numpy as np
import pytest

from llmc.errors import KernelError
from llmc.schedules.epilogue import ACTIVATIONS
from llmc.schedules.gemm.dense import DENSE, DenseLinearWorkload
from llmc.schedules.gemm.panels import pack_panels
from llmc.targets.base import Target
from llmc.targets.x86 import AVX2, AVX512
from tests.schedules.kernels import X86, Kernel, compile_kernels

MR = 5  # a small register block: all of its edges are few rows away
SMALL = {"MR": MR, "NV": 2, "KU": 4, "KC": 4096, "ahead": 0}
SLICED = SMALL | {"KC": 512, "ahead": 1024}

ROWS = [1, 2, MR - 1, MR, MR + 1, 2 * MR - 1, 23, 8 * MR, 8 * MR + 1]


def edges(target: Target) -> list[DenseLinearWorkload]:
    NR = 2 * target.lanes
    sizes = [(1, 1), (NR - 1, 3), (NR, 4), (NR + 1, 5), (2 * NR + target.lanes, 17), (97, 61)]
    return [DenseLinearWorkload(N, K) for N, K in sizes]


def epilogues() -> list[DenseLinearWorkload]:
    every = [DenseLinearWorkload(74, 29, activation=a, bias=True) for a in ACTIVATIONS]
    return [*every, *(DenseLinearWorkload(74, 29, activation=a, residual=True) for a in ("none", "silu_mul"))]


def sliced() -> list[DenseLinearWorkload]:
    """K of more than one slice: in equal parts, with a last step that is not whole, with an epilogue."""
    return [
        DenseLinearWorkload(33, 513),
        DenseLinearWorkload(33, 1024),
        DenseLinearWorkload(70, 1543, activation="silu_mul", bias=True, residual=True),
    ]


@pytest.fixture(scope="module", params=X86)
def kernels(request: pytest.FixtureRequest) -> list[Kernel]:
    target: Target = request.param
    cases = [(w, SMALL) for w in (*edges(target), *epilogues())]
    cases += [(w, SLICED) for w in sliced()]
    return compile_kernels(DENSE, [*cases, (DenseLinearWorkload(131, 67, bias=True), None)], target)


def random_case(
    workload: DenseLinearWorkload, M: int, seed: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    inputs = {a.name: rng.standard_normal((M, a.shape[1]), np.float32) for a in workload.inputs()}
    weights = {"weight": rng.standard_normal((workload.N, workload.K), np.float32) / np.float32(workload.K**0.5)}
    return inputs, weights | ({"bias": rng.standard_normal(workload.N, np.float32)} if workload.bias else {})


@pytest.mark.parametrize("M", ROWS)
def test_equals_reference(kernels: list[Kernel], M: int) -> None:
    for seed, kernel in enumerate(kernels):
        kernel.check(*random_case(kernel.workload, M, seed), tolerance=2e-6)


def test_activations_saturate_without_nan(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        inputs, weights = random_case(kernel.workload, 3, 0)
        inputs["x"][:] *= np.array([[1e-30], [1e3], [1e6]], np.float32)
        kernel.check(inputs, weights, tolerance=2e-6)


def test_weight_may_be_a_transposed_view(kernels: list[Kernel]) -> None:
    inputs, weights = random_case(kernels[-1].workload, 4, 7)
    kernels[-1].check(inputs, weights | {"weight": np.asfortranarray(weights["weight"])}, tolerance=2e-6)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("N", "K", "NR", "halves"), [(1, 1, 8, 1), (48, 5, 16, 1), (50, 300, 16, 1), (70, 9, 32, 2)])
def test_panels_hold_every_row_once(N: int, K: int, NR: int, halves: int, transposed: bool) -> None:
    weight = np.arange(1, N * K + 1, dtype=np.float32).reshape(N, K)
    packed = pack_panels(np.asfortranarray(weight) if transposed else weight, NR, halves)
    width, rows = NR // halves, N // halves
    assert packed.shape == (-(-rows // width), K, NR) and packed.flags.c_contiguous
    for n in range(N):
        half, row = divmod(n, rows)
        np.testing.assert_array_equal(packed[row // width, :, half * width + row % width], weight[n])
    assert np.count_nonzero(packed) == N * K


@pytest.mark.parametrize("transposed", [False, True])
def test_packing_is_fast(transposed: bool) -> None:
    weight = np.ones((1536, 8192) if transposed else (8192, 1536), np.float32)
    start = time.process_time()
    pack_panels(weight.T if transposed else weight, 48)
    assert time.process_time() - start < 1, "50 MB must take well under a second"


@pytest.mark.parametrize("target", [AVX2, AVX512], ids=lambda t: t.name)
@pytest.mark.parametrize("activation", ["none", "silu_mul"])
def test_default_is_in_the_space(target: Target, activation: str) -> None:
    workload = DenseLinearWorkload(64, 64, activation=activation)
    assert DENSE.accepts(workload, target)
    space = DENSE.space(workload, target)
    assert DENSE.default(workload, target) in space
    assert all(int(c["MR"]) * int(c["NV"]) < target.vector_registers for c in space)


def test_work_counts_what_the_roofline_needs() -> None:
    work = DENSE.work(DenseLinearWorkload(8, 4, residual=True), {"M": 2})
    assert (work.ops, work.bytes) == (2 * 2 * 8 * 4, 4 * (8 * 4 + 2 * 4 + 2 * 2 * 8))


def test_impossible_workloads_are_refused() -> None:
    with pytest.raises(KernelError, match="odd"):
        DenseLinearWorkload(7, 4, activation="silu_mul")
    with pytest.raises(KernelError, match="swish"):
        DenseLinearWorkload(8, 4, activation="swish")
