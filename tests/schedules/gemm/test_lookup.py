"""Table lookup: tables and sums against exact integers, whose rounding is bounded against the weights themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmc.errors import KernelError
from llmc.schedules.base import Kernel as Named
from llmc.schedules.gemm.lookup import lookup_reference, pack_lookup, representable, tables_reference
from llmc.schedules.gemm.lowbit import LOWBIT, LowBitLinearWorkload
from llmc.schedules.gemm.packing import LowBitLayout
from llmc.targets.base import Target
from llmc.targets.detect import native
from llmc.targets.x86 import AMX, AVX2, AVX512
from llmc.tune.subject import Rejected, Subject
from llmc.tune.task import Point, Task
from tests.schedules.kernels import X86, Kernel, compile_kernels
from tests.schedules.weights import random_weight

LUT = {"MR": 3, "NV": 2, "KU": 8, "blocks": 2, "skinny": 3, "ahead_one": 2048, "ahead_many": 0, "task_rows": 48}
LUT |= {"body": "lut"}
TOLERANCE = 1e-5


def workloads(target: Target) -> list[tuple[LowBitLinearWorkload, float | str]]:
    """Every width, with one unit a group, an odd number of them, several, and a single group; ends of blocks."""

    def case(N: int, K: int, bits: int, group: int, zero: float | str, **more: Any) -> Any:
        symmetric = not isinstance(zero, str)
        return LowBitLinearWorkload(N, K, bits, group, symmetric, zero if symmetric else 0.0, **more), zero

    R = target.lanes
    return [
        case(R + 1, 64, 1, 32, 0.0, scale_dtype="float16"),
        case(74, 96, 2, 96, 2.0, activation="silu_mul", bias=True, residual=True),
        case(2 * R, 256, 3, 128, 4.0),
        case(33, 64, 4, 32, "fractional"),
    ]


@pytest.fixture(scope="module", params=X86)
def kernels(request: pytest.FixtureRequest) -> list[tuple[Kernel, float | str]]:
    target: Target = request.param
    cases = workloads(target)
    configs = [LUT | {"NV": 1 if w.halves == 2 else 2} for w, _ in cases]  # gate and up from one panel, apart
    compiled = compile_kernels(LOWBIT, [(w, c) for (w, _), c in zip(cases, configs, strict=True)], target)
    return [(kernel, zero) for kernel, (_, zero) in zip(compiled, cases, strict=True)]


def check(kernel: Kernel, x: np.ndarray, weights: dict[str, Any], rng: np.random.Generator) -> None:
    w = kernel.workload
    inputs = {"x": x} | ({"residual": rng.standard_normal((len(x), w.columns), np.float32)} if w.residual else {})
    packed = LOWBIT.prepack(weights, w, kernel.config, kernel.target)
    want = LOWBIT.expected(w, kernel.config, inputs, weights)["y"]
    got = kernel.run(inputs, packed)["y"]
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE * max(1.0, float(np.abs(want).max())))


def weights_of(w: LowBitLinearWorkload, zero: float | str, rng: np.random.Generator) -> dict[str, Any]:
    weight = random_weight(rng, w.N, w.K, w.bits, w.group_size, zero, w.scale_dtype)
    return {"weight": weight, "bias": rng.standard_normal(w.N, np.float32)}


def test_kernels_equal_the_integer_reference(kernels: list[tuple[Kernel, float | str]]) -> None:
    """Few rows by tables, more by products: of the same packed planes."""
    for kernel, zero in kernels:
        for M in (1, 2, 3, 4, 7, 50):
            rng = np.random.default_rng(M)
            weights = weights_of(kernel.workload, zero, rng)
            check(kernel, rng.standard_normal((M, kernel.workload.K), np.float32), weights, rng)


def test_the_largest_sums_fit(kernels: list[tuple[Kernel, float | str]]) -> None:
    """All codes at either end, all activations at one size: int16 sums as large as they can be, of both signs."""
    for kernel, zero in kernels:
        w, rng = kernel.workload, np.random.default_rng(0)
        for code in (0, 2**w.bits - 1):
            weights = weights_of(w, zero, rng)
            weights["weight"] = replace(weights["weight"], q=np.full_like(weights["weight"].q, code))
            x = np.full((3, w.K), 3, np.float32) * np.array([[1], [-1], [0]], np.float32)
            check(kernel, x, weights, rng)


def test_tables_hold_every_sum_with_signs() -> None:
    x = np.array([[1, 2, 4, 8] + [0] * 28], np.float32)
    tables, scale = tables_reference(x, 32)
    sums = [sum(v if n >> j & 1 else -v for j, v in enumerate((1, 2, 4, 8))) for n in range(16)]
    np.testing.assert_array_equal(tables[0, 0, 0], np.rint(np.array(sums) * np.float32(127) / np.float32(15)))
    assert not tables[0, 0, 1:].any() and scale[0, 0] == np.float32(15) * np.float32(1 / 127)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_rounding_is_bounded(bits: int) -> None:
    """A sum in a table is off by half a step at most, and counts half of 2**p: what that adds up to, at most."""
    rng = np.random.default_rng(bits)
    x = rng.standard_normal((3, 64), np.float32)
    weight = random_weight(rng, 20, 64, bits, 32, "fractional")
    exact = x.astype(np.float64) @ weight.dequantize().astype(np.float64).T
    _, steps = tables_reference(x, 32)
    bound = (2**bits - 1) / 4 * 8 * (steps @ weight.scale.T)
    assert np.all(np.abs(lookup_reference(x, weight) - exact) <= bound + 1e-5)


@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_planes_have_as_many_bits_as_the_codes(bits: int, lanes: int) -> None:
    """Packing moves bits: as many are set as before, and no two codes share one."""
    layout = LowBitLayout(40, 128, bits, 64, lanes)
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 2**bits, (40, 128), np.uint8)
    q = pack_lookup(layout, codes)
    assert q.shape == layout.q_shape
    assert np.unpackbits(q).sum() == np.unpackbits(codes).sum()
    one = np.zeros_like(codes)
    one[37, 93] = 1 << (bits - 1)
    assert np.unpackbits(pack_lookup(layout, one)).sum() == 1


def test_where_tables_compete() -> None:
    w = LowBitLinearWorkload(64, 64, 2, 32, zero=2.0)
    assert LOWBIT.space(w, AVX512).knobs["body"] == ("dot", "lut")
    for other in (replace(w, bits=4, zero=8.0), replace(w, activations="a32"), replace(w, group_size=16)):
        assert "body" not in LOWBIT.space(other, AVX512).knobs
    assert "body" not in LOWBIT.space(w, AMX).knobs
    assert LOWBIT.default(w, AVX512)["body"] == "dot"
    assert LOWBIT.default(replace(w, N=128), AVX2)["body"] == "lut"
    assert LOWBIT.layout(w, LUT, AVX512) != LOWBIT.layout(w, LUT | {"body": "dot"}, AVX512)
    assert not representable(LowBitLayout(64, 65, 2, 32, 16))
    with pytest.raises(KernelError, match="cannot look sums up"):
        LOWBIT.build(replace(w, K=65), AVX512, LUT)


def test_the_tuner_checks_what_tables_must_compute() -> None:
    """A candidate that looks up is held to its own rounding as closely as products to theirs."""
    workload = LowBitLinearWorkload(64, 64, 2, 32, zero=2.0)
    subject = Subject(Task(Named(LOWBIT, workload), native(), (Point((("M", 2),)),)), False, seed=0)
    if "body" not in subject.default.config:
        pytest.skip("AMX tiles look nothing up")
    candidate = subject.build({**subject.default.config, "body": "lut"})
    subject.check(candidate)
    next(iter(subject.otherwise.values()))["y"][0, 0] += 0.1
    with pytest.raises(Rejected, match="y is off"):
        subject.check(candidate)
