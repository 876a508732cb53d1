"""Embedding lookup in a low-bit table that is packed as a linear's weight: tied embeddings share one stored array."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.errors import KernelError
from llmc.schedules.base import Arg, Arrays, Config, Space, Template, Work, Workload
from llmc.schedules.formats import QuantizedWeight, random_weight
from llmc.schedules.gemm.lowbit_kernel import widened
from llmc.schedules.gemm.packing import (
    LowBitLayout,
    Piece,
    common_zero,
    pack_weight,
    smallest_scale_dtype,
    smallest_zero_dtype,
    stored_dtype,
)
from llmc.targets.base import Target
from llmc.targets.intrinsics import Simd
from llmc.tvm_shim import IRBuilder, T


@dataclass(frozen=True)
class LowBitEmbeddingWorkload(Workload):
    """Rows of a `QuantizedWeight` table [V, E] chosen by ids [M] int64; negative ids count from the end.

    The format's fields are those of `LowBitLinearWorkload`, and so are the packed planes.
    """

    V: int
    E: int
    bits: int
    group_size: int
    symmetric: bool = True
    zero: float = 0.0
    scale_dtype: str = "float32"
    zero_dtype: str = "float32"

    @classmethod
    def of(cls, table: QuantizedWeight) -> LowBitEmbeddingWorkload:
        """The workload whose planes are those of a linear that multiplies with `table`."""
        zero = common_zero(table)
        dtypes = smallest_scale_dtype(table.scale), "float32" if zero is not None else smallest_zero_dtype(table)
        return cls(table.N, table.K, table.bits, table.group_size, zero is not None, zero or 0.0, *dtypes)

    def layout(self, lanes: int) -> LowBitLayout:
        return LowBitLayout(self.V, self.E, self.bits, self.group_size, lanes)

    def inputs(self) -> tuple[Arg, ...]:
        return (Arg("ids", ("M",), "int64"),)

    def outputs(self) -> tuple[Arg, ...]:
        return (Arg("y", ("M", self.E), "float32"),)


class LowBitEmbedding(Template):
    """Template "embedding_lowbit". Weights in: weight, a `QuantizedWeight`. Packed: q, scale, (zero). No knobs.

    An id outside [-V, V) reads the row that is nearest to it: the table's ends, never memory outside it.
    """

    name = "embedding_lowbit"

    def accepts(self, workload: Workload, target: Target) -> bool:
        return (
            isinstance(workload, LowBitEmbeddingWorkload)
            and target.kind == "llvm"
            and workload.layout(target.lanes).representable()
        )

    def space(self, workload: LowBitEmbeddingWorkload, target: Target) -> Space:
        return Space({})

    def default(self, workload: LowBitEmbeddingWorkload, target: Target) -> dict[str, int | str]:
        return {}

    def prepack(
        self, weights: Mapping[str, Any], workload: LowBitEmbeddingWorkload, config: Config, target: Target
    ) -> Arrays:
        w = workload
        return pack_weight(w.layout(target.lanes), weights["weight"], w.scale_dtype, w.symmetric, w.zero_dtype)

    def layout(self, workload: LowBitEmbeddingWorkload, config: Config, target: Target) -> str:
        return (
            f"{workload.layout(target.lanes).label}.{workload.scale_dtype}.{workload.symmetric}.{workload.zero_dtype}"
        )

    def build(self, workload: LowBitEmbeddingWorkload, target: Target, config: Config) -> Any:
        if not self.accepts(workload, target):
            raise KernelError(f"{workload.key()} is outside what the low-bit embedding reads", where=target.name)
        w, layout, R = workload, workload.layout(target.lanes), Simd(target).lanes
        with IRBuilder() as ib, T.prim_func(s_tir=True):
            T.func_name(f"embedding_w{w.bits}")
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            ids_handle = T.arg("ids", T.handle())
            q = T.arg("q", T.Buffer(layout.q_shape, "uint8"))
            scale_plane = T.arg("scale", T.Buffer(layout.plane_shape, stored_dtype(w.scale_dtype)))
            zero_plane = None if w.symmetric else T.arg("zero", T.Buffer(layout.plane_shape, w.zero_dtype))
            y_handle = T.arg("y", T.handle())
            M = T.int64()
            ids = T.match_buffer(ids_handle, (M,), "int64")
            y = T.match_buffer(y_handle, (M, w.E), "float32")
            with T.parallel(0, M) as m:
                wrapped = T.bind(T.if_then_else(ids[m] < T.int64(0), ids[m] + T.int64(w.V), ids[m]))
                row = T.bind(T.max(T.min(wrapped, T.int64(w.V - 1)), T.int64(0)))
                block, lane = T.bind(T.floordiv(row, R)), T.bind(T.floormod(row, R))
                at = T.ramp(lane * 4, 1, 4)
                with T.serial(0, layout.groups) as g:
                    scale = T.bind(widened(scale_plane[block, g, lane], w.scale_dtype, 1))
                    zero = scale * T.float32(-w.zero) if zero_plane is None else zero_plane[block, g, lane]
                    shift = T.bind(T.Cast("float32", zero))
                    with T.serial(0, layout.units) as i:
                        first_line = i * layout.unit_lines
                        lines = [T.bind(q[block, g, first_line + n, at]) for n in range(layout.unit_lines)]
                        for p in range(layout.unit_quads):
                            codes = _codes([(lines[piece.line], piece) for piece in layout.pieces(p)])
                            values = T.Cast("float32x4", codes) * T.broadcast(scale, 4) + T.broadcast(shift, 4)
                            first = T.bind(g * layout.group + (i * layout.unit_quads + p) * 4)
                            _store(y, m, first, T.bind(values))
        return ib.get()

    def reference(
        self, workload: LowBitEmbeddingWorkload, inputs: Mapping[str, np.ndarray], weights: Mapping[str, Any]
    ) -> Arrays:
        return {"y": weights["weight"].dequantize()[inputs["ids"]]}

    def work(self, workload: LowBitEmbeddingWorkload, dims: Mapping[str, int]) -> Work:
        values = dims["M"] * workload.E
        return Work(ops=2 * values, bytes=values * (workload.bits / 8 + 4))

    def example_weights(self, workload: LowBitEmbeddingWorkload, rng: np.random.Generator) -> dict[str, Any]:
        w = workload
        zero = w.zero if w.symmetric else None
        return {"weight": random_weight(rng, (w.V, w.E), w.bits, w.group_size, zero, w.scale_dtype, w.zero_dtype)}

    def example_inputs(
        self, workload: LowBitEmbeddingWorkload, dims: Mapping[str, int], rng: np.random.Generator
    ) -> Arrays:
        return {"ids": rng.integers(-workload.V, workload.V, dims["M"])}


def _codes(pieces: list[tuple[Any, Piece]]) -> Any:
    """Four codes, uint8, from the bytes that hold their pieces."""

    def in_place(line: Any, piece: Piece) -> Any:
        shifted = T.shift_right(line, T.broadcast(T.uint8(piece.start - piece.at), 4))
        return T.bitwise_and(shifted, T.broadcast(T.uint8((2**piece.width - 1) << piece.at), 4))

    return functools.reduce(T.bitwise_or, (in_place(*each) for each in pieces))


def _store(y: Any, m: Any, first: Any, values: Any) -> None:
    """y[m, first : first + 4] = values, as far as the row goes."""
    E = int(y.shape[1])
    with T.If(first + 4 <= E), T.Then():
        T.buffer_store(y, values, [m, T.ramp(first, 1, 4)])
    if E % 4:
        with T.If(first == E // 4 * 4), T.Then():
            part = T.alloc_buffer((4,), "float32")
            T.buffer_store(part, values, [T.ramp(0, 1, 4)])
            for j in range(E % 4):
                T.buffer_store(y, part[j], [m, first + j])


LOWBIT_EMBEDDING = LowBitEmbedding()
