"""Many rows on AMX tiles: what the tile kernels for low-bit and bfloat16 weights share.

Blocks of MR rows, one or two tiles of 16, pass over a panel of NV row blocks, a tile each. What tiles have summed goes
through a scratch buffer to the epilogue, a row at a time.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from llmc.schedules.gemm.lowbit_kernel import LowBitKernel
from llmc.targets import tiles
from llmc.tvm_shim import T

_SUMS, _X, _WEIGHT = 0, 4, 6  # the first tile of sums (up to 2 x 2 of them), of rows of x, and of row blocks


class TileRows(LowBitKernel):
    """A kernel with tiles for more rows than `skinny`: MR is 16 or 32, NV 1 or 2. Rows that are left at the end are
    computed with the tile before, as far as there are 16; fewer rows than that make smaller tiles."""

    depth: int  # rows of a tile of weights, each with 32 bits of k for every row of its block

    @abstractmethod
    def sum_tiles(self, x: Any, expanded: Any, firsts: list[Any], rows: Any, blocks: list[Any], total: Any) -> None:
        """total[t, v, m] = row firsts[t] + m of x times row block v, for m < rows."""

    def span(self, x: Any, expanded: Any, M: Any, blocks: list[Any], low: Any, high: Any) -> None:
        row_tiles, lanes = self.MR // tiles.ROWS, self.layout.lanes
        rows = T.bind(T.min(M, T.int64(tiles.ROWS)))
        total = T.alloc_buffer((row_tiles, len(blocks), tiles.ROWS, lanes), "float32")
        shapes = {_SUMS + i: (rows, 4 * lanes) for i in range(4)}
        shapes |= {_X + t: (rows, 4 * self.depth) for t in range(2)}
        shapes |= {_WEIGHT + v: (self.depth, 4 * lanes) for v in range(2)}
        tiles.configure(shapes)

        def block(count: int, first: Any) -> None:
            """`count` tiles of rows; the last starts early enough to be whole."""
            firsts = [T.bind(T.min(first + t * tiles.ROWS, M - rows)) for t in range(count)]
            self.sum_tiles(x, expanded, firsts, rows, blocks, total)
            with T.serial(0, rows) as m:
                for t, start in enumerate(firsts):
                    row = [self.simd.reg() for _ in blocks]
                    for v, register in enumerate(row):
                        register.v = total[t, v, m, self.simd.span(0)]
                    self._finish([row], start + m, blocks[0])

        with T.serial(low, high) as r:
            first = T.bind(r * self.MR)
            if row_tiles == 1:
                block(1, first)
            else:
                with T.If(first + tiles.ROWS < M):
                    with T.Then():
                        block(2, first)
                    with T.Else():
                        block(1, first)
        tiles.release()

    def multiply_tiles(self, steps: int, x: Any, weight: Any, dot: Any, out: Any, row_tiles: int, some: range) -> None:
        """out[t, v] = the sums of `steps` tiles in k, for row blocks v in `some`.

        `x(t, step)` and `weight(v, step)` are the first element of a tile and the distance of its rows in bytes; `dot`
        multiplies tiles.
        """
        sums = {(t, i): _SUMS + 2 * t + i for t in range(row_tiles) for i in range(len(some))}
        for tile in sums.values():
            tiles.zero(tile)
        with T.serial(0, steps) as step:
            for t in range(row_tiles):
                tiles.load(_X + t, *x(t, step))
            for i, v in enumerate(some):
                tiles.load(_WEIGHT + i, *weight(v, step))
            for (t, i), tile in sums.items():
                dot(tile, _X + t, _WEIGHT + i)
        for (t, i), tile in sums.items():
            tiles.store(tile, out[t, some[i], 0, 0], 4 * self.layout.lanes)
