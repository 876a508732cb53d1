"""Many queries on a GPU: a block of threads takes 64 stacked rows, or 32, of a key head over all blocks of keys that
one of them sees (Dao, "FlashAttention-2", 2023).

Keys and values of a float32 cache are copied into shared memory ahead of their use, asynchronously: the next keys while
this block's values are multiplied, the next values while its keys are. Those of a rounded cache are widened on the way,
by the threads themselves and when they are needed, once for all rows.

How both products are made is for subclasses to say.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from llmc.schedules.attention.call import Operands
from llmc.schedules.attention.cuda_cache import Few, PlainCache, device_cache, zeros
from llmc.schedules.attention.cuda_masks import BlockRun, Row, changes_scores
from llmc.schedules.attention.flash import FLOOR, MASKED
from llmc.schedules.attention.layout import BLOCK
from llmc.schedules.attention.workloads import AttentionWorkload
from llmc.targets.mma import commit_copies, copy_async, wait_copies
from llmc.targets.threads import Cell, barrier, launch, shuffled, strided
from llmc.tvm_shim import T

THREADS = 128
QUAD = 4  # floats that are loaded at once
_SIDE = BLOCK // QUAD
_MANY = 128  # dimensions of a head beyond which sums leave few registers for loads


class Prefill(ABC):
    """The work of one block of threads: rows from `row0` on of key head `kv` of sequence `b`; rows that are too many
    repeat the last one, and are not stored.

    Shared memory is one buffer of float32: TVM, which would give buffers the same place where it sees no use of both,
    sees none in addresses. `places` says where its parts begin.
    """

    keeps_copies = False  # are products made from the copies themselves, and not from something made of them?

    def __init__(self, call: Operands, thread: Any, tile: Any, kv: Any, b: Any) -> None:
        self.call, self.w, self.D = call, call.w, call.w.head_dim
        self.thread, self.b, self.kv, self.row0 = thread, b, kv, T.bind(tile * self.height_of(call.w))
        self.last_row = T.bind(T.min(self.row0 + (self.height_of(call.w) - 1), call.rows - 1))
        self.places, size = self.layout(call.w)
        self.staged = self.copies(call.w)
        self.unroll = 4 if self.D > _MANY else None
        self.one_place = "keys" in self.places and self.places["keys"] == self.places["values"]
        self.memory = T.alloc_buffer((size,), "float32", scope="shared.dyn")
        self.cache, self.ahead = device_cache(call, b, kv), device_cache(call, b, kv)
        self.blocks = BlockRun(call, b, self.row0, self.last_row)
        self.limit = Cell(T.Cast("int32", call.seen(b, self.last_row)[1]), "int32")  # the first key that no row sees
        self.rows = [Row(call, b, kv, T.min(self.row0 + r, call.rows - 1)) for r in self.own_rows()]
        self.top = [Cell(T.float32(FLOOR)) for _ in self.rows]
        self.total = [Cell(T.float32(0)) for _ in self.rows]  # of the thread's own keys
        self.decay = [Cell(T.float32(0)) for _ in self.rows]

    # -- what subclasses say --------------------------------------------------------------------------------------
    @classmethod
    def height_of(cls, w: AttentionWorkload) -> int:
        """Rows of a block of threads."""
        return 64

    @classmethod
    @abstractmethod
    def layout(cls, w: AttentionWorkload) -> tuple[dict[str, int], int]:
        """(where each part of shared memory begins, size of all), in floats; copies are "keys" and "values"."""

    @classmethod
    def copies(cls, w: AttentionWorkload) -> bool:
        """Is the cache copied ahead? That takes places for keys and for values."""
        places = cls.layout(w)[0]
        return w.kv_cache == "float32" and "keys" in places and places["keys"] != places["values"]

    @classmethod
    def shared_bytes(cls, w: AttentionWorkload) -> int:
        return 4 * cls.layout(w)[1]

    @abstractmethod
    def own_rows(self) -> list[Any]:
        """Rows of the tile of whose scores this thread has some."""

    @abstractmethod
    def open(self) -> None:
        """Queries to where products find them; zeros where they are asked for."""

    @abstractmethod
    def put_keys(self, d: Any, column: Any, keys: Few) -> None:
        """Four keys' dimension d to where products find it; where copies are no such place, or there are none."""

    @abstractmethod
    def put_value(self, k: Any, column: Any, value: Few) -> None:
        """Four dimensions of key k's value."""

    @abstractmethod
    def scores(self) -> list[tuple[int, Any, Cell]]:
        """(own row, key of the block, score) of all of this thread's."""

    @property
    @abstractmethod
    def reach(self) -> list[int]:
        """Distances of the lanes that have other scores of the same rows."""

    @abstractmethod
    def values(self, weights: list[tuple[int, Any, Cell]]) -> None:
        """sums := sums * decay + weights * values."""

    @abstractmethod
    def store(self, norms: list[Cell]) -> None:
        """out := sums * norms."""

    # -- the common part ------------------------------------------------------------------------------------------
    def run(self) -> None:
        blocks = self.blocks
        self.open()
        with T.If(blocks.count.v > 0), T.Then():
            if self.staged:
                self._copy_keys(blocks.block(T.int32(0)))
                self._copy_values(blocks.block(T.int32(0)))
            with T.serial(0, blocks.count.v) as step:
                self.cache.open(blocks.block(step))
                # The last block is copied once too often: no branch.
                self._block(blocks.block(T.min(step + 1, blocks.count.v - 1)))
            if self.staged:
                wait_copies(0)
        for total in self.total:
            for distance in self.reach:
                total.v = total.v + shuffled(total.v, distance)
        self.store([Cell(T.Select(t.v > T.float32(0), T.float32(1) / t.v, T.float32(0))) for t in self.total])

    def _block(self, after: Any) -> None:
        found: list[tuple[int, Any, Cell]] = []

        def use_keys() -> None:
            found.extend(self.scores())

        self._turn(self._take_keys, use_keys, lambda: self._copy_keys(after))
        self._weights(found)
        self._turn(self._take_values, lambda: self.values(found), lambda: self._copy_values(after))

    def _turn(self, take: Callable[[], None], use: Callable[[], None], copy: Callable[[], None]) -> None:
        """Use a block's keys, or its values, and begin to copy the next ones as soon as there is place for them.

        A thread takes what it copied itself, and puts it where all are done reading: the other of keys and values had
        its barrier since. One is enough there.
        """
        if self.staged:
            wait_copies(1)  # of keys and values one is on its way
        if self.staged and self.keeps_copies:
            barrier()
            use()
            barrier()
            copy()
            return
        if self.one_place:
            barrier()  # all are done with the other one
        take()
        barrier()
        if self.staged:
            copy()
        use()

    def _copy_keys(self, block: Any) -> None:
        assert isinstance(self.ahead, PlainCache)
        self.ahead.open(block)
        with strided(self.D * _SIDE, self.thread, THREADS) as at:
            d, column = T.floordiv(at, T.int64(_SIDE)), T.floormod(at, T.int64(_SIDE)) * QUAD
            copy_async(self.memory[self.places["keys"] + at * QUAD], self.ahead.keys[(*self.ahead.here, d, column)])
        commit_copies()

    def _copy_values(self, block: Any) -> None:
        """Values of keys that no row sees become zeros: they may not exist, and what lies there may be no number."""
        assert isinstance(self.ahead, PlainCache)
        self.ahead.open(block)
        pieces = self.D // QUAD
        count = T.bind(T.Cast("int64", self.limit.v - self.ahead.key0))
        with strided(BLOCK * pieces, self.thread, THREADS) as at:
            k, column = T.bind(T.floordiv(at, T.int64(pieces))), T.floormod(at, T.int64(pieces)) * QUAD
            source = self.ahead.values[(*self.ahead.value_row(T.min(k, count - 1)), column)]
            copy_async(self.memory[self.places["values"] + at * QUAD], source, k < count)
        commit_copies()

    def _take_keys(self) -> None:
        column = T.bind(T.floormod(self.thread, T.int64(_SIDE)) * QUAD)
        each = THREADS // _SIDE
        for dims in [range(self.D)] if self.staged else self.cache.groups():
            if not self.staged:
                self.cache.open_keys(dims, column, QUAD)
            with strided(len(dims), T.floordiv(self.thread, T.int64(_SIDE)), each, self.unroll) as i:
                d = T.bind(dims.start + i)
                self.put_keys(
                    d,
                    column,
                    self._staged("keys", d * BLOCK + column) if self.staged else self.cache.read_keys(d, column, QUAD),
                )

    def _take_values(self) -> None:
        pieces = self.D // QUAD
        count = T.bind(T.Cast("int64", self.limit.v - self.cache.key0))
        with strided(BLOCK * pieces, self.thread, THREADS, self.unroll) as at:
            k, column = T.bind(T.floordiv(at, T.int64(pieces))), T.bind(T.floormod(at, T.int64(pieces)) * QUAD)
            if self.staged:
                self.put_value(k, column, self._staged("values", at * QUAD))
            else:
                with T.If(k < count):
                    with T.Then():
                        self.put_value(k, column, self.cache.read_value(k, column, QUAD))
                    with T.Else():
                        self.put_value(k, column, zeros(QUAD))

    def _staged(self, part: str, at: Any) -> Few:
        found = Few(QUAD)
        found.fill(self.memory[T.ramp(self.places[part] + at, 1, QUAD)])
        return found

    def _weights(self, found: list[tuple[int, Any, Cell]]) -> None:
        """Scores become weights; totals and decays as they are under the new maxima."""
        key0 = T.bind(self.cache.key0)
        for m, row in enumerate(self.rows):
            own = [(key0 + T.Cast("int32", key), score) for i, key, score in found if i == m]
            whole = row.seen_whole(key0)
            if whole is None:
                _mask(row, own)
            else:
                with T.If(whole):
                    with T.Then():
                        for key, score in own if changes_scores(self.w) else ():
                            score.v = T.max(row.changed(score.v, key), T.float32(MASKED))
                    with T.Else():
                        _mask(row, own)
            new = Cell(self.top[m].v)
            for _, score in own:
                new.v = T.max(new.v, score.v)
            for distance in self.reach:
                new.v = T.max(new.v, shuffled(new.v, distance))
            self.decay[m].v = T.exp2(self.top[m].v - new.v)
            self.top[m].v = new.v
            self.total[m].v = self.total[m].v * self.decay[m].v
            for _, score in own:
                score.v = T.exp2(score.v - new.v)
                self.total[m].v = self.total[m].v + score.v


def _mask(row: Row, scores: list[tuple[Any, Cell]]) -> None:
    for key, score in scores:
        with T.If(row.seen(key)):
            with T.Then():
                score.v = T.max(row.changed(score.v, key), T.float32(MASKED))
            with T.Else():
                score.v = T.float32(MASKED)


def prefill(call: Operands, wanted: Any, tiles_of: type[Prefill]) -> None:
    """Emit the launch, of nothing unless `wanted`. Late rows, which see more keys under a causal mask, go first."""
    height = tiles_of.height_of(call.w)
    tiles = T.floordiv(call.rows + (height - 1), T.int64(height))
    count = T.Select(wanted, tiles, T.int64(0))
    with launch(THREADS, count, call.w.n_kv_heads, call.symbols["B"]) as (thread, tile, kv, b):
        tiles_of(call, thread, T.bind(tiles - 1 - tile), kv, b).run()
