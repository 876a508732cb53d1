"""Fused attention: one PrimFunc for every batch, number of queries, and length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llmc.schedules.attention import examples, reference
from llmc.schedules.attention.call import Call
from llmc.schedules.attention.decode import MAX_QUERIES, decode
from llmc.schedules.attention.layout import BLOCK, parameters, size_in_bytes
from llmc.schedules.attention.prefill import prefill
from llmc.schedules.attention.tile_flash import KEYS, TileFlash, has_tiles
from llmc.schedules.attention.workloads import AttentionWorkload
from llmc.schedules.base import Arrays, Config, Space, Template, Work, Workload
from llmc.targets import tiles
from llmc.targets.base import Target
from llmc.targets.intrinsics import Simd
from llmc.tvm_shim import IRBuilder, T


class Attention(Template):
    """Template "attention".

    Knobs: BQ stacked rows a prefill task; MR rows by NR registers the tile of both products; `chunk` blocks of 64
    keys a decode task; `serial_kib` the keys and values that one thread decodes alone. Where a workload in bfloat16
    meets a target with tiles, `body` says which of tiles and vectors multiply in prefill; on tiles MR and NR are those
    of decode alone.
    """

    name = "attention"

    def accepts(self, workload: Workload, target: Target) -> bool:
        return isinstance(workload, AttentionWorkload) and workload.head_dim >= 2 and target.kind == "llvm"

    def space(self, workload: AttentionWorkload, target: Target) -> Space:
        def valid(config: Config) -> bool:
            BQ, MR, NR = (int(config[k]) for k in ("BQ", "MR", "NR"))
            rows = tiles.ROWS if config.get("body") == "tiles" else MR
            return BQ % rows == 0 and BLOCK % (NR * target.lanes) == 0 and target.vector_registers > MR * NR + NR

        knobs: dict[str, tuple[int | str, ...]] = {
            "BQ": (24, 32, 48, 64, 72, 96, 128),
            "MR": (2, 3, 4, 6, 8, 12),
            "NR": (1, 2, 4),
            "chunk": (1, 2, 4, 8, 16),
            "serial_kib": (64, 128, 256, 512),
        }
        if has_tiles(workload, target):
            knobs |= {"BQ": (*knobs["BQ"], 192, 256), "body": ("tiles", "vectors")}
        return Space(knobs, valid)

    def default(self, workload: AttentionWorkload, target: Target) -> dict[str, int | str]:
        default: dict[str, int | str] = {"BQ": 48, "MR": 6, "NR": 2, "chunk": 4, "serial_kib": 256}
        return default | {"BQ": 128, "body": "tiles"} if has_tiles(workload, target) else default

    def build(self, workload: AttentionWorkload, target: Target, config: Config) -> Any:
        BQ, MR, NR, chunk, serial_kib = (int(config[k]) for k in ("BQ", "MR", "NR", "chunk", "serial_kib"))
        with IRBuilder() as ib:
            with T.prim_func(s_tir=True):
                T.func_name("attention")
                T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
                buffers, symbols = parameters(workload.inputs() + workload.outputs())
                call = Call(workload, buffers, symbols, Simd(target))
                with T.If(symbols["S"] <= MAX_QUERIES):
                    with T.Then():
                        decode(call, chunk, serial_kib, MR, NR)
                    with T.Else():
                        if config.get("body") == "tiles":
                            prefill(call, BQ, tiles.ROWS, KEYS, TileFlash)
                        else:
                            prefill(call, BQ, MR, NR)
        return ib.get()

    def reference(
        self, workload: AttentionWorkload, inputs: Mapping[str, np.ndarray], weights: Mapping[str, Any]
    ) -> Arrays:
        return reference.attention(workload, inputs)

    def tolerance(self, workload: AttentionWorkload) -> float:
        """Four roundings, of query, key, weight and value: of 2**-8 in bfloat16, of 2**-11 in float16."""
        return 2.0**-6 if workload.bf16 else 2.0**-9 if workload.f16 else super().tolerance(workload)

    def work(self, workload: AttentionWorkload, dims: Mapping[str, int]) -> Work:
        """dims: B, S, CB, C, T (with biases); every sequence is taken to be C keys long, without C all blocks.

        Of masks that inputs decide those of `example_inputs` count.
        """
        w, S, C = workload, dims["S"], dims.get("C", dims["CB"] * BLOCK)
        ops = 4 * dims["B"] * w.n_heads * w.head_dim * sum(examples.keys_seen(w, S, C))
        sizes = {**dims, "pages": dims["B"] * dims["CB"]}  # those of a pool that others do not use
        return Work(ops=ops, bytes=size_in_bytes(w.inputs() + w.outputs(), sizes))

    def example_inputs(self, workload: AttentionWorkload, dims: Mapping[str, int], rng: np.random.Generator) -> Arrays:
        return examples.attention_inputs(workload, dims, rng)

    def corners(self, workload: AttentionWorkload) -> Sequence[Mapping[str, int]]:
        return examples.attention_corners(workload)


ATTENTION = Attention()
