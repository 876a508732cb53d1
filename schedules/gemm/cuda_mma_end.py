"""The end of linear layers on tensor cores: bias, activation, residual, store; and where blocks of threads shared k
(split-K), their parts of each sum, which a second kernel adds up in the order of k: the same bits in every run.

Parts are [parts, M, tiles * 32] float32, columns as tiles have their rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmc.schedules import epilogue
from llmc.schedules.gemm.cuda_mma_packing import TILE
from llmc.targets.threads import Cell, launch
from llmc.tvm_shim import T

_QUAD = 4  # columns of a thread that merges
_MERGING = 64  # threads of its block: as many blocks as there may be, where there are few rows


class Ending:
    """Of one kernel (`MmaKernel`); `parts` of each sum, a number that the host knows, None where there is always one.

    `sums` are of one row, [4 matrices][2 neighbouring columns] of a tile, as `mma` lays C down.
    """

    def __init__(self, kernel: Any, parts: Any) -> None:
        self.k, self.w, self.parts = kernel, kernel.w, parts
        self.width = kernel.layout.tiles * TILE
        if parts is not None:
            rows = T.Select(parts > 1, parts * kernel.M, T.int64(1))
            self.sums = T.alloc_buffer((rows, self.width), "float32")

    def store_row(self, row: Any, tile: Any, q: Any, sums: Sequence[Sequence[Cell]]) -> None:
        """y of a tile's columns 8 j + 2 q and the next."""
        made = 4 // self.w.halves
        first = T.bind(tile * (TILE // self.w.halves) + q * 2)
        for j in range(made):
            pairs = [sums[j + half * made] for half in range(self.w.halves)]
            self._store_neighbours(row, first + 8 * j, [[pair[e] for pair in pairs] for e in range(2)])

    def store_part(self, part: Any, row: Any, tile: Any, q: Any, sums: Sequence[Sequence[Cell]]) -> None:
        """The same columns of one part."""
        pair = T.alloc_buffer((2,), "float32", scope="local")
        with T.If(tile < self.k.layout.tiles), T.Then():
            for j, cells in enumerate(sums):
                for e, cell in enumerate(cells):
                    T.buffer_store(pair, cell.v, [e])
                place = tile * TILE + 8 * j + q * 2
                T.buffer_store(self.sums, pair[T.ramp(0, 1, 2)], [part * self.k.M + row, T.ramp(place, 1, 2)])

    def merge(self) -> None:
        """The second kernel: a thread makes four columns of a row."""
        if self.parts is None:
            return
        w, of_tile = self.w, TILE // self.w.halves
        quads = -(-w.columns // _QUAD)
        blocks = T.Select(self.parts > 1, T.int64(-(-quads // _MERGING)), T.int64(0))
        with launch(_MERGING, blocks, self.k.M) as (thread, block, row):
            column = T.bind((block * _MERGING + thread) * _QUAD)
            with T.If(column < w.columns), T.Then():
                tile, place = T.floordiv(column, T.int64(of_tile)), T.floormod(column, T.int64(of_tile))
                sums = [[Cell(T.float32(0)) for _ in range(_QUAD)] for _ in range(w.halves)]
                loaded = T.alloc_buffer((_QUAD,), "float32", scope="local")
                with T.serial(0, self.parts) as part:
                    for half, cells in enumerate(sums):
                        at = T.ramp(tile * TILE + half * of_tile + place, 1, _QUAD)
                        T.buffer_store(loaded, self.sums[part * self.k.M + row, at], [T.ramp(0, 1, _QUAD)])
                        for i, cell in enumerate(cells):
                            cell.v = cell.v + loaded[i]
                self._store_neighbours(row, column, [[cells[i] for cells in sums] for i in range(_QUAD)])

    def store(self, row: Any, column: Any, sums: Sequence[Cell]) -> None:
        """y of one column, which there is: of one sum, or gate and up."""
        T.buffer_store(self.k.y, self._value(row, column, sums), [row, column])

    def _store_neighbours(self, row: Any, column: Any, sums: Sequence[Sequence[Cell]]) -> None:
        """Of some columns: at once where rows begin at multiples of their number."""
        columns, count = self.w.columns, len(sums)
        if columns % count:
            for e in range(count):
                with T.If(column + e < columns), T.Then():
                    self.store(row, column + e, sums[e])
            return
        with T.If(column < columns), T.Then():
            values = T.alloc_buffer((count,), "float32", scope="local")
            for e in range(count):
                T.buffer_store(values, self._value(row, column + e, sums[e]), [e])
            T.buffer_store(self.k.y, values[T.ramp(0, 1, count)], [row, T.ramp(column, 1, count)])

    def _value(self, row: Any, column: Any, sums: Sequence[Cell]) -> Any:
        w, bias = self.w, self.k.bias
        values = [Cell(s.v if bias is None else s.v + bias[column + i * w.columns]).v for i, s in enumerate(sums)]
        if w.activation == "silu_mul":
            value = epilogue.silu_mul(self.k.scalar, *values)
        else:
            value = epilogue.apply(self.k.scalar, w.activation, values[0])
        return value if self.k.residual is None else value + self.k.residual[row, column]
