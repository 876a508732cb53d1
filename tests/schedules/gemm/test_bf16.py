"""The linear with bfloat16 weights against float64 on the rounded operands; on AMX tiles under the emulator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmc.errors import KernelError
from llmc.schedules.base import Config
from llmc.schedules.epilogue import ACTIVATIONS
from llmc.schedules.gemm.bf16 import BF16, Bf16LinearWorkload
from llmc.schedules.gemm.bf16_packing import from_bf16, pack_bf16, round_to_bf16
from llmc.targets.base import Target
from llmc.targets.detect import machine
from llmc.targets.x86 import AMX, AVX2, AVX512, TARGETS
from tests import amx_emulator
from tests.schedules.kernels import Kernel, compile_kernels

TOLERANCE = 1e-5
SMALL = {"MR": 3, "NV": 2, "KU": 4, "blocks": 2, "skinny": 2, "ahead_one": 2048, "ahead_many": 0, "task_rows": 48}
ROWS = (1, 2, 3, 5, 8, 9, 15, 16, 17, 31, 33, 50, 149)

Case = tuple[Bf16LinearWorkload, Config | None]


def cases(target: Target) -> list[Case]:
    x = "bf16" if target.tiles else "a32"
    small = SMALL | ({"MR": 16, "NV": 1} if target.tiles else {})

    def case(N: int, K: int, config: Config | None = small, **more: Any) -> Case:
        return Bf16LinearWorkload(N, K, activations=x, **more), config

    return [
        case(1, 1),
        case(1, 32, None),
        case(target.lanes - 1, 31),
        case(target.lanes + 1, 33, None),
        case(97, 192, None),
        case(45, 101),
        *[case(74, 70, activation=a, bias=True) for a in ACTIVATIONS if a != "silu_mul"],
        case(74, 48, None, activation="silu_mul", bias=True, residual=True),
        case(74, 48, small | {"NV": 1 if target.tiles else 2}, activation="silu_mul"),
        case(61, 48, None, residual=True),
    ]


@pytest.fixture(scope="module", params=TARGETS.values(), ids=lambda t: t.name)
def kernels(request: pytest.FixtureRequest) -> list[Kernel]:
    target: Target = request.param
    missing = machine().missing(AVX512 if target is AMX else target)
    if missing:
        pytest.skip(f"CPU lacks {missing}")
    if target is AMX:
        amx_emulator.enable()
    return compile_kernels(BF16, cases(target), target)


def random_case(w: Bf16LinearWorkload, M: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    rng = np.random.default_rng(M)
    inputs = {a.name: rng.standard_normal((M, a.shape[1]), np.float32) for a in w.inputs()}
    return inputs, BF16.example_weights(w, rng)


def test_kernels_equal_the_reference(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        for M in ROWS:
            kernel.check(*random_case(kernel.workload, M), TOLERANCE)


def test_tiles_did_it(kernels: list[Kernel]) -> None:
    """One product a tile of sums and 32 k; none for few rows, none on other targets."""
    if amx_emulator.NATIVE or machine().missing(AVX512):
        pytest.skip("nobody counts tile instructions here")
    emulator = amx_emulator.emulator()
    for kernel in kernels:
        w, config, layout = kernel.workload, kernel.config, kernel.workload.layout(16)
        for M in (2, 40):
            inputs, weights = random_case(w, M)
            packed = BF16.prepack(weights, w, config, kernel.target)
            emulator.reset()
            kernel.run(inputs, packed)
            if kernel.target is not AMX or int(config["skinny"]) >= M:
                assert emulator.counts() == {}
                continue
            taken = max(int(config["NV"]), layout.halves)
            sums = -(-M // 16) * (-(-layout.used_blocks // taken) * taken)
            counts = emulator.counts()
            assert counts["tdpbf16ps"] == sums * layout.padded_K // 32
            assert counts["tilezero"] == counts["tilestored"] == sums
            assert counts["ldtilecfg"] == counts["tilerelease"]


def test_rounding() -> None:
    """To nearest, ties to even, and back."""
    one = 2.0**-7  # the distance of bfloat16s above 1
    given = np.array([1, 1 + one / 2, 1 + 3 * one / 2, 1 + 0.51 * one, -1 - 0.49 * one, 0, -0.0, np.inf], np.float32)
    want = np.array([1, 1, 1 + 2 * one, 1 + one, -1, 0, -0.0, np.inf], np.float32)
    np.testing.assert_array_equal(from_bf16(round_to_bf16(given)), want)
    assert np.signbit(from_bf16(round_to_bf16(given)))[6]
    assert np.isnan(from_bf16(round_to_bf16(np.array([np.nan], np.float32))))[0]


def test_layout_is_what_it_says() -> None:
    """Also of a transposed view, for which no row is contiguous."""
    weight = np.random.default_rng(0).standard_normal((35, 37)).astype(np.float32).T
    layout = Bf16LinearWorkload(*weight.shape, activation="none").layout(16)
    packed = pack_bf16(layout, weight)
    assert packed.shape == layout.weight_shape == (4, 32, 32)
    for n, k in ((0, 0), (15, 1), (16, 2), (36, 34)):
        assert packed[n // 16, k // 2, 2 * (n % 16) + k % 2] == round_to_bf16(weight[n, k : k + 1])[0]
    assert not packed[:, 18:].any() and not packed[3].any()


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda t: t.name)
def test_default_is_in_the_space(target: Target) -> None:
    for N, K in ((960, 576), (49152, 576), (1, 1), (35, 77)):
        for activation in ("none", "silu_mul"):
            if N % 2 == 0 or activation == "none":
                x = "bf16" if target.tiles else "a32"
                w = Bf16LinearWorkload(N, K, activation=activation, activations=x)
                assert BF16.default(w, target) in BF16.space(w, target), w


def test_refusals() -> None:
    rounded = Bf16LinearWorkload(64, 64, activations="bf16")
    assert BF16.accepts(rounded, AMX) and not BF16.accepts(rounded, AVX2)
    with pytest.raises(KernelError, match="outside what the bfloat16 linear computes"):
        BF16.build(rounded, AVX512, BF16.default(rounded, AVX512))
    with pytest.raises(KernelError, match="activations 'a8' are unknown"):
        Bf16LinearWorkload(64, 64, activations="a8")


def test_work_counts_two_bytes_a_weight() -> None:
    work = BF16.work(Bf16LinearWorkload(64, 128), {"M": 2})
    assert (work.ops, work.bytes) == (2 * 2 * 64 * 128, 2 * 64 * 128 + 4 * 2 * (128 + 64))
