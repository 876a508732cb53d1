"""Fused attention on GPUs: one PrimFunc of several launches, of which a call takes those for its number of queries."""

from __future__ import annotations

from typing import Any

from llmc.schedules.attention import cuda_prefill_fma, cuda_prefill_mma
from llmc.schedules.attention.attention import Attention
from llmc.schedules.attention.call import Operands
from llmc.schedules.attention.cuda_decode import MAX_QUERIES, decode
from llmc.schedules.attention.cuda_prefill import prefill
from llmc.schedules.attention.cuda_rows import rows
from llmc.schedules.attention.layout import parameters
from llmc.schedules.attention.workloads import AttentionWorkload
from llmc.schedules.base import Config, Space, Workload
from llmc.targets.base import Target
from llmc.tvm_shim import IRBuilder, T


class CudaAttention(Attention):
    """Template "attention_cuda".

    Knobs: in decode a block of threads takes `chunk` blocks of 64 keys with `warps` warps. Untuned, each of eight warps
    takes one, side by side: a warp's way through its keys is what decoding waits for, and a part of the sums, which the
    merging launch reads again, is then small beside its part of the cache.
    """

    name = "attention_cuda"
    version = 3

    def accepts(self, workload: Workload, target: Target) -> bool:
        return isinstance(workload, AttentionWorkload) and target.kind == "cuda"

    def space(self, workload: AttentionWorkload, target: Target) -> Space:
        knobs = {"chunk": (1, 2, 4, 8, 16), "warps": (1, 2, 4, 8)}
        return Space(knobs, lambda config: int(config["warps"]) <= int(config["chunk"]))

    def default(self, workload: AttentionWorkload, target: Target) -> dict[str, int | str]:
        return {"chunk": 8, "warps": 8}

    def build(self, workload: AttentionWorkload, target: Target, config: Config) -> Any:
        with IRBuilder() as ib, T.prim_func(s_tir=True):
            T.func_name("attention")
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            buffers, symbols = parameters(workload.inputs() + workload.outputs())
            call = Operands(workload, buffers, symbols)
            few = symbols["S"] <= MAX_QUERIES
            with T.attr(0, "sequence", 0):  # launches in a row need a frame around them
                decode(call, few, int(config["chunk"]), int(config["warps"]))
                many = T.Not(few)
                if cuda_prefill_mma.serves(workload, target):
                    prefill(call, many, cuda_prefill_mma.MmaPrefill)
                elif cuda_prefill_fma.serves(workload, target):
                    prefill(call, many, cuda_prefill_fma.FmaPrefill)
                else:
                    rows(call, many)
        return ib.get()


CUDA_ATTENTION = CudaAttention()
