"""Embedding lookup in float tables: rows, read where they lie, as float32.

The table is either [V, E] as the model stores it, or, when the output layer has the same weight ("tied"
embeddings), that layer's packed panels (`schedules.gemm.panels`, `schedules.gemm.f16`): one copy then serves both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.schedules.base import Arg, Arrays, Config, Space, Template, Work, Workload
from llmc.schedules.gemm.f16 import F16Layout, round_to_f16
from llmc.schedules.gemm.panels import pack_panels
from llmc.schedules.loops import rows, sweep
from llmc.targets.base import Target
from llmc.targets.intrinsics import Simd
from llmc.tvm_shim import IRBuilder, T


@dataclass(frozen=True)
class EmbeddingDenseWorkload(Workload):
    """ids [M] int64 in -V..V-1 (negative ones count from the end) pick rows of a table: y [M, E] float32.

    The table's `dtype` is float32 or float16.

    panel = 0: the table is [V, E]. panel = NR: it is panels of NR rows, as the linear layer packs it. Ids out of
    range read the nearest row: they never read outside the table.
    """

    V: int
    E: int
    panel: int = 0
    dtype: str = "float32"

    @property
    def table_shape(self) -> tuple[int, ...]:
        if not self.panel:
            return self.V, self.E
        if self.dtype == "float16":
            return F16Layout(self.V, self.E, self.panel).weight_shape
        return -(-self.V // self.panel), self.E, self.panel

    def inputs(self) -> tuple[Arg, ...]:
        return (Arg("ids", ("M",), "int64"),)

    def outputs(self) -> tuple[Arg, ...]:
        return (Arg("y", ("M", self.E), "float32"),)


class EmbeddingDense(Template):
    """Template "embedding_dense". Weight: table [V, E] float32 or float16, used as it is (panel = 0) or packed in
    panels.

    Knob: calls that copy fewer than `grain` elements run on the calling thread.
    """

    name = "embedding_dense"

    def accepts(self, workload: Workload, target: Target) -> bool:
        return isinstance(workload, EmbeddingDenseWorkload) and target.kind == "llvm"

    def space(self, workload: EmbeddingDenseWorkload, target: Target) -> Space:
        return Space({"grain": (4096, 16384, 65536)})

    def default(self, workload: EmbeddingDenseWorkload, target: Target) -> dict[str, int | str]:
        return {"grain": 4096 if workload.panel else 16384}

    def prepack(
        self, weights: Mapping[str, Any], workload: EmbeddingDenseWorkload, config: Config, target: Target
    ) -> Arrays:
        table = weights["weight"]
        if workload.dtype == "float16":
            w = workload
            return {"weight": F16Layout(w.V, w.E, w.panel).pack(table) if w.panel else round_to_f16(table)}
        return {"weight": pack_panels(table, workload.panel) if workload.panel else table}

    def layout(self, workload: EmbeddingDenseWorkload, config: Config, target: Target) -> str:
        if workload.dtype == "float16":
            return F16Layout(workload.V, workload.E, workload.panel).label if workload.panel else "rows.f16"
        return f"panels.{workload.panel}.1" if workload.panel else "rows"

    def build(self, workload: EmbeddingDenseWorkload, target: Target, config: Config) -> Any:
        span = Simd(target).span
        V, E, NR, lanes = workload.V, workload.E, workload.panel, target.lanes
        with IRBuilder() as ib:
            with T.prim_func(s_tir=True):
                T.func_name("embedding_dense")
                T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
                ids_handle = T.arg("ids", T.handle())
                table = T.arg("table", T.Buffer(workload.table_shape, workload.dtype))
                y_handle = T.arg("y", T.handle())
                M = T.int64()
                ids = T.match_buffer(ids_handle, (M,), "int64")
                y = T.match_buffer(y_handle, (M, E), "float32")

                def copy(m: Any) -> None:
                    row = T.bind(ids[m])
                    row = T.bind(T.Select(row < T.int64(0), row + T.int64(V), row))
                    row = T.bind(T.max(T.min(row, T.int64(V - 1)), T.int64(0)))
                    if NR:
                        panel, column = T.bind(T.floordiv(row, T.int64(NR))), T.bind(T.floormod(row, T.int64(NR)))
                        with T.serial(0, E) as e:
                            T.buffer_store(y, T.Cast("float32", table[panel, e, column]), [m, e])
                    else:

                        def some(i: Any, n: int, _: Any) -> None:
                            wide = f"float32x{n}" if n > 1 else "float32"
                            T.buffer_store(y, T.Cast(wide, table[row, span(i, n)]), [m, span(i, n)])

                        sweep(E, lanes, 1, some)

                rows(M, E, int(config["grain"]), copy)
        return ib.get()

    def reference(
        self, workload: EmbeddingDenseWorkload, inputs: Mapping[str, np.ndarray], weights: Mapping[str, Any]
    ) -> Arrays:
        return {"y": np.asarray(weights["weight"])[inputs["ids"]].astype(workload.dtype).astype(np.float32)}

    def work(self, workload: EmbeddingDenseWorkload, dims: Mapping[str, int]) -> Work:
        size = np.dtype(workload.dtype).itemsize
        line = 64 if workload.panel else size  # a panel holds one element of the row in each cache line
        return Work(ops=0, bytes=dims["M"] * (8 + workload.E * (4 + line)))

    def example_weights(self, workload: EmbeddingDenseWorkload, rng: np.random.Generator) -> dict[str, Any]:
        return {"weight": rng.standard_normal((workload.V, workload.E), np.float32)}

    def example_inputs(
        self, workload: EmbeddingDenseWorkload, dims: Mapping[str, int], rng: np.random.Generator
    ) -> Arrays:
        return {"ids": rng.integers(-workload.V, workload.V, dims["M"])}


EMBEDDING_DENSE = EmbeddingDense()
