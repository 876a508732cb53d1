"""Embedding lookup in low-bit tables packed as a linear's weight."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.errors import KernelError
from llmc.schedules.embedding.lowbit import LOWBIT_EMBEDDING, LowBitEmbeddingWorkload
from llmc.schedules.gemm.lowbit import LOWBIT, LowBitLinearWorkload
from llmc.targets.base import Target
from llmc.targets.x86 import AVX512
from tests.schedules.kernels import X86, compile_kernels
from tests.schedules.weights import random_weight

TABLES = [  # V, E, bits, group size, zero points, scales
    (21, 70, 4, 32, "minimum", "float16"),
    (49, 576, 8, 32, 128.0, "float32"),
    (100, 64, 4, 64, 8.0, "float16"),
    (33, 37, 4, 16, "fractional", "float32"),
    (17, 103, 8, 103, "whole", "float16"),
    (1, 3, 2, 16, 1.0, "float32"),
    (34, 70, 3, 32, 4.0, "bfloat16"),
    (18, 41, 1, 41, "fractional", "float32"),
]


@pytest.mark.parametrize("target", X86)
def test_rows_are_the_dequantised_table(target: Target) -> None:
    rng = np.random.default_rng(0)
    tables = [random_weight(rng, *table) for table in TABLES]
    workloads = [LowBitEmbeddingWorkload.of(table) for table in tables]
    for kernel, table in zip(
        compile_kernels(LOWBIT_EMBEDDING, [(w, None) for w in workloads], target), tables, strict=True
    ):
        V = table.N
        for ids in ([0], [V - 1, -1, -V, 0, V // 2], rng.integers(-V, V, 31)):
            kernel.check({"ids": np.array(ids, np.int64)}, {"weight": table}, 1e-6)


def test_ids_outside_the_table_read_its_ends() -> None:
    table = random_weight(np.random.default_rng(1), 20, 64, 4, 32, 8.0)
    (target,) = (p.values[0] for p in X86[:1])
    (kernel,) = compile_kernels(LOWBIT_EMBEDDING, [(LowBitEmbeddingWorkload.of(table), None)], target)
    packed = LOWBIT_EMBEDDING.prepack({"weight": table}, kernel.workload, {}, target)
    got = kernel.run({"ids": np.array([20, 1 << 40, -21, -(1 << 40)])}, packed)["y"]
    np.testing.assert_allclose(got, table.dequantize()[[19, 19, 0, 0]], rtol=1e-6, atol=1e-6)


def test_planes_are_those_of_the_linear() -> None:
    """A tied table is stored once: both templates must pack it to the same bytes."""
    for V, E, bits, group, zero, dtype in TABLES:
        table = random_weight(np.random.default_rng(2), V, E, bits, group, zero, dtype)
        linear = LowBitLinearWorkload.of(table)
        ours = LOWBIT_EMBEDDING.prepack({"weight": table}, LowBitEmbeddingWorkload.of(table), {}, AVX512)
        theirs = LOWBIT.prepack({"weight": table}, linear, LOWBIT.default(linear, AVX512), AVX512)
        assert list(ours) == list(theirs)
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_refuses_formats_without_a_layout() -> None:
    workload = LowBitEmbeddingWorkload(64, 64, 5, 32, zero=16.0)
    assert not LOWBIT_EMBEDDING.accepts(workload, AVX512)
    with pytest.raises(KernelError, match="outside what the low-bit embedding reads"):
        LOWBIT_EMBEDDING.build(workload, AVX512, {})
