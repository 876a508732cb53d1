"""Linear layers on tensor cores: emulated against their references, their layout against the PTX ISA's tables, and what
NVIDIA's compiler makes of them."""

from __future__ import annotations

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
from llmc.schedules.gemm.cuda_mma import MMA_BF16, MMA_INT8, MMA_LOWBIT, HalfLinearWorkload, MmaInt8Linear
from llmc.schedules.gemm.cuda_mma_packing import FragmentLayout
from llmc.schedules.gemm.cuda_mma_tile import CHUNKS, swizzled
from llmc.schedules.gemm.cuda_outliers import MMA_OUTLIERS, HalfOutlierLinearWorkload
from llmc.schedules.gemm.cuda_tables import MMA_INT8_TABLE, MMA_TABLE, HalfTableLinearWorkload
from llmc.schedules.gemm.lowbit import LowBitLinearWorkload, TableLinearWorkload
from llmc.targets.cuda import SM80, SM90, CudaTarget
from llmc.targets.x86 import AVX2
from tests.gpu.tools import needs_compiler

needs_emulator = pytest.mark.skipif(not available(), reason="the emulator needs g++")


def table(*fields: Any, **named: Any) -> HalfTableLinearWorkload:
    return HalfTableLinearWorkload(*fields, activations="a32", **named)


def outlying(*fields: Any, **named: Any) -> HalfOutlierLinearWorkload:
    return HalfOutlierLinearWorkload(*fields, activations="a32", **named)


def half(*fields: Any, **named: Any) -> HalfLinearWorkload:
    return HalfLinearWorkload(*fields, activations="a32", **named)


# Sizes that divide nothing: tiles, steps and groups all end early.
EMULATED: list[tuple[Template, Workload]] = [
    (MMA_LOWBIT, half(40, 300, 4, 32, True, 8.0, "float16")),
    (MMA_INT8, LowBitLinearWorkload(40, 300, 4, 32, True, 8.0, "float16")),
    (MMA_BF16, Bf16LinearWorkload(39, 301, bias=True, activation="gelu", residual=True, activations="bf16")),
    (MMA_TABLE, table(40, 300, 4, 32, scale_dtype="float16", values="nf4")),
    (MMA_OUTLIERS, outlying(40, 300, 8, 300, True, 128.0, outliers=5)),
]
MORE: list[tuple[Template, Workload]] = [
    (MMA_LOWBIT, half(66, 100, 4, 32, False, bias=True, activation="silu_mul", residual=True)),
    (MMA_LOWBIT, half(37, 420, 8, 128, True, 128.0, "bfloat16", bias=True, activation="gelu", residual=True)),
    (MMA_LOWBIT, half(40, 200, 2, 64, True, 2.0, "float16")),
    (MMA_LOWBIT, half(40, 204, 3, 16, False, residual=True)),
    (MMA_LOWBIT, half(40, 300, 8, 300, False, bias=True)),
    (MMA_LOWBIT, half(128, 520, 4, 256, True, 8.0, activation="silu_mul")),
    (MMA_INT8, LowBitLinearWorkload(66, 300, 8, 128, True, 128.0, bias=True, activation="silu_mul", residual=True)),
    (MMA_INT8, LowBitLinearWorkload(40, 200, 4, 64, False, residual=True)),
    (MMA_BF16, Bf16LinearWorkload(130, 72, activation="silu_mul", activations="bf16")),
    (MMA_LOWBIT, half(40, 301, 1, 32, False)),
    (MMA_INT8, LowBitLinearWorkload(40, 302, 1, 64, True, 1.0)),
    (MMA_INT8, LowBitLinearWorkload(40, 300, 2, 32, False, scale_dtype="bfloat16")),
    (MMA_TABLE, table(66, 303, 4, 64, values="fp4", bias=True, activation="silu_mul", residual=True)),
    (MMA_INT8_TABLE, TableLinearWorkload(40, 300, 4, 32, scale_dtype="float16", values="nf4")),
    (
        MMA_INT8_TABLE,
        TableLinearWorkload(66, 300, 4, 64, values="fp4", bias=True, activation="silu_mul", residual=True),
    ),
]
SPLIT: list[tuple[Template, Workload]] = [
    (MMA_LOWBIT, half(66, 600, 4, 32, False, bias=True, activation="silu_mul", residual=True)),
    (MMA_INT8, LowBitLinearWorkload(40, 1100, 4, 128, False, scale_dtype="bfloat16", bias=True, activation="gelu")),
    (MMA_BF16, Bf16LinearWorkload(39, 600, bias=True, activation="gelu", residual=True, activations="bf16")),
    (MMA_OUTLIERS, outlying(66, 700, 4, 32, True, 8.0, outliers=20, bias=True, activation="silu_mul", residual=True)),
]
SHIPPED: list[tuple[Template, Workload]] = [
    (MMA_LOWBIT, half(1536, 576, 4, 32, True, 8.0, "float16")),
    (MMA_LOWBIT, half(4096, 4096, 4, 128, False, scale_dtype="float16")),
    (MMA_LOWBIT, half(4096, 4096, 8, 128, True, 128.0, "float16", activation="silu_mul")),
    (MMA_INT8, LowBitLinearWorkload(1536, 576, 4, 32, True, 8.0, "float16")),
    (MMA_INT8, LowBitLinearWorkload(4096, 4096, 8, 128, True, 128.0, "float16", activation="silu_mul")),
    (MMA_BF16, Bf16LinearWorkload(1536, 576, activations="bf16")),
    (MMA_LOWBIT, half(4096, 11008, 4, 128, True, 8.0, "float16")),
    (MMA_TABLE, table(4096, 4096, 4, 64, scale_dtype="float16", values="nf4")),
    (MMA_INT8_TABLE, TableLinearWorkload(4096, 4096, 4, 64, values="fp4")),
    (MMA_OUTLIERS, outlying(1536, 384, 8, 384, True, 128.0, outliers=8, bias=True, activation="gelu")),
]


def name(case: Any) -> str:
    return str(case[1].key()) if isinstance(case, tuple) else str(getattr(case, "name", case))


def untied(x: np.ndarray, group: int) -> np.ndarray:
    """x without values that are halfway between two codes of int8, but for rounding: multiplied and added at once, as
    GPUs do it, they may round the other way."""
    padded = np.pad(x, ((0, 0), (0, -x.shape[1] % group))).reshape(len(x), -1, group)
    scaled = padded * (127 / np.abs(padded).max(axis=-1, keepdims=True))
    halfway = np.abs(scaled % 1 - 0.5) < 1e-3
    return np.where(halfway, padded * np.float32(63 / 64), padded).reshape(len(x), -1)[:, : x.shape[1]]


def check(template: Template, workload: Any, rows: tuple[int, ...], **knobs: int) -> list[list[str]]:
    """Also gives, for each number of rows, what was launched: which of the kernels in the order of `MmaKernel`."""
    config = {**template.default(workload, SM80), **knobs}
    assert config in template.space(workload, SM80)
    kernel = EmulatedKernel(template, workload, SM80, config)
    rng = np.random.default_rng(2)
    weights = template.example_weights(workload, rng)
    packed = template.prepack(weights, workload, config, SM80)
    launched = []
    for M in rows:
        inputs = template.example_inputs(workload, {"M": M}, rng)
        if template in (MMA_INT8, MMA_INT8_TABLE):
            inputs["x"] = untied(inputs["x"], workload.group_size)
        want = template.reference(workload, inputs, weights)["y"]
        got = kernel.run(inputs, packed)["y"]
        again = kernel.run(inputs, packed)["y"]  # threads run in another order
        np.testing.assert_array_equal(got, again)
        launched.append([name.partition("kernel")[2] for name in kernel.launched])
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * max(1.0, float(np.abs(want).max())), err_msg=f"M={M}")
    return launched


@needs_emulator
@pytest.mark.parametrize("case", EMULATED, ids=name)
def test_emulated_kernels_compute_the_reference(case: tuple[Template, Workload]) -> None:
    assert check(*case, rows=(1, 8, 9, 17)) == [[""], [""], ["_1"], ["_2"]]


@pytest.mark.slow
@needs_emulator
@pytest.mark.parametrize("case", MORE, ids=name)
def test_more_emulated_kernels_compute_the_reference(case: tuple[Template, Workload]) -> None:
    check(*case, rows=(1, 2, 7, 8, 9, 15, 16, 17, 33, 63, 64, 65, 130))


@needs_emulator
@pytest.mark.parametrize("case", [SPLIT[0], *(pytest.param(c, marks=pytest.mark.slow) for c in SPLIT[1:])], ids=name)
def test_blocks_share_k(case: tuple[Template, Workload]) -> None:
    """In each kernel; a last one adds up what they made. The parts of K end inside of a step."""
    launched = check(*case, rows=(1, 8, 9, 17, 65), ahead=4, one_split=2, few_split=3, split=4, along=2)
    assert launched == [["", "_3"], ["", "_3"], ["_1", "_3"], ["_2", "_3"], ["_2", "_3"]]


KNOBS: list[dict[str, int]] = [
    {"warps": 2, "ahead": 2},
    {"warps": 16, "ahead": 1},
    {"warps": 4, "ahead": 8},
    {"one_split": 3},
]
# Of each workload those that its space has: shared memory and the length of K leave not all.
DECODING = [
    (case, knobs)
    for case in SPLIT
    for knobs in KNOBS
    if {**case[0].default(case[1], SM80), **knobs} in case[0].space(case[1], SM80)
]


def test_each_workload_decodes_with_other_knobs() -> None:
    assert all(any(case is other for other, _ in DECODING) for case in SPLIT)
    assert all(any(knobs is other for _, other in DECODING) for knobs in KNOBS)


@pytest.mark.slow
@needs_emulator
@pytest.mark.parametrize(
    ("case", "knobs"), DECODING, ids=lambda part: name(part) if isinstance(part, tuple) else str(part)
)
def test_decoding_with_other_knobs(case: tuple[Template, Workload], knobs: dict[str, int]) -> None:
    check(*case, rows=(1, 5, 8), **knobs)


def test_blocks_share_k_where_that_pays() -> None:
    """`llmc.gpu.predict` on an A100: 3 blocks for each place of 576 x 1536 take 4.3 us instead of 5.2, another launch
    included; with 4096 x 576 there is nothing to gain."""
    few = {(N, K): MMA_LOWBIT.default(half(N, K, 4, 32), SM80)["few_split"] for N, K in ((576, 1536), (4096, 576))}
    assert few[576, 1536] >= 3 and few[4096, 576] == 1


@pytest.mark.parametrize(("width", "pack"), [(2, 2), (4, 2), (8, 2), (16, 2), (2, 4), (4, 4), (8, 4)])
@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("in_rows", [False, True])
def test_words_hold_what_threads_multiply(width: int, pack: int, halves: int, in_rows: bool) -> None:
    """The PTX ISA's fragment of B for m16n8k16 (16-bit elements): groupID = lane >> 2 is the column; row of element i
    in 0 … 3 is 2 (lane % 4) + (i & 1), and 8 more for i >= 2. For m16n8k32 (8 bits), i in 0 … 7: 4 (lane % 4) +
    (i & 3), and 16 more for i >= 4."""
    N, K = 44, 104
    codes = np.random.default_rng(0).integers(0, 2**width, (N, K))
    layout = FragmentLayout(N, K, width, pack, halves, in_rows)
    words = layout.pack_codes(codes)
    padded = np.zeros((N, layout.units * layout.unit), int)
    padded[:, :K] = codes
    bits, k_of_product = 32 // pack, 8 * pack
    columns = 32 // halves
    for tile, lane, j in np.ndindex(layout.tiles, 32, 4):
        place = 8 * j + (lane >> 2)
        row = tile * columns + place % columns
        row = row + N // 2 * (place // columns) if row < N // halves else None
        for register in range(layout.units * layout.registers):
            product, part = divmod(register, 2)
            word = int(words[tile, register // layout.registers, lane * 4 + j])
            for e in range(pack):
                k = product * k_of_product + part * k_of_product // 2 + pack * (lane % 4) + e
                i = register % layout.registers
                code = word >> (width * (pack * i + e) if in_rows else bits * e + width * i) & (2**width - 1)
                assert code == (0 if row is None else padded[row, k])


def test_planes_hold_what_threads_scale() -> None:
    """The fragment of C: groupID is the row, 2 (lane % 4) + (i & 1) the column of element i."""
    N, halves = 44, 2
    values = np.random.default_rng(0).standard_normal((N, 3))
    plane = FragmentLayout(N, 64, 4, 2, halves).pack_plane(values)
    for tile, q, j, e in np.ndindex(len(plane), 4, 4, 2):
        column = tile * 16 + (8 * j + 2 * q + e) % 16
        want = values[column + N // 2 * (j // 2)] if column < N // 2 else 0
        np.testing.assert_array_equal(plane[tile, :, q * 8 + 2 * j + e], want)


def test_chunks_of_x_meet_all_banks() -> None:
    """Shared memory has 32 banks of 4 bytes; eight threads move 16 bytes each at once."""
    for others in range(CHUNKS):
        of_rows = {(r * CHUNKS + swizzled(others, r)) % 8 for r in range(8)}
        of_chunks = {(others * CHUNKS + swizzled(c, others)) % 8 for c in range(8)}
        assert len(of_rows) == len(of_chunks) == 8


@pytest.mark.parametrize("case", EMULATED + MORE + SHIPPED, ids=name)
@pytest.mark.parametrize("target", [SM80, SM90], ids=name)
def test_defaults_are_in_the_space(case: tuple[Template, Any], target: CudaTarget) -> None:
    template, workload = case
    assert template.accepts(workload, target) and not template.accepts(workload, AVX2)
    assert template.default(workload, target) in template.space(workload, target)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("target", [SM80, SM90], ids=name)
@pytest.mark.parametrize("case", SHIPPED, ids=name)
def test_shipped_kernels_pass_the_gates(case: tuple[Template, Any], target: CudaTarget) -> None:
    """No spills, room for a block, tensor cores at work, and every load from global memory 16 bytes wide."""
    template, workload = case
    function = template.build(workload, target, template.default(workload, target)).with_attr("global_symbol", "linear")
    made = template_sources(function, target)
    for kernel in made.values():
        found = resources(find_toolchain().compile(kernel.source, target.mcpu))
        assert found.spill_bytes == 0 and found.shared_bytes <= target.static_shared_bytes
        assert kernel.launch.threads and found.registers * kernel.launch.threads <= target.registers
        wide = {"LDG.16", "LDGSTS.16"} | ({"LDG.4"} if template is MMA_OUTLIERS else set())  # x of a few channels
        assert {access for access in found.accesses if access.startswith("LDG")} <= wide
        if kernel.launch.threads != 64:  # which adds parts up
            tensor, other = found.hmma, found.imma
            if isinstance(template, MmaInt8Linear):
                tensor, other = other, tensor
            assert tensor >= 4 and other == 0


def test_what_does_not_fit_is_left_to_others() -> None:
    refused: list[tuple[Template, Workload]] = [
        (MMA_LOWBIT, half(40, 300, 4, 48)),  # groups that end inside of a step
        (MMA_LOWBIT, half(40, 300, 4, 8)),  # groups that end inside of a product
        (MMA_LOWBIT, half(40, 300, 4, 32, True, 7.5)),  # no float16 is 1024 + 7.5
        (MMA_INT8, LowBitLinearWorkload(40, 300, 4, 300)),  # the largest value of a whole row comes too late
        (MMA_INT8, LowBitLinearWorkload(40, 300, 8, 32, True, 100.0)),  # 255 - 100 has no byte with sign
        (MMA_BF16, Bf16LinearWorkload(40, 300)),  # x stays float32
        (MMA_OUTLIERS, outlying(40, 300, 8, 300, False, outliers=8)),  # no code stands for zero in every group
    ]
    for template, workload in refused:
        assert not template.accepts(workload, SM80), workload
