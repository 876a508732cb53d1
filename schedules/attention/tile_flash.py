"""Attention of many queries on AMX tiles: `Flash` with both products in bfloat16, summed in float32.

Tiles multiply rows of 32 bfloat16 with pairs of neighbours in k. A block of keys, which the cache holds as [D, 64], and
its values, [64, D], are both paired by their rows: two registers are rounded and put together. That is done as a block
is read, once for all rows of a task; the cache stays what it is. By count of instructions it costs as much as both
products of about 100 rows: hence tasks of more rows than vectors need. A copy that is paired once for all tasks would
take as much memory traffic as half of the cache, and a place to lie in.

The softmax in between is that of `Flash`, in float32; weights are rounded as they are made, and summed before.
"""

from __future__ import annotations

from typing import Any

from llmc.schedules.attention.call import Call
from llmc.schedules.attention.flash import MASKED, Flash
from llmc.schedules.attention.layout import BLOCK, span
from llmc.schedules.attention.workloads import AttentionWorkload
from llmc.targets import tiles
from llmc.targets.base import Target
from llmc.tvm_shim import T

LEAST_DIM = 16  # of a head: narrower ones would leave most of a tile empty
KEYS = 4  # tiles of keys, or of values, that are multiplied side by side
_SUMS, _ROWS, _PAIRS = 0, 4, 6  # the first tile of sums (4), of rows of queries or weights, of keys or values (2)
_DEPTH = 2 * tiles.ROWS  # of one product: bfloat16 in a row of a tile


def has_tiles(workload: AttentionWorkload, target: Target) -> bool:
    """Can tiles multiply for that workload on that target?"""
    return workload.bf16 and target.tiles and workload.head_dim >= LEAST_DIM


class TileFlash(Flash):
    """`Flash` for MR = 16 rows by NR = 4 tiles. All tiles are whole: padded rows repeat the last one, dimensions that
    are missing are zeros."""

    def __init__(
        self, call: Call, b: Any, kv: Any, row0: Any, count: Any, max_rows: int, MR: int, NR: int, ahead: bool = False
    ) -> None:
        self.steps = -(-call.w.head_dim // _DEPTH)
        super().__init__(call, b, kv, row0, count, max_rows, MR, NR, ahead)
        self.weights_ = T.alloc_buffer((self.padded, BLOCK), "uint16")
        self.keys = T.alloc_buffer((self.steps * tiles.ROWS, BLOCK), "uint32")
        self.block_values = T.alloc_buffer((len(self.starts), BLOCK // 2, self.width), "uint32")

    def alloc_queries(self) -> Any:
        """Scratch of the scaled queries as bfloat16, [rows, steps * 32]."""
        return T.alloc_buffer((self.padded, self.steps * _DEPTH), "uint16")

    def put_query(self, i: Any, column: int, x: Any) -> None:
        T.buffer_store(self.q, tiles.to_bf16(x, self.width), [i, span(column, self.width)])

    def put_weight(self, i: Any, column: int, x: Any) -> None:
        T.buffer_store(self.weights_, tiles.to_bf16(x, self.simd.lanes), [i, self.simd.span(column)])

    def run(self, first: Any, last: Any) -> None:
        tiles.configure(dict.fromkeys(range(8), (tiles.ROWS, tiles.ROW_BYTES)))
        self.clear()
        super().run(first, last)
        tiles.release()

    def clear(self) -> None:
        """Zeros for the dimensions that queries and keys have not."""
        simd, D = self.simd, self.w.head_dim
        if missing := self.steps * _DEPTH - D:
            with T.serial(0, self.padded) as i:
                zeros = T.uint16(0) if missing == 1 else T.broadcast(T.uint16(0), missing)
                T.buffer_store(self.q, zeros, [i, span(D, missing)])
        with T.serial((D + 1) // 2, self.steps * tiles.ROWS) as pair:
            for n in range(0, BLOCK, simd.lanes):
                T.buffer_store(self.keys, T.broadcast(T.uint32(0), simd.lanes), [pair, simd.span(n)])

    # -- one block of keys --------------------------------------------------------------------------------------
    def scores(self, block: Any, key0: Any, tile0: Any) -> None:
        self.pair_keys(block)
        super().scores(block, key0, tile0)

    def values(self, key0: Any, tile0: Any) -> None:
        self.pair_values(key0)
        super().values(key0, tile0)

    def pair_keys(self, block: Any) -> None:
        """keys [pairs of dimensions, 64] := the block's."""
        simd, D = self.simd, self.w.head_dim

        def put(pair: Any, both: bool) -> None:
            for n in range(0, BLOCK, simd.lanes):
                low, *high = (self.cache.key(block, 2 * pair + j, n) for j in range(1 + both))
                T.buffer_store(self.keys, tiles.pairs(low, high[0] if high else None, simd.lanes), [pair, simd.span(n)])

        with T.serial(0, D // 2) as pair:
            put(pair, both=True)
        if D % 2:
            put(D // 2, both=False)

    def pair_values(self, key0: Any) -> None:
        """block_values [vectors, pairs of keys, 16] := the block's; zeros for keys that no row sees: they may not
        exist, and what lies there may be no number."""
        n, count = self.width, T.bind(self.columns_seen(self.tiles - 1, key0))

        def put(pair: Any, keys: int) -> None:
            for j, c in enumerate(self.starts):
                low, *high = (self.cache.value(key0, 2 * pair + k, c, n) for k in range(keys))
                T.buffer_store(self.block_values, tiles.pairs(low, high[0] if high else None, n), [j, pair, span(0, n)])

        with T.serial(0, count // 2) as pair:
            put(pair, keys=2)
        with T.If(count % 2 == 1), T.Then():
            put(T.bind(count // 2), keys=1)
        with T.serial((count + 1) // 2, T.int32(BLOCK // 2)) as pair:
            for j in range(len(self.starts)):
                T.buffer_store(self.block_values, T.broadcast(T.uint32(0), n), [j, pair, span(0, n)])

    def score_tile(self, block: Any, tile: Any, column: Any, columns: Any) -> None:
        """p := q k^T for 16 rows and 64 keys, or for the first 32 where no row sees the others."""
        row = T.bind(tile * tiles.ROWS)

        def multiply(count: int) -> None:
            for n in range(count):
                tiles.zero(_SUMS + n)
            for step in range(self.steps):
                tiles.load(_ROWS, self.q[row, step * _DEPTH], 2 * self.steps * _DEPTH)
                for n in range(count):
                    tiles.load(_PAIRS + n % 2, self.keys[step * tiles.ROWS, n * tiles.ROWS], 4 * BLOCK)
                    tiles.dot_bf16(_SUMS + n, _ROWS, _PAIRS + n % 2)
            for n in range(count):
                tiles.store(_SUMS + n, self.p[row, n * tiles.ROWS], 4 * BLOCK)

        with T.If(columns > BLOCK // 2):
            with T.Then():
                multiply(KEYS)
            with T.Else():
                multiply(KEYS // 2)
                with T.serial(0, tiles.ROWS) as m:
                    for n in range(BLOCK // 2, BLOCK, self.simd.lanes):
                        T.buffer_store(self.p, self.simd.f32(MASKED), [row + m, self.simd.span(n)])

    def value_tile(self, tile: Any, key0: Any, columns: Any, vectors_: range) -> None:
        """acc := acc * decay + p v for 16 rows and some vectors of dimensions; 32 keys a step."""
        n, row = self.width, T.bind(tile * tiles.ROWS)
        stride = 4 * n * len(self.starts)
        with T.serial(0, tiles.ROWS) as m:
            decay = T.bind(self.simd.splat(self.decay[row + m], n))
            for j in vectors_:
                at = [row + m, span(j * n, n)]
                T.buffer_store(self.acc, self.acc[tuple(at)] * decay, at)
        sums = {j: _SUMS + i for i, j in enumerate(vectors_)}
        for j, sum_ in sums.items():
            tiles.load(sum_, self.acc[row, j * n], stride)
        with T.serial(0, (columns + _DEPTH - 1) // _DEPTH) as step:
            tiles.load(_ROWS, self.weights_[row, step * _DEPTH], 2 * BLOCK)
            for j, sum_ in sums.items():
                pairs = _PAIRS + j % 2
                tiles.load(pairs, self.block_values[j, step * tiles.ROWS, 0], 4 * n)
                tiles.dot_bf16(sum_, _ROWS, pairs)
        for j, sum_ in sums.items():
            tiles.store(sum_, self.acc[row, j * n], stride)
