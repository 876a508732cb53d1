"""Low-bit weights times int8 activations on AMX tiles: what `lowbit_a8` computes, bit for bit.

Few rows are multiplied as there. For many, a panel's codes become tile rows in scratch, once for all rows of x: a line
of the packed layout holds four neighbouring k for every row of its block, as a row of a tile does. The integer sums of
a group leave the tiles and are scaled there in the same order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmc.schedules.base import Config
from llmc.schedules.gemm.activations import Quantized
from llmc.schedules.gemm.lowbit_a8 import Int8Kernel
from llmc.schedules.gemm.packing import LowBitLayout
from llmc.schedules.gemm.tile_rows import TileRows
from llmc.targets import tiles
from llmc.targets.base import Target
from llmc.tvm_shim import T

if TYPE_CHECKING:
    from llmc.schedules.gemm.lowbit import LowBitLinearWorkload


def tile_depth(layout: LowBitLayout) -> int:
    """Quads of k in one tile: as many as divide a group. A single group is filled up with zeros instead."""
    quads = layout.group // 4
    if layout.groups == 1:
        return min(tiles.ROWS, quads)
    return max(depth for depth in range(1, tiles.ROWS + 1) if quads % depth == 0)


class Int8TileKernel(TileRows, Int8Kernel):
    """`Int8Kernel`, with tiles for many rows."""

    def __init__(self, workload: LowBitLinearWorkload, target: Target, config: Config) -> None:
        super().__init__(workload, target, config)
        self.depth = tile_depth(self.layout)
        self.steps = -(-self.layout.group // (4 * self.depth))  # tiles of one group

    def expand(self, blocks: list[Any]) -> Any:
        """Scratch [blocks, groups, steps * depth, 4R] uint8, a code a byte; None where they are stored like that."""
        layout, per, width = self.layout, self.layout.unit_quads, 4 * self.layout.lanes
        quads, padded = layout.group // 4, self.steps * self.depth
        if per == 1 and quads == padded:
            return None
        scratch = T.alloc_buffer((len(blocks), layout.groups, padded, width), "uint8")
        for v, block in enumerate(blocks):
            with T.serial(0, layout.groups) as g, T.serial(0, layout.units) as i:
                packed = self.unit(block, g, i)
                for p in range(per):
                    T.buffer_store(scratch, self.codes_of(packed, p), [v, g, i * per + p, self.simd.span(0, width)])
            for i in range(quads, padded):  # whatever x has there adds nothing
                T.buffer_store(scratch, T.broadcast(T.uint8(0), width), [v, 0, i, self.simd.span(0, width)])
        return scratch

    def span(self, x: Any, expanded: Any, M: Any, blocks: list[Any], low: Any, high: Any) -> None:
        self.sums = T.alloc_buffer((self.MR // tiles.ROWS, len(blocks), tiles.ROWS, self.layout.lanes), "int32")
        super().span(x, expanded, M, blocks, low, high)

    def sum_tiles(
        self, x: Quantized, expanded: Any, firsts: list[Any], rows: Any, blocks: list[Any], total: Any
    ) -> None:
        simd, group, width = self.simd, self.layout.group, 4 * self.layout.lanes
        pairs = [(t, v) for t in range(len(firsts)) for v in range(len(blocks))]
        with T.serial(0, rows) as m:
            for t, v in pairs:
                T.buffer_store(total, simd.f32(0), [t, v, m, simd.span(0)])
        with T.serial(0, self.layout.groups) as g:

            def rows_of_x(t: int, step: Any, g: Any = g) -> tuple[Any, int]:
                return x.q[firsts[t], g * group + step * (4 * self.depth)], int(x.q.shape[1])

            def codes(v: int, step: Any, g: Any = g) -> tuple[Any, int]:
                quad = step * self.depth
                return (self.q[blocks[v], g, quad, 0] if expanded is None else expanded[v, g, quad, 0]), width

            for v in range(0, len(blocks), self.NV):
                some = range(v, v + self.NV)
                self.multiply_tiles(self.steps, rows_of_x, codes, _dot_s8u8, self.sums, len(firsts), some)
            scales = [self.scales(block, g) for block in blocks]
            shifts = [None if self.zero is None else self.shifts(block, g) for block in blocks]
            with T.serial(0, rows) as m:
                for t, v in pairs:
                    row, at = firsts[t] + m, (t, v, m, simd.span(0))
                    register = simd.reg()
                    register.v = total[at]
                    start = simd.i32(0) if x.start is None else simd.splat(x.start[row, g])
                    self.add_group(register, self.sums[at] + start, scales[v], shifts[v], x, row, g)
                    T.buffer_store(total, register.v, list(at))


def _dot_s8u8(c: int, a: int, b: int) -> None:
    tiles.dot_bytes(c, a, b, "su")
