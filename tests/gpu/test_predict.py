"""Predicted times: what they are made of is counted right, and they move as they must. No test knows a real time."""

from __future__ import annotations

from typing import Any

import pytest

from llmc.gpu.function import DeviceFunction, compile_function, names_of
from llmc.gpu.predict import LAUNCH, predict
from llmc.gpu.typical import DECODE, PREFILL, Point
from llmc.schedules.attention.cuda import CUDA_ATTENTION
from llmc.schedules.attention.workloads import AttentionWorkload
from llmc.schedules.gemm.bf16 import Bf16LinearWorkload
from llmc.schedules.gemm.cuda import CUDA_LINEAR
from llmc.schedules.gemm.cuda_mma import MMA_BF16
from llmc.schedules.gemm.dense import DenseLinearWorkload
from llmc.targets.cuda import SM80, SM90, CudaTarget
from tests.gpu.tools import arguments, counted, needs_compiler, reversal


def compiled(template: Any, workload: Any, target: CudaTarget = SM80) -> DeviceFunction:
    return compile_function(template.build(workload, target, template.default(workload, target)), target)


@pytest.mark.parametrize("dynamic", [False, True])
def test_what_is_launched_is_read_from_the_host_function(dynamic: bool) -> None:
    ((found, _),) = counted(reversal(dynamic), [((9, 64), 4), ((9, 64), 4)])
    assert found.grid == (3, 1, 1) and found.block == (64, 1, 1) and found.shared == (256 if dynamic else 0)
    assert sorted(array.argument for array in found.arguments[:2]) == [0, 1]
    assert all(array.bytes == 9 * 64 * 4 for array in found.arguments[:2]) and found.arguments[2] == 9
    assert counted(reversal(dynamic), [((0, 64), 4), ((0, 64), 4)]) == []


def test_a_kernel_is_counted() -> None:
    """Each block of the reversal moves four rows of 64 floats through shared memory, with two barriers each."""
    ((_, found),) = counted(reversal(), [((12, 64), 4), ((12, 64), 4)])
    assert sum(found.reads.values()) == sum(found.writes.values()) == 12 * 64 * 4
    assert found.shared == 2 * 2 * 12  # wavefronts: a store and a load of two warps in each row
    assert found.ways == (1.0, 1.0) and not found.tensor
    pipes = SM80.pipes
    least = 4 * (pipes.global_latency + pipes.shared_latency + 2 * pipes.barrier_latency)
    assert least < found.path < 2 * least


def test_products_of_tensor_cores_are_those_of_the_layer() -> None:
    N, K, M = 128, 256, 64
    workload = Bf16LinearWorkload(N, K, activations="bf16")
    function = MMA_BF16.build(workload, SM80, MMA_BF16.default(workload, SM80))
    ((_, found),) = counted(function, arguments(function, workload, {"M": M}))
    assert found.tensor == {"bf16": 2.0 * M * N * K}


def test_additions_of_products_are_one_instruction() -> None:
    workload = DenseLinearWorkload(64, 256)
    function = CUDA_LINEAR.build(workload, SM80, CUDA_LINEAR.default(workload, SM80))
    ((_, found),) = counted(function, arguments(function, workload, {"M": 64}))
    assert found.floats == pytest.approx(64 * 64 * 256 / 32, rel=0.02)


def test_lengths_in_memory_are_those_of_the_call() -> None:
    """How many keys a query sees stands in memory."""
    workload = AttentionWorkload(8, 2, 64, 0.125)
    function = CUDA_ATTENTION.build(workload, SM80, CUDA_ATTENTION.default(workload, SM80))
    few, many = (
        counted(function, arguments(function, workload, {"B": 1, "S": 1, "CB": n, "C": 64 * n}), 64 * n)
        for n in (2, 64)
    )
    assert [launch.kernel for launch, _ in few] == ["attention_kernel", "attention_kernel_1"]
    bytes_ = [sum(call[0][1].reads.values()) for call in (few, many)]
    assert bytes_[1] == pytest.approx(32 * bytes_[0], rel=0.1)


def test_arguments_have_names() -> None:
    workload = DenseLinearWorkload(64, 32, bias=True, residual=True)
    function = CUDA_LINEAR.build(workload, SM80, CUDA_LINEAR.default(workload, SM80))
    assert names_of(DeviceFunction(function, function, {}, SM80), workload) == ["x", "residual", "weight", "bias", "y"]
    assert arguments(function, workload, {"M": 3})[2:] == [((64, 32), 4), ((64,), 4), ((3, 64), 4)]


@needs_compiler
def test_predictions_move_with_sizes_and_machines() -> None:
    workload = DenseLinearWorkload(512, 512)
    old, new = compiled(CUDA_LINEAR, workload), compiled(CUDA_LINEAR, workload, SM90)
    times = [predict(old, workload, {"M": M}).seconds for M in (1, 512, 4096, 16384)]
    assert times == sorted(times) and times[0] > LAUNCH
    assert predict(new, workload, {"M": 16384}).seconds < times[-1]
    # No prediction beats the machine: its operations, and its memory.
    work = CUDA_LINEAR.work(workload, {"M": 16384})
    assert times[-1] > work.ops / SM80.fma and times[-1] > work.bytes / SM80.bandwidth


@pytest.mark.parametrize(
    ("point", "symbol", "size"),
    [
        (DECODE, "batch_size", 1),
        (DECODE, "sequence_length", 1),
        (DECODE, "past_sequence_length", 511),
        (DECODE, "past_sequence_length + 1", 512),
        (DECODE, "blocks", 8),
        (PREFILL, "seq", 512),
        (PREFILL, "past", 0),
        (PREFILL, "total_sequence_length", 512),
    ],
)
def test_sizes_by_their_names(point: Point, symbol: str, size: int) -> None:
    assert point.size(symbol) == size
