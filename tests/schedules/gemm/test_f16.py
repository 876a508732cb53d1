"""The linear with float16 weights against float64 on the rounded operands; emulated on tensor cores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmc.errors import KernelError
from llmc.gpu.binary import resources
from llmc.gpu.sources import template_sources
from llmc.gpu.toolchain import find_toolchain
from llmc.schedules.base import Config
from llmc.schedules.epilogue import ACTIVATIONS
from llmc.schedules.gemm.cuda_f16 import MMA_F16
from llmc.schedules.gemm.f16 import F16, F16LinearWorkload, round_to_f16
from llmc.targets.base import Target
from llmc.targets.cuda import SM80, SM90, CudaTarget
from llmc.targets.x86 import AVX2, AVX512, TARGETS
from tests.gpu.tools import needs_compiler
from tests.schedules.gemm.test_cuda_mma import check, needs_emulator
from tests.schedules.kernels import X86, Kernel, compile_kernels

TOLERANCE = 1e-5
SMALL = {"MR": 3, "NV": 2, "KU": 4, "blocks": 2, "skinny": 2, "ahead_one": 2048, "ahead_many": 0, "task_rows": 48}
ROWS = (1, 2, 3, 5, 8, 9, 17, 50)


def cases(target: Target) -> list[tuple[F16LinearWorkload, Config | None]]:
    def case(N: int, K: int, config: Config | None = SMALL, **more: Any) -> tuple[F16LinearWorkload, Config | None]:
        return F16LinearWorkload(N, K, **more), config

    return [
        case(1, 1),
        case(1, 32, None),
        case(target.lanes - 1, 31),
        case(target.lanes + 1, 33, None),
        case(45, 101),
        *[case(74, 70, activation=a, bias=True) for a in ACTIVATIONS if a != "silu_mul"],
        case(74, 48, None, activation="silu_mul", bias=True, residual=True),
        case(74, 48, activation="silu_mul"),
    ]


@pytest.fixture(scope="module", params=X86)
def kernels(request: pytest.FixtureRequest) -> list[Kernel]:
    target: Target = request.param
    return compile_kernels(F16, cases(target), target)


def test_kernels_equal_the_reference(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        for M in ROWS:
            rng = np.random.default_rng(M)
            inputs = {a.name: rng.standard_normal((M, a.shape[1]), np.float32) for a in kernel.workload.inputs()}
            kernel.check(inputs, F16.example_weights(kernel.workload, rng), TOLERANCE)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_layout_is_what_it_says(dtype: Any) -> None:
    """Also of a transposed view, for which no row is contiguous."""
    weight = np.random.default_rng(0).standard_normal((35, 37)).astype(dtype).T
    layout = F16LinearWorkload(*weight.shape).layout(16)
    packed = layout.pack(weight)
    assert packed.shape == layout.weight_shape == (4, 36, 16) and packed.dtype == np.float16
    for n, k in ((0, 0), (15, 1), (16, 2), (36, 34)):
        assert packed[n // 16, k, n % 16] == np.float16(weight[n, k])
    assert not packed[:, 35:].any() and not packed[3].any()


def test_what_float16_cannot_hold_is_refused() -> None:
    assert np.isinf(round_to_f16(np.array([np.inf], np.float32)))  # what was infinite stays so
    with pytest.raises(KernelError, match="a weight of magnitude 70000 is beyond float16") as raised:
        round_to_f16(np.array([1, -7e4], np.float32))
    assert "--quantize bf16" in str(raised.value)


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda t: t.name)
def test_default_is_in_the_space(target: Target) -> None:
    for N, K, activation in ((960, 576, "silu_mul"), (49152, 576, "none"), (1, 1, "none"), (35, 77, "none")):
        w = F16LinearWorkload(N, K, activation=activation)
        assert F16.default(w, target) in F16.space(w, target), w


def test_refusals() -> None:
    rounded = F16LinearWorkload(64, 64, activations="f16")
    assert MMA_F16.accepts(rounded, SM80) and not F16.accepts(rounded, AVX2)
    assert MMA_F16.accepts(F16LinearWorkload(64, 61, activations="f16"), SM80)
    with pytest.raises(KernelError, match="outside what the float16 linear computes"):
        F16.build(rounded, AVX512, F16.default(rounded, AVX512))
    with pytest.raises(KernelError, match="activations 'bf16' are unknown"):
        F16LinearWorkload(64, 64, activations="bf16")


@needs_emulator
def test_emulated_kernel_computes_the_reference() -> None:
    workload = F16LinearWorkload(39, 301, bias=True, activation="gelu", residual=True, activations="f16")
    check(MMA_F16, workload, rows=(3, 17))


@pytest.mark.slow
@needs_emulator
def test_more_emulated_kernels_compute_the_reference() -> None:
    check(MMA_F16, F16LinearWorkload(130, 72, activation="silu_mul", activations="f16"), rows=(1, 16, 33, 130))


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("target", [SM80, SM90], ids=lambda t: t.name)
@pytest.mark.parametrize("shape", [(1536, 576, "none"), (4096, 4096, "silu_mul")], ids=str)
def test_kernels_pass_the_gates(shape: tuple[int, int, str], target: CudaTarget) -> None:
    """No spills, room for a block, tensor cores at work in all but the kernel that adds up what blocks sharing k have
    made, and every load from global memory 16 bytes wide."""
    products = 0
    N, K, activation = shape
    workload = F16LinearWorkload(N, K, activation=activation, activations="f16")
    function = MMA_F16.build(workload, target, MMA_F16.default(workload, target))
    for kernel in template_sources(function.with_attr("global_symbol", "linear"), target).values():
        found = resources(find_toolchain().compile(kernel.source, target.mcpu))
        assert found.spill_bytes == 0 and found.shared_bytes <= target.static_shared_bytes
        assert kernel.launch.threads and found.registers * kernel.launch.threads <= target.registers
        assert {access for access in found.accesses if access.startswith("LDG")} <= {"LDG.16", "LDGSTS.16"}
        products += found.hmma >= 8
        assert found.imma == 0
    assert products == 3
