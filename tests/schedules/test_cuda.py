"""Templates for GPUs: their kernels are machine code without spills, and what no block could hold is refused.

That they compute the right thing needs a GPU, or an emulator of one: it is not tested here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmc.errors import KernelError
from llmc.gpu import toolchain
from llmc.gpu.binary import resources
from llmc.gpu.sources import template_sources
from llmc.schedules.attention.cuda import CUDA_ATTENTION
from llmc.schedules.attention.cuda_append import CUDA_KV_APPEND
from llmc.schedules.attention.workloads import AttentionWorkload, KVAppendWorkload
from llmc.schedules.base import Kernel
from llmc.schedules.cuda import on
from llmc.schedules.embedding.cuda import CUDA_EMBEDDING, CUDA_LOWBIT_EMBEDDING
from llmc.schedules.embedding.dense import EmbeddingDenseWorkload
from llmc.schedules.embedding.lowbit import LowBitEmbeddingWorkload
from llmc.schedules.formats import random_weight
from llmc.schedules.gemm.cuda import CUDA_LINEAR, CUDA_LOWBIT, CUDA_TABLE
from llmc.schedules.gemm.cuda_codes import Codes
from llmc.schedules.gemm.dense import DENSE, DenseLinearWorkload
from llmc.schedules.gemm.lowbit import LowBitLinearWorkload, TableLinearWorkload
from llmc.schedules.norm.cuda import CUDA_NORM
from llmc.schedules.norm.norm import NormWorkload
from llmc.targets.cuda import SM80, SM90, CudaTarget
from llmc.targets.threads import launch
from llmc.targets.x86 import AVX2
from tests.gpu.tools import needs_compiler

MASKS: dict[str, Any] = {"window": 64, "sinks": 4, "softcap": 20.0, "alibi": True, "documents": True, "key_bias": True}
KERNELS = [
    Kernel(CUDA_NORM, NormWorkload(576, "layer", bias=True, residual=True, sum_output=True)),
    Kernel(CUDA_EMBEDDING, EmbeddingDenseWorkload(1000, 576)),
    Kernel(CUDA_LOWBIT_EMBEDDING, LowBitEmbeddingWorkload(1000, 576, 4, 32, False)),
    Kernel(CUDA_LINEAR, DenseLinearWorkload(1536, 576, bias=True, activation="gelu", residual=True)),
    Kernel(CUDA_LOWBIT, LowBitLinearWorkload(3072, 576, 4, 32, scale_dtype="float16", activations="a32")),
    Kernel(CUDA_LOWBIT, LowBitLinearWorkload(96, 70, 3, 70, False, activations="a32", activation="silu_mul")),
    Kernel(CUDA_TABLE, TableLinearWorkload(96, 64, 4, 32, activations="a32", values="nf4")),
    Kernel(CUDA_KV_APPEND, KVAppendWorkload(9, 3, 64, past=True, present=True)),
    Kernel(CUDA_KV_APPEND, KVAppendWorkload(9, 3, 64, in_place=True, interleaved=True, rotary_dim=32)),
    Kernel(CUDA_ATTENTION, AttentionWorkload(9, 3, 64, 0.125)),
    Kernel(CUDA_ATTENTION, AttentionWorkload(4, 2, 80, 0.1, bias=True, bias_rows=True, **MASKS)),
    Kernel(CUDA_ATTENTION, AttentionWorkload(4, 2, 80, 0.1, tree=True)),
]


def build(kernel: Kernel, target: CudaTarget) -> Any:
    return kernel.template.build(kernel.workload, target, kernel.template.default(kernel.workload, target))


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_a_template_takes_what_it_builds(kernel: Kernel) -> None:
    template, workload = kernel.template, kernel.workload
    assert template.accepts(workload, SM80) and not template.accepts(workload, AVX2)
    assert template.default(workload, SM80) in template.space(workload, SM80)
    weights = template.example_weights(workload, np.random.default_rng(0))
    packed = template.prepack(weights, workload, template.default(workload, SM80), SM80)
    buffers = list(build(kernel, SM80).params)
    first, count = len(workload.inputs()), len(workload.outputs())
    declared = [(tuple(map(int, b.shape)), str(b.dtype)) for b in buffers[first : len(buffers) - count]]
    assert [(a.shape, a.dtype.name) for a in packed.values()] == declared


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("target", [SM80, SM90], ids=lambda t: t.name)
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_kernels_are_machine_code_without_spills(kernel: Kernel, target: CudaTarget) -> None:
    tools = toolchain.find_toolchain()
    for made in template_sources(build(kernel, target), target).values():
        found = resources(tools.compile(made.source, target.mcpu))
        assert found.spill_bytes == 0 and made.launch.threads
        assert found.registers * made.launch.threads <= target.registers


@pytest.mark.parametrize(("bits", "symmetric"), [(1, True), (2, False), (3, False), (4, True), (8, False)])
@pytest.mark.parametrize("scale_dtype", ["float32", "float16", "bfloat16"])
def test_packed_codes_hold_the_weight(bits: int, symmetric: bool, scale_dtype: str) -> None:
    """Read back as the kernels read them: from the lowest bits of a byte, the group's scale and zero."""
    rng, N, K, group = np.random.default_rng(bits), 5, 21, 8
    zero = 2.0 ** (bits - 1) if symmetric else None
    weight = random_weight(rng, (N, K), bits, group, zero, scale_dtype)
    codes = Codes(N, K, bits, group, scale_dtype, symmetric, zero or 0.0)
    planes = codes.pack(weight)
    n, width = codes.per_byte, 8 // codes.per_byte
    scale = planes["scale"]
    if scale_dtype == "bfloat16":
        scale = (scale.astype(np.uint32) << np.uint32(16)).view(np.float32)
    for row in range(N):
        for k in range(K):
            code = planes["q"][row, k // n] >> (k % n * width) & (2**width - 1)
            assert code == np.asarray(weight.q)[row, k]
            z = zero if symmetric else planes["zero"][row, k // group]
            value = (np.float32(code) - np.float32(z)) * np.float32(scale[row, k // group])
            assert value == weight.dequantize()[row, k]


def test_a_template_takes_the_place_of_the_cpus() -> None:
    dense = Kernel(DENSE, DenseLinearWorkload(8, 16, bias=True))
    assert on(AVX2, dense) is dense
    assert on(SM80, dense) == Kernel(CUDA_LINEAR, dense.workload)


def test_a_block_is_made_of_whole_warps() -> None:
    with pytest.raises(KernelError, match="a block of 48 threads"), launch(48, 1):
        pass
