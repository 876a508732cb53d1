"""Embedding lookups on GPUs: a block a row, from a table in float32 or in codes as the linear layer packs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llmc.schedules.base import Arrays, Config, Space, Workload
from llmc.schedules.embedding.dense import EmbeddingDense, EmbeddingDenseWorkload
from llmc.schedules.embedding.lowbit import LowBitEmbedding, LowBitEmbeddingWorkload
from llmc.schedules.gemm.cuda_codes import Codes
from llmc.targets.base import Target
from llmc.targets.threads import launch, strided
from llmc.tvm_shim import IRBuilder, T

_THREADS = 128


class CudaEmbedding(EmbeddingDense):
    """Template "embedding_cuda": a table [V, E] float32 or float16, as it is. No knobs."""

    name = "embedding_cuda"

    def accepts(self, workload: Workload, target: Target) -> bool:
        return isinstance(workload, EmbeddingDenseWorkload) and not workload.panel and target.kind == "cuda"

    def space(self, workload: EmbeddingDenseWorkload, target: Target) -> Space:
        return Space({})

    def default(self, workload: EmbeddingDenseWorkload, target: Target) -> dict[str, int | str]:
        return {}

    def build(self, workload: EmbeddingDenseWorkload, target: Target, config: Config) -> Any:
        V, E = workload.V, workload.E

        def table() -> Callable[[Any, Any], Any]:
            values = T.arg("table", T.Buffer((V, E), workload.dtype))
            return lambda row, e: T.Cast("float32", values[row, e])

        return _lookup(V, E, table)


class CudaLowBitEmbedding(LowBitEmbedding):
    """Template "embedding_lowbit_cuda": a table as `schedules.gemm.cuda_codes` packs it. No knobs."""

    name = "embedding_lowbit_cuda"

    def accepts(self, workload: Workload, target: Target) -> bool:
        return isinstance(workload, LowBitEmbeddingWorkload) and target.kind == "cuda"

    def prepack(
        self, weights: Mapping[str, Any], workload: LowBitEmbeddingWorkload, config: Config, target: Target
    ) -> Arrays:
        return _codes(workload).pack(weights["weight"])

    def layout(self, workload: LowBitEmbeddingWorkload, config: Config, target: Target) -> str:
        return _codes(workload).label

    def build(self, workload: LowBitEmbeddingWorkload, target: Target, config: Config) -> Any:
        codes = _codes(workload)

        def table() -> Callable[[Any, Any], Any]:
            codes.declare()
            return codes.value

        return _lookup(workload.V, workload.E, table)


def _codes(w: LowBitEmbeddingWorkload) -> Codes:
    return Codes(w.V, w.E, w.bits, w.group_size, w.scale_dtype, w.symmetric, w.zero)


def _lookup(V: int, E: int, table: Callable[[], Callable[[Any, Any], Any]]) -> Any:
    """y[m] = row ids[m] of the table; ids out of range read the nearest row."""
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name("embedding")
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        ids_handle = T.arg("ids", T.handle())
        value = table()
        y_handle = T.arg("y", T.handle())
        M = T.int64()
        ids = T.match_buffer(ids_handle, (M,), "int64")
        y = T.match_buffer(y_handle, (M, E), "float32")
        with launch(_THREADS, M) as (thread, m):
            wrapped = T.bind(T.Select(ids[m] < T.int64(0), ids[m] + T.int64(V), ids[m]))
            row = T.bind(T.max(T.min(wrapped, T.int64(V - 1)), T.int64(0)))
            with strided(E, thread, _THREADS) as e:
                T.buffer_store(y, value(row, e), [m, e])
    return ib.get()


CUDA_EMBEDDING, CUDA_LOWBIT_EMBEDDING = CudaEmbedding(), CudaLowBitEmbedding()
