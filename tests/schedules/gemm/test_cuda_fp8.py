"""Linear layers with weights in E4M3: emulated against their reference, and what NVIDIA's compiler makes of them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from llmc.emulator.templates import EmulatedKernel
from llmc.errors import KernelError
from llmc.gpu.binary import resources
from llmc.gpu.sources import template_sources
from llmc.gpu.toolchain import find_toolchain
from llmc.schedules.gemm.cuda_fp8 import MMA_FP8, MMA_FP8_F16, MmaFp8Linear
from llmc.schedules.gemm.fp8 import Fp8LinearWorkload
from llmc.targets.cuda import SM80, SM90, CudaTarget
from llmc.targets.x86 import AVX512
from tests.gpu.tools import needs_compiler
from tests.schedules.gemm.test_cuda_mma import needs_emulator

KINDS = {"fp8": (MMA_FP8, SM90), "f16": (MMA_FP8_F16, SM80)}


def check(activations: str, rows: tuple[int, ...], *shape: int, **more: Any) -> None:
    template, target = KINDS[activations]
    workload = Fp8LinearWorkload(*shape, activations=activations, **more)
    kernel = EmulatedKernel(template, workload, target)
    rng = np.random.default_rng(1)
    weights = template.example_weights(workload, rng)
    weights["weight"].q[:, :256] = np.arange(256) % 127 + 128 * (np.arange(256) > 127)  # every value, but no NaN
    packed = template.prepack(weights, workload, kernel.config, target)
    for M in rows:
        inputs = template.example_inputs(workload, {"M": M}, rng)
        inputs["x"][-1] = 0  # a row without a scale
        want = template.reference(workload, inputs, weights)["y"]
        got = kernel.run(inputs, packed)["y"]
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * max(1.0, float(np.abs(want).max())), err_msg=f"M={M}")


@needs_emulator
@pytest.mark.parametrize("activations", KINDS)
def test_emulated_kernels_compute_the_reference(activations: str) -> None:
    """A few rows, up to 16, and more are three kernels."""
    check(activations, (3, 9, 17), 39, 301, bias=True, activation="gelu", residual=True)


@pytest.mark.slow
@needs_emulator
@pytest.mark.parametrize("activations", KINDS)
def test_more_emulated_kernels_compute_the_reference(activations: str) -> None:
    check(activations, (1, 8, 16, 33, 130), 130, 516, activation="silu_mul")
    check(activations, (1, 2, 64), 64, 1024)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("shape", [(1536, 576, "none"), (4096, 4096, "silu_mul")], ids=str)
@pytest.mark.parametrize(("template", "target"), [(MMA_FP8, SM90), (MMA_FP8_F16, SM80), (MMA_FP8_F16, SM90)])
def test_kernels_pass_the_gates(template: MmaFp8Linear, target: CudaTarget, shape: tuple[int, int, str]) -> None:
    """No spills, room for a block, tensor cores at work where products are, and weights loaded 16 bytes wide."""
    N, K, activation = shape
    workload = Fp8LinearWorkload(N, K, activation=activation, activations=template.activations)
    function = template.build(workload, target, template.default(workload, target))
    products = 0
    for kernel in template_sources(function.with_attr("global_symbol", "linear"), target).values():
        found = resources(find_toolchain().compile(kernel.source, target.mcpu))
        assert found.spill_bytes == 0 and found.shared_bytes <= target.static_shared_bytes
        assert kernel.launch.threads and found.registers * kernel.launch.threads <= target.registers
        products += found.hmma >= 8
        assert found.imma == 0
        if found.hmma:
            assert {"LDG.16"} <= {a for a in found.accesses if a.startswith("LDG")} <= {"LDG.16", "LDGSTS.16", "LDG.4"}
    assert products == 3


def test_references_round_as_the_format_says() -> None:
    """One row and one column, in numbers that can be checked by hand: 3.3 of 448ths of the largest is 3.25."""
    workload = Fp8LinearWorkload(1, 4)
    weights = MMA_FP8.example_weights(workload, np.random.default_rng(0))
    weights["weight"].q[:] = np.array([1, 0, 0, 2], np.float32).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    weights["weight"].scale[:] = 0.5
    x = np.array([[3.3, 448, -1, 0.25]], np.float32)
    y = MMA_FP8.reference(workload, {"x": x}, weights)["y"]
    np.testing.assert_allclose(y, [[0.5 * (3.25 + 2 * 0.25)]], rtol=1e-6)
    half = Fp8LinearWorkload(1, 4, activations="f16")
    y = MMA_FP8_F16.reference(half, {"x": x}, weights)["y"]
    np.testing.assert_allclose(y, [[0.5 * (float(np.float16(3.3)) + 2 * 0.25)]], rtol=1e-6)


def test_who_takes_what() -> None:
    byte, half = Fp8LinearWorkload(64, 64), Fp8LinearWorkload(64, 64, activations="f16")
    assert MMA_FP8.accepts(byte, SM90) and not MMA_FP8.accepts(byte, SM80) and not MMA_FP8.accepts(half, SM90)
    assert MMA_FP8_F16.accepts(half, SM80) and MMA_FP8_F16.accepts(half, SM90)
    assert not MMA_FP8_F16.accepts(half, AVX512) and MMA_FP8.accepts(Fp8LinearWorkload(64, 61), SM90)
    assert MMA_FP8.default(byte, SM90) in MMA_FP8.space(byte, SM90)
    with pytest.raises(KernelError, match="outside what fp8_mma computes"):
        MMA_FP8.build(byte, SM80, MMA_FP8.default(byte, SM80))
    with pytest.raises(KernelError, match="activations 'a8' are unknown"):
        Fp8LinearWorkload(64, 64, activations="a8")
