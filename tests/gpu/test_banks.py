"""Bank conflicts: the address model against cases from the programming guide, and against every access that emulated
kernels make."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmc.emulator.emulator import available
from llmc.emulator.templates import EmulatedKernel
from llmc.emulator.trace import counted as conflicts
from llmc.gpu.banks import sectors, wavefronts
from llmc.schedules.attention.cuda import CUDA_ATTENTION
from llmc.schedules.attention.workloads import AttentionWorkload
from llmc.schedules.base import Template
from llmc.schedules.gemm.cuda import CUDA_LINEAR
from llmc.schedules.gemm.cuda_mma import MMA_INT8, MMA_LOWBIT, HalfLinearWorkload
from llmc.schedules.gemm.dense import DenseLinearWorkload
from llmc.schedules.gemm.lowbit import LowBitLinearWorkload
from llmc.targets.cuda import SM80
from tests.gpu.tools import arguments, counted

LANE = np.arange(32)


@pytest.mark.parametrize(
    ("addresses", "width", "taken", "ideal"),
    [
        (4 * LANE, 4, 1, 1),
        (8 * LANE, 4, 2, 1),  # a stride of two words
        (12 * LANE, 4, 1, 1),  # of three
        (128 * LANE, 4, 32, 1),  # one bank
        (0 * LANE, 4, 1, 1),  # one word for all
        (4 * (LANE // 2), 2, 1, 1),
        (8 * LANE, 8, 2, 2),
        (16 * LANE, 16, 4, 4),
        (32 * LANE, 16, 8, 4),
        (128 * (LANE % 8) + 16 * (LANE // 8), 16, 32, 4),  # rows of a matrix without a swizzle
        (128 * (LANE % 8) + 16 * (LANE % 8 ^ LANE // 8), 16, 4, 4),  # and with one
    ],
)
def test_wavefronts_are_those_of_the_programming_guide(
    addresses: np.ndarray, width: int, taken: int, ideal: int
) -> None:
    assert wavefronts(addresses, np.ones(32, bool), width) == (taken, ideal)


def test_lanes_that_take_no_part_conflict_with_nobody() -> None:
    assert wavefronts(128 * LANE, LANE < 2, 4) == (2, 1)
    assert wavefronts(16 * LANE, LANE < 8, 16) == (1, 1)
    assert wavefronts(4 * LANE, LANE < 0, 4) == (0, 0)


def test_sectors() -> None:
    everyone = np.ones(32, bool)
    assert sectors(4 * LANE, everyone, 4) == 4
    assert sectors(16 * LANE, everyone, 16) == 16
    assert sectors(64 * LANE, everyone, 4) == 32
    assert sectors(4 * LANE + 16, everyone, 4) == 5


# g++ takes a vector that is made of single numbers apart, so that the emulator sees four stores where there is one: the
# float32 kernel for prompts is not among these.
KERNELS: list[tuple[Template, Any, dict[str, int]]] = [
    (CUDA_LINEAR, DenseLinearWorkload(40, 36), {"M": 17}),
    (MMA_LOWBIT, HalfLinearWorkload(40, 300, 4, 32, True, 8.0, "float16", activations="a32"), {"M": 3}),
    (MMA_LOWBIT, HalfLinearWorkload(40, 300, 4, 32, True, 8.0, "float16", activations="a32"), {"M": 33}),
    (MMA_INT8, LowBitLinearWorkload(40, 320, 4, 32, True, 8.0, "float16"), {"M": 33}),
    (CUDA_ATTENTION, AttentionWorkload(4, 2, 64, 0.125), {"B": 1, "S": 1, "CB": 3, "C": 192}),
    (CUDA_ATTENTION, AttentionWorkload(4, 2, 32, 0.125, bf16=True), {"B": 1, "S": 70, "CB": 2, "C": 128}),
]


@pytest.mark.skipif(not available(), reason="no g++ 12 for x86-64")
@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow) for case in KERNELS[2:]] + KERNELS[:2])
def test_the_address_model_sees_what_emulated_kernels_do(case: tuple[Template, Any, dict[str, int]]) -> None:
    template, workload, dims = case
    kernel = EmulatedKernel(template, workload, SM80)
    rng = np.random.default_rng(0)
    packed = template.prepack(template.example_weights(workload, rng), workload, kernel.config, SM80)
    with conflicts() as seen:
        kernel.run(template.example_inputs(workload, dims, rng), packed)
    function = template.build(workload, SM80, kernel.config)
    asked = [each for _, each in counted(function, arguments(function, workload, dims), dims.get("C", 0))]
    taken, ideal = np.sum([sum_of(each.conflicts) for each in asked], axis=0)
    assert taken / ideal == pytest.approx(seen.ways[1], rel=0.02)
    assert max(each.ways[0] for each in asked) == pytest.approx(seen.ways[0], rel=0.02)


def sum_of(places: dict[str, tuple[float, float]]) -> tuple[float, float]:
    taken, ideal = zip(*places.values(), strict=True) if places else ((0.0,), (0.0,))
    return sum(taken), sum(ideal)
