"""Online softmax over blocks of 64 keys: the body of both prefill and decode (Dao, "FlashAttention-2", 2023).

The query heads that share a key head are stacked: row r of a key head is query r // group of head r % group of its
group. A task takes some consecutive rows over a range of key blocks. All heads of a group thus read a block of keys
while it is in the cache, and few rows are enough to fill a register tile in decode.

For each block of keys, tiles of MR rows by NR registers do
  1. P = Q K^T, masked, and the rows' new maxima;
  2. how much each row's sums decay under its new maximum;
  3. P = 2^(P - maximum), acc = acc * decay + P V.
Queries are scaled by log2(e) on the way in, so that exp is 2^x.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

from llmc.schedules.attention.cache import cache_of
from llmc.schedules.attention.call import Call
from llmc.schedules.attention.layout import BLOCK, fill, span, vectors
from llmc.schedules.attention.masks import parts_of
from llmc.targets.intrinsics import Reg
from llmc.tvm_shim import T

LOG2E = 1 / math.log(2)
FLOOR = -1e30  # first maximum of every row; scores below count as masked
MASKED = -3e38


class Flash:
    """One task: up to `max_rows` stacked rows of key head `kv` of batch `b`, over a range of key blocks.

    Scratch: acc [rows, D] sums of weighted values, top [rows] maxima, total [rows, lanes] sums of weights by lane.
    `ahead` has the cache prefetch what is read next.
    """

    def __init__(
        self, call: Call, b: Any, kv: Any, row0: Any, count: Any, max_rows: int, MR: int, NR: int, ahead: bool = False
    ) -> None:
        self.cache = cache_of(call, b, kv, ahead)
        self.call, self.w, self.simd = call, call.w, call.simd
        self.b, self.kv, self.row0, self.count = b, kv, row0, count
        lanes = self.simd.lanes
        self.MR, self.NR = MR, NR
        self.width, self.starts = vectors(self.w.head_dim, lanes)
        self.tiles = T.bind((count + MR - 1) // MR)
        self.padded = -(-max_rows // MR) * MR
        self.padded += -self.padded % lanes
        self.q = self.alloc_queries()
        self.p = T.alloc_buffer((self.padded, BLOCK), "float32")
        self.acc = T.alloc_buffer((self.padded, len(self.starts) * self.width), "float32")
        self.total = T.alloc_buffer((self.padded, lanes), "float32")
        self.top, self.new_top, self.decay = (T.alloc_buffer((self.padded,), "float32") for _ in range(3))
        self.begin, self.end = (T.alloc_buffer((self.padded,), "int32") for _ in range(2))
        self.key_bias, self.bias = (T.alloc_buffer((BLOCK,), "float32") for _ in range(2))
        self.parts = parts_of(call, b, kv, self.padded)
        self.gap = call.gap(b, row0, row0 + count - 1) if self.w.sinks else None

    def alloc_queries(self) -> Any:
        """Scratch of the scaled queries, [rows, D]."""
        return T.alloc_buffer((self.padded, self.w.head_dim), "float32")

    def put_query(self, i: Any, column: int, x: Any) -> None:
        """Keep dimensions of row i's query, scaled, from `column` on."""
        T.buffer_store(self.q, x, [i, span(column, self.width)])

    def put_weight(self, i: Any, column: int, x: Any) -> None:
        """Keep a register of row i's weights, of the block's keys from `column` on."""
        T.buffer_store(self.p, x, [i, self.simd.span(column)])

    # -- the three parts of a task ------------------------------------------------------------------------------
    def run(self, first: Any, last: Any) -> None:
        """Scratch := attention over key blocks first .. last-1, not yet divided by the totals."""
        self.prepare()
        with T.serial(0, T.max(last - first, T.int64(0))) as i:
            block = T.bind(first + i)
            if self.gap is not None:
                block = T.bind(block + T.Select(block < self.call.sink_blocks, T.int64(0), self.gap))
            key0 = T.bind(block * BLOCK)
            for part in self.parts:
                part.open_block(key0)
            relevant = [condition for part in self.parts if (condition := part.relevant()) is not None]
            if not relevant:
                self.block(block, key0)
            else:
                with T.If(functools.reduce(T.And, relevant)), T.Then():
                    self.block(block, key0)

    def block(self, block: Any, key0: Any) -> None:
        """Scratch := scratch and what one more block of keys adds."""
        tile0 = self.first_tile(key0)
        self.cache.open_keys(block)
        self.scores(block, key0, tile0)
        self.decays()
        self.cache.open_values(block)
        self.values(key0, tile0)

    def prepare(self) -> None:
        w, simd = self.w, self.simd
        factor = w.scale / w.softcap if w.softcap else w.scale * LOG2E
        fill(simd, self.top, FLOOR, self.padded)
        fill(simd, self.new_top, FLOOR, self.padded)
        with T.serial(0, self.tiles * self.MR) as i:
            b, r = self.row(i)
            begin, end = self.seen(b, r)
            T.buffer_store(self.begin, T.Cast("int32", begin), [i])
            T.buffer_store(self.end, T.Cast("int32", end), [i])
            for part in self.parts:
                part.open_row(i, r)
            for c in self.starts:
                x = self.call.buffers["q"][tuple(self.call.output_at(b, self.kv, r, c, self.width))]
                self.put_query(i, c, x * simd.f32(factor, self.width))
            for j in range(len(self.starts)):
                T.buffer_store(self.acc, simd.f32(0, self.width), [i, span(j * self.width, self.width)])
            T.buffer_store(self.total, simd.f32(0), [i, simd.span(0)])

    def row(self, i: Any) -> tuple[Any, Any]:
        """Batch and stacked row of the task's row i; those that fill the last tile stand for its last one."""
        return self.b, T.bind(self.row0 + T.min(i, self.count - 1))

    def seen(self, b: Any, r: Any) -> tuple[Any, Any]:
        """First key, and one past the last, that a row sees."""
        return self.call.seen(b, r)

    def sum_of_weights(self, i: Any) -> Any:
        """Row i's sum of weights: at least 1 (the maximum's own weight) unless the row saw no key."""
        return T.bind(self.simd.reduce_add(self.total[i, self.simd.span(0)]))

    # -- one block of keys --------------------------------------------------------------------------------------
    def first_tile(self, key0: Any) -> Any:
        """The first tile of which a row sees the block: with a causal mask, rows see it from some row on."""
        if not self.w.ordered:
            return T.int64(0)
        before = key0 - self.call.buffers["kv_len"][self.b] + self.call.symbols["S"]  # queries that stand before key0
        first = T.max(before * self.w.group - self.row0, T.int64(0)) // self.MR
        if self.w.prefix:
            first = T.Select(key0 < self.call.buffers["prefix_len"][self.b], T.int64(0), first)
        return T.bind(first)

    def columns_seen(self, tile: Any, key0: Any) -> Any:
        """How many leading keys of the block the tile's last row, and so any of its rows, may see."""
        return T.bind(T.min(self.end[tile * self.MR + self.MR - 1] - T.Cast("int32", key0), T.int32(BLOCK)))

    def scores(self, block: Any, key0: Any, tile0: Any) -> None:
        """p := scores of the block in units of log2, masked; new_top := rows' maxima."""
        cut = self.end[0] < T.Cast("int32", key0) + BLOCK
        if self.w.window:
            cut = T.Or(cut, self.begin[self.tiles * self.MR - 1] > T.Cast("int32", key0))
        cuts = [condition for part in self.parts if (condition := part.cuts(key0)) is not None]
        cut = functools.reduce(T.Or, cuts, cut)
        width = self.NR * self.simd.lanes
        with T.serial(0, BLOCK // width) as g, T.serial(tile0, self.tiles) as tile:
            self.score_tile(block, tile, g * width, self.columns_seen(tile, key0))
        if self.w.key_bias:
            self.stage_bias(self.key_bias, [self.b], self.call.buffers["key_bias"], key0)
        with T.If(cut):
            with T.Then(), T.serial(tile0 * self.MR, self.tiles * self.MR) as i:
                self.finish_row(i, key0, cut=True)
            with T.Else(), T.serial(tile0 * self.MR, self.tiles * self.MR) as i:
                self.finish_row(i, key0, cut=False)

    def score_tile(self, block: Any, tile: Any, column: Any, columns: Any) -> None:
        """p := q k^T for MR rows and NR registers of keys from `column` on."""
        simd = self.simd
        at = [T.bind(column + n * simd.lanes) for n in range(self.NR)]
        rows = [tile * self.MR + m for m in range(self.MR)]
        with T.If(columns > at[0]):
            with T.Then():
                score = {(m, n): simd.reg() for m in range(self.MR) for n in range(self.NR)}
                for s in score.values():
                    s.v = simd.f32(0)
                with T.serial(0, self.w.head_dim) as d:
                    self.cache.fetch_values(block, d)
                    for (m, n), s in score.items():
                        s.v = simd.fma(self.cache.key(block, d, at[n]), simd.splat(self.q[rows[m], d]), s.v)
                for (m, n), s in score.items():
                    T.buffer_store(self.p, s.v, [rows[m], simd.span(at[n])])
            with T.Else():
                for m in range(self.MR):
                    for n in range(self.NR):
                        T.buffer_store(self.p, simd.f32(MASKED), [rows[m], simd.span(at[n])])

    def row_vectors(self, i: Any) -> list[tuple[int, Any]]:
        """(first column, vector) over row i of p."""
        lanes = self.simd.lanes
        return [(n, self.p[i, self.simd.span(n)]) for n in range(0, BLOCK, lanes)]

    def finish_row(self, i: Any, key0: Any, cut: bool) -> None:
        """Softcap, biases and, where the block is cut by a mask or by the end of the keys, masks; then the maximum."""
        w, simd = self.w, self.simd
        xs = {n: T.bind(x) for n, x in self.row_vectors(i)}
        if w.softcap:
            xs = {n: T.bind(simd.f32(w.softcap * LOG2E) * simd.tanh(x)) for n, x in xs.items()}
        if w.key_bias:
            xs = {n: T.bind(x + self.key_bias[simd.span(n)]) for n, x in xs.items()}
        if w.bias:
            row = self.bias_row(i)
            if cut:
                self.stage_bias(self.bias, row, self.call.buffers["bias"], key0)
                xs = {n: T.bind(x + self.bias[simd.span(n)]) for n, x in xs.items()}
            else:
                at = {n: (*row, simd.span(key0 + n)) for n in xs}
                log2e = simd.f32(LOG2E)
                xs = {n: T.bind(simd.fma(self.call.buffers["bias"][at[n]], log2e, x)) for n, x in xs.items()}
        for part in self.parts:
            xs = part.add(i, key0, xs)
        if cut:
            xs = {n: T.bind(x) for n, x in self.masked(i, key0, xs)}
        if cut or w.softcap or w.key_bias or w.bias or any(part.adds for part in self.parts):
            for n, x in xs.items():
                T.buffer_store(self.p, x, [i, simd.span(n)])
        top = simd.reduce_max(_tree(list(xs.values()), T.max))
        T.buffer_store(self.new_top, T.max(self.top[i], top), [i])

    def masked(self, i: Any, key0: Any, xs: dict[int, Any]) -> Iterator[tuple[int, Any]]:
        """Scores of keys that the row does not see replaced by MASKED."""
        simd, base = self.simd, T.bind(T.Cast("int32", key0))
        end = T.bind(simd.splat(self.end[i] - base))
        if self.w.window:
            # begin <= key < end as one unsigned comparison: LLVM takes seconds over two selects in a row.
            begin = T.bind(simd.splat(self.begin[i] - base))
            size = T.bind(T.reinterpret(f"uint32x{simd.lanes}", T.max(end - begin, simd.i32(0))))
        if self.w.sinks:
            sinks = T.bind(T.min(end, simd.splat(T.int32(self.w.sinks) - base)))
        hides = [condition for part in self.parts if (condition := part.seen(i, key0)) is not None]
        for n, x in xs.items():
            key = T.ramp(T.int32(n), 1, simd.lanes)
            seen = T.reinterpret(f"uint32x{simd.lanes}", key - begin) < size if self.w.window else key < end
            if self.w.sinks:
                seen = T.Or(seen, key < sinks)
            for condition in hides:
                seen = T.And(seen, condition(n))
            yield n, T.Select(seen, x, simd.f32(MASKED))

    def bias_row(self, i: Any) -> list[Any]:
        """Leading indices of row i in bias."""
        w = self.w
        r = T.bind(self.row0 + T.min(i, self.count - 1))
        return [
            self.b if w.bias_batch else 0,
            self.kv * w.group + r % w.group if w.bias_heads else 0,
            r // w.group if w.bias_rows else 0,
        ]

    def stage_bias(self, scratch: Any, row: list[Any], bias: Any, key0: Any) -> None:
        """scratch [64] := the block's biases in units of log2; a row of biases may end inside of the block."""
        simd, size = self.simd, self.call.symbols["T"]
        with T.If(key0 + BLOCK <= size):
            with T.Then():
                for n in range(0, BLOCK, simd.lanes):
                    x = bias[(*row, simd.span(key0 + n))] * simd.f32(LOG2E)
                    T.buffer_store(scratch, x, [simd.span(n)])
            with T.Else(), T.serial(0, T.max(size - key0, T.int64(0))) as k:
                T.buffer_store(scratch, bias[(*row, key0 + k)] * T.float32(LOG2E), [k])

    def decays(self) -> None:
        """decay := 2^(top - new_top), one vector for many rows; top := new_top."""
        simd, lanes = self.simd, self.simd.lanes
        with T.serial(0, self.padded // lanes) as j:
            at = [simd.span(j * lanes)]
            new = T.bind(self.new_top[at[0]])
            T.buffer_store(self.decay, simd.exp2(self.top[at[0]] - new), at)
            T.buffer_store(self.top, new, at)

    def values(self, key0: Any, tile0: Any) -> None:
        """p := weights; acc, total := acc, total * decay + what the block adds."""
        with T.serial(tile0 * self.MR, self.tiles * self.MR) as i:
            self.weights(i)
        groups = -(-len(self.starts) // self.NR)
        size = -(-len(self.starts) // groups)
        for g in range(0, len(self.starts), size):
            with T.serial(tile0, self.tiles) as tile:
                columns = self.columns_seen(tile, key0)
                self.value_tile(tile, key0, columns, range(g, min(g + size, len(self.starts))))

    def weights(self, i: Any) -> None:
        simd = self.simd
        top = T.bind(simd.splat(self.top[i]))
        xs = []
        for n, x in self.row_vectors(i):
            y = simd.exp2(x - top)
            self.put_weight(i, n, y)
            xs.append(y)
        added = _tree(xs, lambda a, b: a + b)
        total = simd.fma(self.total[i, simd.span(0)], simd.splat(self.decay[i]), added)
        T.buffer_store(self.total, total, [i, simd.span(0)])

    def value_tile(self, tile: Any, key0: Any, columns: Any, vectors_: range) -> None:
        simd, n = self.simd, self.width
        out = {(m, j): Reg(n) for m in range(self.MR) for j in vectors_}
        rows = [tile * self.MR + m for m in range(self.MR)]
        for (m, j), o in out.items():
            o.v = self.acc[rows[m], simd.span(j * n, n)] * simd.splat(self.decay[rows[m]], n)
        with T.serial(0, columns) as k:
            if vectors_.start == 0:
                self.cache.fetch_keys(key0 // BLOCK + 1, k)
            for (m, j), o in out.items():
                v = self.cache.value(key0, k, self.starts[j], n)
                o.v = simd.fma(v, simd.splat(self.p[rows[m], k], n), o.v, n)
        for (m, j), o in out.items():
            T.buffer_store(self.acc, o.v, [rows[m], simd.span(j * n, n)])


def _tree(xs: list[Any], combine: Callable[[Any, Any], Any]) -> Any:
    """Combine a power of two of values pairwise: the shortest chain of dependent operations."""
    while len(xs) > 1:
        xs = [combine(a, b) for a, b in zip(xs[::2], xs[1::2], strict=True)]
    return xs[0]
