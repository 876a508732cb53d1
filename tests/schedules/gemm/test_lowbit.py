"""The low-bit linear kernel against float64, at every edge of its tiles, groups and formats."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmc.errors import KernelError
from llmc.schedules.base import Config
from llmc.schedules.epilogue import ACTIVATIONS
from llmc.schedules.gemm.activations import quantize_reference
from llmc.schedules.gemm.lowbit import LOWBIT, LowBitLinearWorkload
from llmc.targets.base import Target
from llmc.targets.x86 import AVX2, AVX512, AVX_VNNI, TARGETS
from llmc.tvm_shim import tvm
from tests.schedules.kernels import BYTES, Kernel, compile_kernels
from tests.schedules.weights import random_weight

TOLERANCE = 1e-5
SMALL = {"MR": 3, "NV": 2, "KU": 4, "blocks": 2, "skinny": 2, "ahead_one": 2048, "ahead_many": 0, "task_rows": 48}
NARROW = SMALL | {"NV": 1, "KU": 8, "blocks": 1, "ahead_one": 0, "ahead_many": 2048}
WIDE_KU = SMALL | {"KU": 16}
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 31, 149)  # around MR, 2 MR and `skinny`; primes; two spans of task_rows

Case = tuple[LowBitLinearWorkload, float | str, Config | None]


def case(N: int, K: int, bits: int, group: int, zero: float | str, config: Config | None = SMALL, **more: Any) -> Case:
    workload = LowBitLinearWorkload(
        N, K, bits, group, symmetric=not isinstance(zero, str), zero=0.0 if isinstance(zero, str) else zero, **more
    )
    return workload, zero, config


def formats(target: Target) -> list[Case]:
    """Codes of every width and zero point, groups of every length, N and K at the edges of blocks and groups."""
    R = target.lanes
    return [
        case(1, 32, 4, 32, 8.0),
        case(R - 1, 31, 4, 32, 8.0, NARROW),
        case(R, 33, 4, 32, "whole"),
        case(R + 1, 95, 4, 32, "fractional", NARROW),
        case(97, 576, 4, 32, 8.0, None),
        case(2 * R, 129, 4, 64, 7.0),
        case(61, 300, 4, 128, "fractional"),
        case(53, 100, 4, 100, 8.0),
        case(37, 576, 4, 576, "fractional"),
        case(41, 67, 2, 16, 1.0),
        case(R + 3, 40, 8, 32, 128.0),
        case(67, 161, 8, 32, "fractional", NARROW),
        case(29, 576, 8, 576, 128.0, None),
        case(31, 103, 8, 103, "whole"),
        case(R + 1, 95, 3, 32, 4.0, NARROW, scale_dtype="bfloat16"),
        case(61, 300, 3, 64, "fractional", WIDE_KU),
        case(37, 70, 3, 70, 4.0, None),
        case(R + 2, 97, 1, 32, "fractional", NARROW),
        case(131, 96, 8, 48, 0.0, None, scale_dtype="float16"),
        case(35, 64, 4, 32, 8.0, scale_dtype="float16"),
        case(R + 5, 161, 4, 32, "minimum", scale_dtype="float16", zero_dtype="float16"),
        case(50, 96, 8, 32, "minimum", None, zero_dtype="float16"),
    ]


def float32_formats(target: Target) -> list[Case]:
    return [
        case(target.lanes + 1, 33, 4, 32, 8.0, None, activations="a32"),
        case(45, 97, 4, 32, "fractional", activations="a32"),
        case(33, 63, 8, 64, 128.0, activations="a32", scale_dtype="float16"),
        case(70, 131, 8, 32, "fractional", None, activations="a32", activation="silu_mul", bias=True),
        case(34, 107, 3, 32, 4.0, activations="a32", activation="silu_mul", scale_dtype="bfloat16"),
        case(39, 95, 4, 32, "minimum", activations="a32", zero_dtype="float16"),
    ]


def epilogues() -> list[Case]:
    every = [case(74, 48, 4, 32, 8.0, activation=a, bias=True) for a in ACTIVATIONS]
    return [
        *every,
        case(74, 48, 8, 32, "whole", activation="silu_mul", residual=True, bias=True),
        case(74, 48, 4, 32, 8.0, NARROW, activation="silu_mul"),
        case(61, 48, 4, 32, 8.0, None, residual=True),
    ]


@pytest.fixture(scope="module", params=BYTES)
def kernels(request: pytest.FixtureRequest) -> list[tuple[Kernel, float | str]]:
    target: Target = request.param
    cases = formats(target)
    if target is not AVX_VNNI:
        cases += [*float32_formats(target), *epilogues()]
    compiled = compile_kernels(LOWBIT, [(workload, config) for workload, _, config in cases], target)
    return [(kernel, zero) for kernel, (_, zero, _) in zip(compiled, cases, strict=True)]


def random_case(
    w: LowBitLinearWorkload, zero: float | str, M: int, seed: int
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    rng = np.random.default_rng(seed)
    inputs = {a.name: rng.standard_normal((M, a.shape[1]), np.float32) for a in w.inputs()}
    weights: dict[str, Any] = {"weight": random_weight(rng, w.N, w.K, w.bits, w.group_size, zero, w.scale_dtype)}
    return inputs, weights | ({"bias": rng.standard_normal(w.N, np.float32)} if w.bias else {})


def test_kernels_equal_the_reference(kernels: list[tuple[Kernel, float | str]]) -> None:
    for kernel, zero in kernels:
        for M in ROWS:
            kernel.check(*random_case(kernel.workload, zero, M, seed=M), TOLERANCE)


def test_extreme_codes_and_activations_do_not_saturate(kernels: list[tuple[Kernel, float | str]]) -> None:
    """All codes at either end, all activations at the ends of int8: the largest sums that integers must hold."""
    for kernel, zero in kernels:
        for code in (0, 2**kernel.workload.bits - 1):
            inputs, weights = random_case(kernel.workload, zero, 5, seed=code)
            inputs["x"] = np.where(inputs["x"] > 0, np.float32(3), np.float32(-3))
            inputs["x"][0] = 3
            weights["weight"] = replace(weights["weight"], q=np.full_like(weights["weight"].q, code))
            kernel.check(inputs, weights, TOLERANCE)


def test_rows_of_zeros_tiny_and_huge_values(kernels: list[tuple[Kernel, float | str]]) -> None:
    for kernel, zero in kernels[:4]:
        inputs, weights = random_case(kernel.workload, zero, 4, seed=0)
        inputs["x"] *= np.array([[0], [1e-38], [1e-20], [1e20]], np.float32)
        for row in range(4):
            one = {name: array[row : row + 1] for name, array in inputs.items()}
            got = kernel.run(one, LOWBIT.prepack(weights, kernel.workload, kernel.config, kernel.target))["y"]
            want = LOWBIT.reference(kernel.workload, one, weights)["y"]
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * float(np.abs(want).max()))


def test_nothing_is_written_outside_y(kernels: list[tuple[Kernel, float | str]]) -> None:
    """y lies in the middle of a larger array; what is around it stays as it was."""
    for kernel, zero in kernels:
        w = kernel.workload
        inputs, weights = random_case(w, zero, 3, seed=1)
        packed = LOWBIT.prepack(weights, w, kernel.config, kernel.target)
        surroundings = np.full(3 * w.columns + 256, np.nan, np.float32)
        start = -surroundings.ctypes.data % 64 // 4 + 64
        y = surroundings[start : start + 3 * w.columns].reshape(3, w.columns)
        kernel.call(*map(tvm.runtime.tensor, (*inputs.values(), *packed.values())), y)
        assert np.isfinite(y).all()
        assert np.isnan(surroundings[:start]).all() and np.isnan(surroundings[start + y.size :]).all()


def test_reference_is_the_dequantised_linear() -> None:
    """float32 activations: exactly x W^T. int8 ones: within their rounding of it."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((7, 576), np.float32)
    for zero in (8.0, "fractional"):
        weight = random_weight(rng, 96, 576, 4, 32, zero)
        want = x.astype(np.float64) @ weight.dequantize().T.astype(np.float64)
        for activations, tolerance in (("a32", 1e-6), ("a8", 1e-2)):
            w = LowBitLinearWorkload.of(weight, activations=activations)
            got = LOWBIT.reference(w, {"x": x}, {"weight": weight})["y"]
            assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


def test_quantised_activations() -> None:
    x = np.array([[127, -1, 0.5, 1.5, 0, 0, 2, -8]], np.float32)
    codes, scale = quantize_reference(x, 4)
    np.testing.assert_array_equal(codes, [[[127, -1, 0, 2], [0, 0, 32, -127]]])  # halves go to even
    np.testing.assert_allclose(scale, [[1, 8 / 127]], rtol=1e-6)


SHAPES = ((960, 576), (576, 1536), (49152, 576), (4096, 4096), (11008, 4096), (1, 1), (35, 77))


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda t: t.name)
def test_default_is_in_the_space(target: Target) -> None:
    for (N, K), bits, group in ((s, b, g) for s in SHAPES for b in (1, 2, 3, 4, 8) for g in (32, 128, 1 << 20)):
        for activations, activation in (("a8", "none"), ("a32", "none"), ("a8", "silu_mul"), ("a32", "silu_mul")):
            if activation == "silu_mul" and N % 2:
                continue
            w = LowBitLinearWorkload(N, K, bits, group, activations=activations, activation=activation)
            assert LOWBIT.default(w, target) in LOWBIT.space(w, target), w


def test_accepts_only_what_is_exact() -> None:
    good = LowBitLinearWorkload(64, 64, 4, 32, zero=8.0)
    assert LOWBIT.accepts(good, AVX2) and LOWBIT.accepts(good, AVX512)
    for bad in (
        replace(good, bits=5),
        replace(good, group_size=24),
        replace(good, zero=7.5),
        replace(good, bits=8, K=1 << 17, group_size=1 << 17),  # int32 sums could overflow
    ):
        assert not LOWBIT.accepts(bad, AVX512), bad
        with pytest.raises(KernelError, match="outside what the low-bit linear computes"):
            LOWBIT.build(bad, AVX512, LOWBIT.default(good, AVX512))


def test_workload_refuses_nonsense() -> None:
    with pytest.raises(KernelError, match="activation 'swish' is unknown"):
        LowBitLinearWorkload(64, 64, 4, 32, activation="swish")
    with pytest.raises(KernelError, match="activations 'a4' are unknown"):
        LowBitLinearWorkload(64, 64, 4, 32, activations="a4")
    with pytest.raises(KernelError, match="N = 63 is odd"):
        LowBitLinearWorkload(63, 64, 4, 32, activation="silu_mul")


def test_workload_of_a_weight() -> None:
    rng = np.random.default_rng(0)
    whole = LowBitLinearWorkload.of(random_weight(rng, 8, 64, 4, 32, 8.0, "float16"), residual=True)
    assert (whole.symmetric, whole.zero, whole.scale_dtype, whole.residual) == (True, 8.0, "float16", True)
    for zero in (7.5, "fractional"):
        w = LowBitLinearWorkload.of(random_weight(rng, 8, 64, 4, 32, zero))
        assert (w.symmetric, w.zero, w.scale_dtype) == (False, 0.0, "float32")
    small = random_weight(rng, 8, 64, 3, 32, 4.0, "bfloat16")
    halves = LowBitLinearWorkload.of(replace(small, scale=small.scale * np.float32(2.0**-30)))  # beyond float16's range
    wide = replace(halves, scale_dtype="float32")
    assert halves.scale_dtype == "bfloat16"
    assert LOWBIT.work(wide, {"M": 1}).bytes - LOWBIT.work(halves, {"M": 1}).bytes == 2 * 8 * 2


def test_work_counts_the_stored_bytes() -> None:
    w = LowBitLinearWorkload(64, 128, 4, 32, zero=8.0, scale_dtype="float16")
    work = LOWBIT.work(w, {"M": 2})
    assert work.ops == 2 * 2 * 64 * 128
    assert work.bytes == 64 * 128 / 2 + 64 * 4 * 2 + 4 * 2 * (128 + 64)
