"""Embedding lookup, from a plain table and from the panels of a tied output layer: exact copies."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.schedules.embedding.dense import EMBEDDING_DENSE, EmbeddingDenseWorkload
from llmc.schedules.gemm.dense import DENSE, DenseLinearWorkload
from llmc.schedules.gemm.f16 import F16, F16LinearWorkload
from llmc.targets.base import Target
from llmc.targets.x86 import AVX512
from tests.schedules.kernels import X86, Kernel, compile_kernels

V = 103


@pytest.fixture(scope="module", params=X86)
def kernels(request: pytest.FixtureRequest) -> list[Kernel]:
    target: Target = request.param
    sizes = (1, target.lanes - 1, target.lanes, 3 * target.lanes + 1)
    cases = [EmbeddingDenseWorkload(V, E, panel) for E in sizes for panel in (0, 3 * target.lanes)]
    cases += [EmbeddingDenseWorkload(V, E, panel, "float16") for E in sizes for panel in (0, target.lanes)]
    return compile_kernels(EMBEDDING_DENSE, [(w, {"grain": 200}) for w in cases], target)


def table(E: int) -> np.ndarray:
    return np.random.default_rng(E).standard_normal((V, E), np.float32)


@pytest.mark.parametrize("M", [1, 2, 7, 311])
def test_copies_rows(kernels: list[Kernel], M: int) -> None:
    ids = np.random.default_rng(M).integers(-V, V, M)
    for kernel in kernels:
        kernel.check({"ids": ids}, {"weight": table(kernel.workload.E)}, tolerance=0)


def test_first_and_last_rows(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        kernel.check({"ids": np.array([0, V - 1, -1, -V])}, {"weight": table(kernel.workload.E)}, tolerance=0)


def test_ids_out_of_range_stay_inside_the_table(kernels: list[Kernel]) -> None:
    ids = np.array([V, 2**62, -V - 1, -(2**62)])
    for kernel in kernels:
        weights = {"weight": table(kernel.workload.E)}
        packed = EMBEDDING_DENSE.prepack(weights, kernel.workload, kernel.config, kernel.target)
        got = kernel.run({"ids": ids}, packed)["y"]
        stored = weights["weight"].astype(kernel.workload.dtype)
        np.testing.assert_array_equal(got, stored[[V - 1, V - 1, 0, 0]].astype(np.float32))


def test_plain_table_is_not_copied() -> None:
    weights = {"weight": table(8)}
    packed = EMBEDDING_DENSE.prepack(weights, EmbeddingDenseWorkload(V, 8), {"grain": 4096}, AVX512)
    assert packed["weight"] is weights["weight"]


def test_panels_are_those_of_the_linear_layer() -> None:
    config = DENSE.default(DenseLinearWorkload(V, 20), AVX512)
    linear = DENSE.prepack({"weight": table(20)}, DenseLinearWorkload(V, 20), config, AVX512)
    workload = EmbeddingDenseWorkload(V, 20, panel=linear["weight"].shape[2])
    lookup = EMBEDDING_DENSE.prepack({"weight": table(20)}, workload, {"grain": 4096}, AVX512)
    np.testing.assert_array_equal(linear["weight"], lookup["weight"])


def test_float16_panels_are_those_of_the_linear_layer() -> None:
    weights, linear = {"weight": table(21)}, F16LinearWorkload(V, 21)
    panels = F16.prepack(weights, linear, F16.default(linear, AVX512), AVX512)
    workload = EmbeddingDenseWorkload(V, 21, AVX512.lanes, "float16")
    lookup = EMBEDDING_DENSE.prepack(weights, workload, {"grain": 4096}, AVX512)
    np.testing.assert_array_equal(panels["weight"], lookup["weight"])
    assert F16.layout(linear, {}, AVX512) == EMBEDDING_DENSE.layout(workload, {}, AVX512)
    assert lookup["weight"].shape == workload.table_shape


def test_default_is_in_the_space() -> None:
    for panel in (0, 48):
        workload = EmbeddingDenseWorkload(V, 20, panel)
        assert EMBEDDING_DENSE.accepts(workload, AVX512)
        assert EMBEDDING_DENSE.default(workload, AVX512) in EMBEDDING_DENSE.space(workload, AVX512)
