"""What tests of GPU code need: NVIDIA's compiler, and small functions to compile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from llmc.gpu import toolchain
from llmc.gpu.demand import Demand, demand
from llmc.gpu.function import DeviceFunction, arguments_of
from llmc.gpu.host import Launched, launched
from llmc.gpu.passes import lower
from llmc.schedules.base import Kernel, Workload
from llmc.targets.cuda import SM80
from llmc.targets.threads import barrier, launch, shared
from llmc.tir_pipeline import mark_kernel
from llmc.tvm_shim import IRBuilder, IRModule, PrimFunc, T, TvmTarget

needs_compiler = pytest.mark.skipif(not toolchain.available(), reason="NVIDIA's compiler is not installed: llmc[cuda]")

SOURCE = """extern "C" __global__ void __launch_bounds__(64) double_it(float* x, long n) {
  __shared__ float tile[64];
  long i = blockIdx.x * 64L + threadIdx.x;
  tile[threadIdx.x] = i < n ? x[i] : 0;
  __syncthreads();
  if (i < n) x[i] = tile[63 - threadIdx.x] + tile[threadIdx.x];
}
"""


def reversal(dynamic: bool = False) -> Any:
    """A PrimFunc: y [M, 64] = the rows of x, reversed by way of shared memory; a block takes four rows."""
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name("reversal")
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        handles = [T.arg(name, T.handle()) for name in "xy"]
        M = T.int64()
        x, y = (T.match_buffer(h, (M, 64), "float32") for h in handles)
        with launch(64, T.floordiv(M + 3, T.int64(4))) as (thread, block):
            row = T.alloc_buffer((64,), "float32", scope="shared.dyn") if dynamic else shared((64,))
            with T.serial(0, 4) as r:
                m = T.bind(T.min(block * 4 + r, M - 1))
                T.buffer_store(row, x[m, thread], [thread])
                barrier()
                T.buffer_store(y, row[63 - thread], [m, thread])
                barrier()
    return ib.get()


def points(kernel: Kernel) -> list[dict[str, int]]:
    """Sizes at which a kernel decodes, reads a prompt, and does something in between."""
    if any("S" in arg.shape for arg in kernel.workload.inputs()):
        return [_in_sequence(kernel, *sizes) for sizes in ((1, 511), (8, 504), (512, 0))]
    return [{"M": M} for M in (1, 8, 16, 512)]


def _in_sequence(kernel: Kernel, tokens: int, past: int) -> dict[str, int]:
    total = tokens + past
    blocks = -(-total // 64)
    sizes = {
        "B": 1,
        "S": tokens,
        "P": past,
        "total": total,
        "T": total,
        "blocks": blocks,
        "CB": blocks,
        "C": 64 * blocks,
    }
    symbols = {s for arg in (*kernel.workload.inputs(), *kernel.workload.outputs()) for s in arg.shape}
    return {name: size for name, size in sizes.items() if name in symbols}


def counted(function: PrimFunc, arguments: Sequence[Any], content: int = 0) -> list[tuple[Launched, Demand]]:
    """What a call launches, and what each launch asks for, by its TIR alone: nothing is compiled."""
    name = str(function.attrs["global_symbol"])
    hosts, kernels = lower(IRModule({name: mark_kernel(function)}), TvmTarget(SM80.tvm()))
    found = launched(hosts[name], arguments, {name: launch for name, (_, launch) in kernels.items()})
    return [(each, demand(kernels[each.kernel][0], each, content, SM80.pipes)) for each in found]


def arguments(function: PrimFunc, workload: Workload, dims: Mapping[str, int]) -> list[Any]:
    return arguments_of(DeviceFunction(function, function, {}, SM80), workload, dims)
