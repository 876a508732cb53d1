"""Linear layers by products of warpgroups: emulated against their references, and what NVIDIA's compiler makes of
them."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmc.emulator.emulator import available
from llmc.emulator.templates import EmulatedKernel
from llmc.gpu.binary import resources
from llmc.gpu.sources import template_sources
from llmc.gpu.toolchain import find_toolchain
from llmc.schedules.base import Template, Workload
from llmc.schedules.gemm.bf16 import Bf16LinearWorkload
from llmc.schedules.gemm.cuda import linear
from llmc.schedules.gemm.cuda_mma import MMA_BF16, MMA_LOWBIT, HalfLinearWorkload
from llmc.schedules.gemm.cuda_wgmma import WGMMA_BF16, WGMMA_F16, WGMMA_FP8, WGMMA_LOWBIT
from llmc.schedules.gemm.f16 import F16LinearWorkload
from llmc.schedules.gemm.fp8 import Fp8LinearWorkload
from llmc.targets.cuda import SM80, SM90, SM90A
from tests.gpu.shipped import LLAMA, MINILM, SMOLLM2
from tests.gpu.tools import needs_compiler

needs_emulator = pytest.mark.skipif(not available(), reason="the emulator needs g++")

Case = tuple[Template, Any]


def half(*fields: Any, **named: Any) -> HalfLinearWorkload:
    return HalfLinearWorkload(*fields, activations="a32", **named)


# Sizes that divide nothing: tiles, steps and groups all end early.
EMULATED: list[Case] = [
    (WGMMA_LOWBIT, half(300, 460, 4, 32, True, 8.0, "float16", bias=True, activation="silu_mul", residual=True)),
    (WGMMA_BF16, Bf16LinearWorkload(39, 301, bias=True, activation="gelu", residual=True, activations="bf16")),
]
MORE: list[Case] = [
    (WGMMA_LOWBIT, half(40, 300, 4, 32, True, 8.0, "float16")),
    (WGMMA_LOWBIT, half(129, 420, 8, 128, True, 128.0, "bfloat16", bias=True, activation="gelu", residual=True)),
    (WGMMA_LOWBIT, half(66, 200, 4, 64, False, bias=True, activation="silu_mul", residual=True)),
    (WGMMA_LOWBIT, half(40, 300, 8, 300, False, bias=True)),
    (WGMMA_LOWBIT, half(127, 200, 2, 64, True, 2.0, "float16")),
    (WGMMA_LOWBIT, half(40, 204, 3, 16, True, 4.0, residual=True)),
    (WGMMA_LOWBIT, half(40, 200, 1, 32, True, 0.0)),
    (WGMMA_LOWBIT, half(257, 65, 4, 65, True, 8.0)),
    (WGMMA_LOWBIT, half(128, 520, 4, 256, True, 8.0, activation="silu_mul")),
    (WGMMA_BF16, Bf16LinearWorkload(130, 72, activation="silu_mul", activations="bf16")),
    (WGMMA_F16, F16LinearWorkload(130, 520, residual=True, activations="f16")),
    (WGMMA_FP8, Fp8LinearWorkload(66, 300, bias=True, activation="silu_mul", residual=True)),
    (WGMMA_FP8, Fp8LinearWorkload(129, 1100)),
]
SHIPPED: list[Case] = [
    (WGMMA_LOWBIT, half(N, K, 4, 32, True, 8.0, "float16", **more)) for N, K, more in (*SMOLLM2, *LLAMA, *MINILM)
]
SHIPPED += [(WGMMA_BF16, Bf16LinearWorkload(N, K, activations="bf16", **more)) for N, K, more in (*SMOLLM2, *MINILM)]
SHIPPED += [
    (WGMMA_LOWBIT, half(4096, 4096, 4, 128, False, scale_dtype="float16")),
    (WGMMA_LOWBIT, half(4096, 4096, 8, 128, True, 128.0, "float16", activation="silu_mul")),
    (WGMMA_LOWBIT, half(4096, 4096, 8, 4096, True, 128.0)),
    (WGMMA_LOWBIT, half(4096, 4096, 4, 16, True, 8.0, "bfloat16")),
    (WGMMA_F16, F16LinearWorkload(4096, 4096, activations="f16")),
    (WGMMA_FP8, Fp8LinearWorkload(4096, 4096)),
    (WGMMA_FP8, Fp8LinearWorkload(3072, 576, activation="silu_mul")),
]


def name(case: Any) -> str:
    return str(case[1].key()) if isinstance(case, tuple) else str(case)


def check(template: Template, workload: Any, sizes: tuple[int, ...], seed: int = 1, **knobs: int) -> None:
    config = {**template.default(workload, SM90A), **knobs}
    assert config in template.space(workload, SM90A)
    of_warpgroups: set[str] = set()

    def noted(name: str, source: str) -> str:
        if "wgmma.mma_async" in source:
            of_warpgroups.add(name)
        return source

    kernel = EmulatedKernel(template, workload, SM90A, config, noted)
    rng = np.random.default_rng(seed)
    weights = template.example_weights(workload, rng)
    packed = template.prepack(weights, workload, config, SM90A)
    for M in sizes:
        inputs = template.example_inputs(workload, {"M": M}, rng)
        want = template.reference(workload, inputs, weights)["y"]
        got = kernel.run(inputs, packed)["y"]
        assert bool(of_warpgroups & set(kernel.launched)) == (M > 16)
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * max(1.0, float(np.abs(want).max())), err_msg=f"M={M}")


@needs_emulator
@pytest.mark.parametrize("case", EMULATED, ids=name)
def test_emulated_kernels_compute_the_reference(case: Case) -> None:
    check(*case, sizes=(3, 17, 65))


@pytest.mark.slow
@needs_emulator
@pytest.mark.parametrize("case", MORE, ids=name)
def test_more_emulated_kernels_compute_the_reference(case: Case) -> None:
    for seed in (1, 2):
        check(*case, sizes=(1, 16, 33, 64, 130), seed=seed)


@pytest.mark.slow
@needs_emulator
@pytest.mark.parametrize(
    "knobs",
    [{"rows": 64, "groups": 1, "ring": 2}, {"groups": 2, "ring": 3, "split": 4}, {"rows": 64, "groups": 1, "split": 8}],
    ids=str,
)
def test_every_shape_of_blocks_computes_the_reference(knobs: dict[str, int]) -> None:
    check(WGMMA_LOWBIT, half(200, 700, 4, 128, True, 8.0, bias=True), sizes=(17, 150), **knobs)
    check(WGMMA_BF16, Bf16LinearWorkload(200, 700, activation="silu_mul", activations="bf16"), sizes=(150,), **knobs)


@pytest.mark.parametrize("case", EMULATED + MORE + SHIPPED, ids=name)
def test_defaults_are_in_the_space(case: Case) -> None:
    template, workload = case
    assert template.accepts(workload, SM90A)
    assert not template.accepts(workload, SM90) and not template.accepts(workload, SM80)
    assert template.default(workload, SM90A) in template.space(workload, SM90A)


def test_weights_are_packed_as_for_other_gpus() -> None:
    """Decoding and many rows read the same bytes."""
    for ours, theirs, workload in (
        (WGMMA_LOWBIT, MMA_LOWBIT, EMULATED[0][1]),
        (WGMMA_BF16, MMA_BF16, EMULATED[1][1]),
    ):
        config = ours.default(workload, SM90A)
        assert ours.layout(workload, config, SM90A) == theirs.layout(workload, config, SM90)
        weights = ours.example_weights(workload, np.random.default_rng(0))
        packed, other = (t.prepack(weights, workload, config, SM90A) for t in (ours, theirs))
        assert list(packed) == list(other) and all(np.array_equal(packed[k], other[k]) for k in packed)


def test_only_hopper_has_them() -> None:
    weight = np.zeros((64, 64), np.float32)
    for target, template in ((SM90A, WGMMA_BF16), (SM90, MMA_BF16), (replace(SM90A, mcpu="sm_100a"), MMA_BF16)):
        assert linear(weight, False, "none", False, "bf16", target).template is template


def test_what_does_not_fit_is_left_to_others() -> None:
    refused: list[tuple[Template, Workload]] = [
        (WGMMA_LOWBIT, half(40, 300, 4, 32, False)),  # sums of x of two groups a step
        (WGMMA_LOWBIT, half(40, 300, 4, 48)),  # groups that end inside of a step
        (WGMMA_BF16, Bf16LinearWorkload(40, 300)),  # x stays float32
    ]
    for template, workload in refused:
        assert not template.accepts(workload, SM90A), workload


def sources_of(template: Template, workload: Any) -> dict[str, Any]:
    config = template.default(workload, SM90A)
    return template_sources(template.build(workload, SM90A, config).with_attr("global_symbol", "linear"), SM90A)


@pytest.mark.parametrize("case", EMULATED, ids=name)
def test_nothing_stands_between_products_of_a_group(case: Case) -> None:
    """An emulator does not see registers: from wgmma.fence to commit there are products, and what they are given."""
    (source,) = (k.source for k in sources_of(*case).values() if "wgmma" in k.source)
    body = source[source.rindex('extern "C" __global__') :]
    groups = re.findall(r"ptx_wgmma_fence\w*\(\);(.*?)\w*ptx_wgmma_commit_group\w*\(\);", body, re.S)
    assert len(groups) == len(re.findall(r"ptx_wgmma_fence\w*\(\);", body)) > 0
    for group in groups:
        assert re.fullmatch(r"(\s*\w*ptx_wgmma_\w*mma_async\w*\([^;]*\);)+\s*", group), group


# What ptxas says where it makes products wait: "(C7510) Potential Performance Loss: wgmma.mma_async instructions are
# serialized due to …", "(C7517) wgmma.wait_group is injected …".
WAITS = re.compile(r"\(C75\d\d\)|serialized|injected")


@needs_compiler
def test_waits_of_the_compilers_own_are_found() -> None:
    (source,) = (k.source for k in sources_of(*EMULATED[1]).values() if "wgmma" in k.source)
    product = re.search(r"\w*mma_async_sync\w*\((\w+)\[0\][^;]*;\n", source[source.rindex('extern "C"') :])
    assert product
    touched = source.replace(product[0], f"{product[0]}{product[1]}[0] *= 3.0f;\n")
    assert WAITS.search(find_toolchain().compile(touched, SM90A.mcpu).log)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("case", SHIPPED, ids=name)
def test_shipped_kernels_pass_the_gates(case: Case) -> None:
    """No spills, room for a block, tensor cores of warpgroups at work without waits of ptxas's own between products,
    and loads of x 16 bytes wide."""
    for kernel in sources_of(*case).values():
        binary = find_toolchain().compile(kernel.source, SM90A.mcpu)
        found = resources(binary)
        assert found.spill_bytes == 0 and not WAITS.search(binary.log)
        dynamic = int(kernel.launch.shared) if kernel.launch.shared.isdecimal() else 0
        assert found.shared_bytes + dynamic <= SM90A.block_shared_bytes
        assert kernel.launch.threads and found.registers * kernel.launch.threads <= SM90A.registers
        if "wgmma" in kernel.source:
            assert found.hmma == 8 and found.imma == 0
            assert found.accesses["LDG.16"] >= 8
            assert_registers_are_left_alone(binary.ptx.decode().rstrip("\0"))


def assert_registers_are_left_alone(ptx: str) -> None:
    """From wgmma.fence to the wait for it, no instruction but products has registers of theirs: in straight code, which
    a step is."""
    instructions = [line.strip() for line in ptx.splitlines() if line.strip() and not line.strip().startswith("//")]
    groups: list[set[str]] = []
    issued: set[str] = set()
    fenced = False
    for line in instructions:
        names = set(re.findall(r"%\w+", line))
        if "wgmma.fence" in line:
            fenced = True
        elif "wgmma.mma_async" in line:
            assert fenced
            issued |= names - set(re.findall(r"%rd\w+", line))
        elif "wgmma.commit_group" in line:
            groups.append(issued)
            issued, fenced = set(), False
        elif match := re.search(r"wgmma\.wait_group\.sync\.aligned (\d+)", line):
            groups = groups[len(groups) - int(match[1]) :] if int(match[1]) else []
        else:
            written = re.match(r"[\w.:]+\s+(\{[^}]*\}|[^,;]*)", line)
            touched = set(re.findall(r"%f\w+", line)) | set(re.findall(r"%\w+", written[1]) if written else [])
            held = set().union(issued, *groups)
            assert not touched & held, line
    assert not groups and not issued
