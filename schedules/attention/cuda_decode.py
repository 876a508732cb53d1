"""Few queries on a GPU: keys are split over blocks of threads, and a second launch merges ("Flash-Decoding", Dao et
al., 2023).

A block takes some stacked rows of one key head over `chunk` blocks of keys, of which each of its warps takes every
so-manyth and needs no other warp for it. The lanes of a warp share the 64 keys of a block in the scores, four keys a
lane and every other dimension; in the values they share the dimensions. All loads of the cache are of neighbours, 16
bytes a lane in float32. How keys are split depends on the lengths alone: a sequence's result is the same bits in
every batch.

float32 arithmetic: it hides behind the memory.
"""

from __future__ import annotations

from typing import Any

from llmc.schedules.attention.call import Operands
from llmc.schedules.attention.cuda_cache import Few, device_cache, zeros
from llmc.schedules.attention.cuda_masks import BlockRun, Row, factor
from llmc.schedules.attention.flash import FLOOR, MASKED
from llmc.schedules.attention.layout import BLOCK, span
from llmc.schedules.attention.workloads import AttentionWorkload
from llmc.targets.threads import WARP, BlockReduction, Cell, barrier, launch, shared, shuffled, strided, warp_barrier
from llmc.tvm_shim import T

MAX_QUERIES = 4  # up to so many queries a call decodes
_QUAD = 4  # keys of a lane
_SIDE = BLOCK // _QUAD  # lanes that share a block's keys
_MERGING = 128  # threads of a block that merges
_SUMS = 64  # variables of a lane for sums of values
_STATIC_FLOATS = 10 << 10  # of shared memory, with room to the 48 KiB that a block has without asking


def decode(call: Operands, wanted: Any, chunk: int, warps: int) -> None:
    """Emit both launches, of nothing unless `wanted`."""
    w, B, D = call.w, call.symbols["B"], call.w.head_dim
    height = _height(w, warps)
    rows = T.min(call.symbols["S"], T.int64(MAX_QUERIES)) * w.group
    splits = T.floordiv(call.symbols["CB"] + (chunk - 1), T.int64(chunk))
    acc = T.alloc_buffer((B, w.n_kv_heads, rows, splits, D), "float32")
    top = T.alloc_buffer((B, w.n_kv_heads, rows, splits), "float32")
    total = T.alloc_buffer((B, w.n_kv_heads, rows, splits), "float32")
    tiles = T.floordiv(rows + (height - 1), T.int64(height))
    count = T.Select(wanted, splits, T.int64(0))
    with launch(warps * WARP, count, tiles * w.n_kv_heads, B) as (thread, split, tile, b):
        kv, row0 = T.bind(T.floordiv(tile, tiles)), T.bind(T.floormod(tile, tiles) * height)
        blocks = BlockRun(call, b, T.int64(0), call.rows - 1)
        begin = Cell(T.Cast("int32", split) * chunk, "int32")
        with T.If(begin.v < blocks.count.v), T.Then():
            part = _Part(call, thread, b, kv, row0, height, warps)
            part.run(blocks, begin.v, T.min(begin.v + chunk, blocks.count.v), split, acc, top, total)
    with launch(_MERGING, T.Select(wanted, rows, T.int64(0)), w.n_kv_heads, B) as (thread, r, kv, b):
        used = T.floordiv(BlockRun(call, b, T.int64(0), call.rows - 1).count.v + (chunk - 1), T.int32(chunk))
        _merge(call, thread, b, kv, r, T.Cast("int64", Cell(used, "int32").v), acc, top, total)


def _height(w: AttentionWorkload, warps: int) -> int:
    """Rows of a block: a query's whole group where registers and shared memory have room."""
    of_row = w.head_dim * (1 + warps) + BLOCK * warps + 2 * warps  # floats of shared memory
    most = min(8, _SUMS // _Share(w.head_dim).sums or 1, _STATIC_FLOATS // of_row or 1)
    return -(-w.group // -(-w.group // most))


class _Share:
    """How a warp shares the dimensions of values: `width` at a time, `across` lanes for a key (and so `keys` keys at
    once), each of which has `each` such pieces."""

    def __init__(self, head_dim: int) -> None:
        self.width = next(n for n in (4, 2, 1) if head_dim % n == 0)
        self.pieces = head_dim // self.width
        self.across = min(1 << (self.pieces - 1).bit_length(), WARP)
        self.keys, self.each = WARP // self.across, -(-self.pieces // self.across)

    @property
    def sums(self) -> int:
        return self.width * self.each


class _Part:
    """The work of one block of threads: `height` rows from `row0` on; those that are too many repeat the last one."""

    def __init__(self, call: Operands, thread: Any, b: Any, kv: Any, row0: Any, height: int, warps: int) -> None:
        self.call, self.D, self.warps, self.height = call, call.w.head_dim, warps, height
        self.thread, self.b, self.kv, self.row0 = thread, b, kv, row0
        self.warp, self.lane = T.bind(T.floordiv(thread, T.int64(WARP))), T.bind(T.floormod(thread, T.int64(WARP)))
        self.half, self.side = (
            T.bind(T.floordiv(self.lane, T.int64(_SIDE))),
            T.bind(T.floormod(self.lane, T.int64(_SIDE))),
        )
        self.share = _Share(self.D)
        self.at = T.bind(T.floormod(self.lane, T.int64(self.share.across)))  # the lane's first piece
        self.key = T.bind(T.floordiv(self.lane, T.int64(self.share.across)))
        self.cache = device_cache(call, b, kv)
        self.rows = [Row(call, b, kv, T.min(row0 + m, call.rows - 1)) for m in range(height)]
        self.q, self.p = shared((height, self.D)), shared((warps, height, BLOCK))
        self.parts, self.part_top, self.part_total = (
            shared((warps, height, self.D)),
            shared((warps, height)),
            shared((warps, height)),
        )
        self.sums = [Few(self.share.sums) for _ in range(height)]
        self.top = [Cell(T.float32(FLOOR)) for _ in range(height)]
        self.total = [Cell(T.float32(0)) for _ in range(height)]  # of the lane's own keys
        for sums in self.sums:
            for i in range(sums.n):
                sums.put(i, T.float32(0))

    def run(self, blocks: BlockRun, begin: Any, end: Any, split: Any, acc: Any, top: Any, total: Any) -> None:
        call, D = self.call, self.D
        for m, row in enumerate(self.rows):
            with strided(D, self.thread, self.warps * WARP) as d:
                x = call.buffers["q"][self.b, row.s, row.head * D + d]
                T.buffer_store(self.q, x * T.float32(factor(call.w)), [m, d])
        barrier()
        own = T.bind(begin + T.Cast("int32", self.warp))
        steps = T.floordiv(T.max(end - own, T.int32(0)) + (self.warps - 1), T.int32(self.warps))
        with T.serial(0, steps) as step:
            self.cache.open(blocks.block(own + step * self.warps))
            self._weights(self._scores())
            warp_barrier()
            self._values()
            warp_barrier()
        self._store(split, acc, top, total)

    def _scores(self) -> list[Few]:
        """q k of every row and the lane's four keys."""
        scores = [zeros(_QUAD) for _ in self.rows]
        column = self.side * _QUAD

        def add(d: Any) -> None:
            keys = self.cache.read_keys(d, column, _QUAD)
            for m, score in enumerate(scores):
                x = Cell(self.q[m, d])
                for j in range(_QUAD):
                    score.put(j, score[j] + x.v * keys[j])

        for dims in self.cache.groups():
            self.cache.open_keys(dims, column, _QUAD)
            with T.serial(0, len(dims) // 2) as i:
                add(T.bind(dims.start + T.Cast("int64", i) * 2 + self.half))
            if len(dims) % 2:
                with T.If(self.half == 0), T.Then():
                    add(T.int64(dims.stop - 1))
        for score in scores:
            for j in range(_QUAD):
                score.put(j, score[j] + shuffled(score[j], _SIDE))
        return scores

    def _weights(self, scores: list[Few]) -> None:
        """p := the rows' weights; sums and totals as they are under the new maxima."""
        key0 = T.bind(self.cache.key0 + T.Cast("int32", self.side * _QUAD))
        for m, (row, score) in enumerate(zip(self.rows, scores, strict=True)):
            for j in range(_QUAD):
                with T.If(row.seen(key0 + j)):
                    with T.Then():
                        score.put(j, T.max(row.changed(score[j], key0 + j), T.float32(MASKED)))
                    with T.Else():
                        score.put(j, T.float32(MASKED))
            new = Cell(T.max(T.max(score[0], score[1]), T.max(score[2], score[3])))
            for distance in (8, 4, 2, 1):
                new.v = T.max(new.v, shuffled(new.v, distance))
            new.v = T.max(new.v, self.top[m].v)
            decay = Cell(T.exp2(self.top[m].v - new.v))
            self.top[m].v = new.v
            for j in range(_QUAD):
                score.put(j, T.exp2(score[j] - new.v))
            self.total[m].v = self.total[m].v * decay.v + (score[0] + score[1]) + (score[2] + score[3])
            for i in range(self.share.sums):
                self.sums[m].put(i, self.sums[m][i] * decay.v)
            with T.If(self.half == 0), T.Then():
                place = [self.warp, m, T.ramp(self.side * _QUAD, 1, _QUAD)]
                T.buffer_store(self.p, score.buffer[T.ramp(0, 1, _QUAD)], place)

    def _values(self) -> None:
        """sums := sums + p v, over keys that a row may see: others may not exist, or hold no numbers."""
        share = self.share
        last = self.rows[-1]  # no row sees keys beyond those of the last one
        count = T.max(T.min(last.end.v - self.cache.key0, T.int32(BLOCK)), T.int32(0))
        with T.serial(0, T.floordiv(count + (share.keys - 1), T.int32(share.keys))) as step:
            k = T.bind(T.Cast("int64", step) * share.keys + self.key)
            with T.If(k < T.Cast("int64", count)), T.Then():
                weights = [Cell(self.p[self.warp, m, k]) for m in range(self.height)]
                for piece in range(share.each):
                    with T.If(self.at + piece * share.across < share.pieces), T.Then():
                        value = self.cache.read_value(k, (self.at + piece * share.across) * share.width, share.width)
                        for m, weight in enumerate(weights):
                            for i in range(share.width):
                                at = piece * share.width + i
                                self.sums[m].put(at, self.sums[m][at] + weight.v * value[i])

    def _store(self, split: Any, acc: Any, top: Any, total: Any) -> None:
        """What the warps found, merged, becomes part `split` of each row."""
        share, call = self.share, self.call
        for m in range(self.height):
            for distance in (8, 4, 2, 1):
                self.total[m].v = self.total[m].v + shuffled(self.total[m].v, distance)
            for i in range(share.sums):
                distance = WARP // 2
                while distance >= share.across:
                    self.sums[m].put(i, self.sums[m][i] + shuffled(self.sums[m][i], distance))
                    distance //= 2
            with T.If(self.lane == 0), T.Then():
                T.buffer_store(self.part_top, self.top[m].v, [self.warp, m])
                T.buffer_store(self.part_total, self.total[m].v, [self.warp, m])
            for piece in range(share.each):
                number = self.at + piece * share.across
                with T.If(T.And(self.key == 0, number < share.pieces)), T.Then():
                    sums = self.sums[m].buffer[span(piece * share.width, share.width)]
                    T.buffer_store(self.parts, sums, [self.warp, m, span(number * share.width, share.width)])
        barrier()
        for m in range(self.height):
            place = [self.b, self.kv, self.row0 + m, split]
            with T.If(self.row0 + m < call.rows), T.Then():
                largest, sum_ = Cell(self.part_top[0, m]), Cell(T.float32(0))
                for warp in range(1, self.warps):
                    largest.v = T.max(largest.v, self.part_top[warp, m])
                decays = [Cell(T.exp2(self.part_top[warp, m] - largest.v)) for warp in range(self.warps)]
                for warp, decay in enumerate(decays):
                    sum_.v = sum_.v + decay.v * self.part_total[warp, m]
                with strided(self.D, self.thread, self.warps * WARP) as d:
                    x = Cell(T.float32(0))
                    for warp, decay in enumerate(decays):
                        x.v = x.v + decay.v * self.parts[warp, m, d]
                    T.buffer_store(acc, x.v, [*place, d])
                with T.If(self.thread == 0), T.Then():
                    T.buffer_store(top, largest.v, place)
                    T.buffer_store(total, sum_.v, place)


def _merge(call: Operands, thread: Any, b: Any, kv: Any, r: Any, used: Any, acc: Any, top: Any, total: Any) -> None:
    """out row := sum of the parts, each rescaled to the largest maximum, over the sum of their weights.

    Parts are shared out as a warp shares the values of keys; where there are many of them, they are read side by side.
    """
    w, D, share = call.w, call.w.head_dim, _Share(call.w.head_dim)
    block = BlockReduction(thread, _MERGING)
    place = [b, kv, r]
    mine, sum_ = Cell(T.float32(FLOOR)), Cell(T.float32(0))
    with strided(used, thread, _MERGING) as i:
        mine.v = T.max(mine.v, top[(*place, i)])
    largest = block.max(mine.v)
    with strided(used, thread, _MERGING) as i:
        sum_.v = sum_.v + T.exp2(top[(*place, i)] - largest.v) * total[(*place, i)]
    sum_ = block.sum(sum_.v)
    groups = _MERGING // share.across
    group, at = (T.bind(f(thread, T.int64(share.across))) for f in (T.floordiv, T.floormod))
    sums = shared((groups, D))
    for piece in range(share.each):
        column = T.bind((at + piece * share.across) * share.width)
        with T.If(column < T.int64(D)), T.Then():
            found = zeros(share.width)
            with strided(used, group, groups) as i:
                weight, part = Cell(T.exp2(top[(*place, i)] - largest.v)), Few(share.width)
                part.fill(acc[(*place, i, span(column, share.width))])
                for j in range(share.width):
                    found.put(j, found[j] + weight.v * part[j])
            T.buffer_store(sums, found.buffer[span(0, share.width)], [group, span(column, share.width)])
    barrier()
    norm = Cell(T.Select(sum_.v > T.float32(0), T.float32(1) / sum_.v, T.float32(0)))
    with strided(D, thread, _MERGING) as d:
        x = Cell(sums[0, d])
        for i in range(1, groups):
            x.v = x.v + sums[i, d]
        column = (kv * w.group + T.floormod(r, T.int64(w.group))) * D + d
        T.buffer_store(call.buffers["out"], x.v * norm.v, [b, T.floordiv(r, T.int64(w.group)), column])
