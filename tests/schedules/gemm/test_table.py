"""Weights whose codes stand for the values of a table, against float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmc.errors import KernelError
from llmc.schedules.formats import STEPS, TABLES, whole_table
from llmc.schedules.gemm.lowbit import LOWBIT, TABLE, LowBitLinearWorkload, TableLinearWorkload
from llmc.targets.base import Target
from llmc.targets.x86 import AMX, AVX2, AVX512
from tests.schedules.kernels import X86, Kernel, compile_kernels

SMALL = {"MR": 3, "NV": 2, "KU": 4, "blocks": 2, "skinny": 2, "ahead_one": 2048, "ahead_many": 0, "task_rows": 48}
ROWS = (1, 2, 3, 4, 7, 31)


def workloads(target: Target) -> list[TableLinearWorkload]:
    R = target.lanes
    return [
        TableLinearWorkload(R + 1, 95, 4, 32, values=values, activations=activations)
        for values in TABLES
        for activations in ("a8", "a32")
    ] + [
        TableLinearWorkload(74, 48, 4, 48, values="nf4", activation="silu_mul", bias=True, residual=True),
        TableLinearWorkload(2 * R, 129, 4, 64, values="fp4", scale_dtype="float16"),
    ]


@pytest.fixture(scope="module", params=X86)
def kernels(request: pytest.FixtureRequest) -> list[Kernel]:
    target: Target = request.param
    cases: list[Any] = [(w, SMALL) for w in workloads(target)]
    return compile_kernels(TABLE, [*cases, (TableLinearWorkload(97, 576, 4, 64, values="nf4"), None)], target)


def test_kernels_equal_the_reference(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        rng = np.random.default_rng(0)
        weights = TABLE.example_weights(kernel.workload, rng)
        for M in ROWS:
            inputs = {a.name: rng.standard_normal((M, a.shape[1]), np.float32) for a in kernel.workload.inputs()}
            kernel.check(inputs, weights, 1e-5)


def test_the_largest_sums_fit(kernels: list[Kernel]) -> None:
    """All weights at either end of the table, all activations at the ends of int8."""
    for kernel in kernels:
        rng = np.random.default_rng(1)
        weights = TABLE.example_weights(kernel.workload, rng)
        values = TABLES[kernel.workload.values]
        for code in (int(np.argmin(values)), int(np.argmax(values))):
            inputs = {a.name: np.full((3, a.shape[1]), 3, np.float32) for a in kernel.workload.inputs()}
            q = np.full_like(weights["weight"].q, code)
            kernel.check(inputs, weights | {"weight": replace(weights["weight"], q=q)}, 1e-5)


def test_float_kernels_take_the_table_as_it_is() -> None:
    """What the reference multiplies with is what the weight says that it is."""
    w = TableLinearWorkload(5, 40, 4, 32, values="nf4", activations="a32")
    weights = TABLE.example_weights(w, np.random.default_rng(0))
    x = np.random.default_rng(1).standard_normal((3, 40), np.float32)
    want = x @ weights["weight"].dequantize().T
    np.testing.assert_allclose(TABLE.reference(w, {"x": x}, weights)["y"], want, rtol=1e-5, atol=1e-5)


def test_tables() -> None:
    """fp4 is E2M1 bit for bit; nf4 is sorted, with 0 and both ends; as bytes both are near enough."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    codes = np.arange(16, dtype=np.uint8)
    assert np.array_equal(codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32), np.array(TABLES["fp4"], np.float32))
    nf4 = np.array(TABLES["nf4"])
    assert (np.diff(nf4) > 0).all() and (nf4[0], nf4[7], nf4[15]) == (-1, 0, 1)
    assert np.array_equal(whole_table("fp4") / STEPS["fp4"], TABLES["fp4"])
    assert np.abs(whole_table("nf4") / STEPS["nf4"] - nf4).max() <= 0.5 / 127


def test_workloads_that_mean_nothing_are_refused() -> None:
    for fields, reason in (({"values": "nf5"}, "no table 'nf5'"), ({"zero": 8.0}, "no zero point")):
        with pytest.raises(KernelError, match=reason):
            TableLinearWorkload(8, 32, 4, 32, **fields)  # type: ignore[arg-type]
    with pytest.raises(KernelError, match="4 bits"):
        TableLinearWorkload(8, 32, 8, 32)


@pytest.mark.parametrize("target", [AVX2, AVX512, AMX], ids=lambda t: t.name)
def test_templates_keep_apart(target: Target) -> None:
    table, plain = TableLinearWorkload(64, 64, 4, 32), LowBitLinearWorkload(64, 64, 4, 32, zero=8.0)
    assert TABLE.accepts(table, target) and not LOWBIT.accepts(table, target)
    assert LOWBIT.accepts(plain, target) and not TABLE.accepts(plain, target)
    assert TABLE.default(table, target) in TABLE.space(table, target)
