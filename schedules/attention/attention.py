"""Fused attention: one PrimFunc for every batch, number of queries, and length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llmc.schedules.attention import examples, reference
from llmc.schedules.attention.decode import MAX_QUERIES, decode
from llmc.schedules.attention.flash import Call
from llmc.schedules.attention.layout import BLOCK, parameters, size_in_bytes
from llmc.schedules.attention.prefill import prefill
from llmc.schedules.attention.workloads import AttentionWorkload
from llmc.schedules.base import Arrays, Config, Space, Template, Work, Workload
from llmc.targets.base import Target
from llmc.targets.intrinsics import Simd
from llmc.tvm_shim import IRBuilder, T


class Attention(Template):
    """Template "attention".

    Knobs: BQ stacked rows a prefill task; MR rows by NR registers the tile of both products; `chunk` blocks of 64
    keys a decode task; `serial_kib` the keys and values that one thread decodes alone.
    """

    name = "attention"

    def accepts(self, workload: Workload, target: Target) -> bool:
        return isinstance(workload, AttentionWorkload) and workload.head_dim >= 2 and target.kind == "llvm"

    def space(self, workload: AttentionWorkload, target: Target) -> Space:
        def valid(config: Config) -> bool:
            BQ, MR, NR = (int(config[k]) for k in ("BQ", "MR", "NR"))
            return BQ % MR == 0 and BLOCK % (NR * target.lanes) == 0 and target.vector_registers > MR * NR + NR

        knobs = {
            "BQ": (24, 32, 48, 64, 72, 96, 128),
            "MR": (2, 3, 4, 6, 8, 12),
            "NR": (1, 2, 4),
            "chunk": (1, 2, 4, 8, 16),
            "serial_kib": (64, 128, 256, 512),
        }
        return Space(knobs, valid)

    def default(self, workload: AttentionWorkload, target: Target) -> dict[str, int | str]:
        return {"BQ": 48, "MR": 6, "NR": 2, "chunk": 4, "serial_kib": 256}

    def build(self, workload: AttentionWorkload, target: Target, config: Config) -> Any:
        BQ, MR, NR, chunk, serial_kib = (int(config[k]) for k in ("BQ", "MR", "NR", "chunk", "serial_kib"))
        with IRBuilder() as ib:
            with T.prim_func(s_tir=True):
                T.func_name("attention")
                T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
                buffers, symbols = parameters(workload.inputs() + workload.outputs())
                call = Call(workload, Simd(target), buffers, symbols)
                with T.If(symbols["S"] <= MAX_QUERIES):
                    with T.Then():
                        decode(call, chunk, serial_kib, MR, NR)
                    with T.Else():
                        prefill(call, BQ, MR, NR)
        return ib.get()

    def reference(
        self, workload: AttentionWorkload, inputs: Mapping[str, np.ndarray], weights: Mapping[str, Any]
    ) -> Arrays:
        return reference.attention(workload, inputs)

    def work(self, workload: AttentionWorkload, dims: Mapping[str, int]) -> Work:
        """dims: B, S, CB, C, T (with biases); every sequence is taken to be C keys long, without C all blocks."""
        w, S, C = workload, dims["S"], dims.get("C", dims["CB"] * BLOCK)
        seen = [(C - S + i + 1 if w.causal else C) for i in range(S)]
        if w.window:
            seen = [min(n, w.window) for n in seen]
        ops = 4 * dims["B"] * w.n_heads * w.head_dim * sum(seen)
        return Work(ops=ops, bytes=size_in_bytes(w.inputs() + w.outputs(), dims))

    def example_inputs(self, workload: AttentionWorkload, dims: Mapping[str, int], rng: np.random.Generator) -> Arrays:
        return examples.attention_inputs(workload, dims, rng)

    def corners(self, workload: AttentionWorkload) -> Sequence[Mapping[str, int]]:
        return examples.attention_corners(workload)


ATTENTION = Attention()
