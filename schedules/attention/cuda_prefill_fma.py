"""Prefill on a GPU in float32: `Prefill` with both products in fused multiply-adds, from tiles in shared memory.

16 threads that stand side by side make 8 rows, or 4; each of them makes four keys' scores, and then every sixteenth
piece of four dimensions. What they tell each other of weights stays among them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmc.schedules.attention.cuda_cache import Few, zeros
from llmc.schedules.attention.cuda_masks import factor
from llmc.schedules.attention.cuda_prefill import QUAD, THREADS, Prefill
from llmc.schedules.attention.layout import BLOCK
from llmc.schedules.attention.workloads import AttentionWorkload
from llmc.targets.base import Target
from llmc.targets.cuda import CudaTarget
from llmc.targets.threads import Cell, strided, warp_barrier
from llmc.tvm_shim import T

_SIDE = BLOCK // QUAD  # threads that share rows
_PAD = 4  # floats behind a row: rows of neighbours begin in other banks
MOST_DIM = 256  # of a head: its sums fit into registers
_MOST_STAGED = 128  # of which keys and values have places of their own, and there are 64 rows


def serves(w: AttentionWorkload, target: Target) -> bool:
    """Are rows whole pieces of 16 bytes, and do tiles fit into a block's shared memory?"""
    assert isinstance(target, CudaTarget)
    fits = FmaPrefill.shared_bytes(w) <= target.block_shared_bytes
    return w.head_dim % QUAD == 0 and w.head_dim <= MOST_DIM and fits


class FmaPrefill(Prefill):
    keeps_copies = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.pieces = self.D // QUAD
        self.each = -(-self.pieces // _SIDE)
        self.sums = [[zeros(QUAD) for _ in range(self.each)] for _ in self.rows]

    @classmethod
    def height_of(cls, w: AttentionWorkload) -> int:
        return 64 if w.head_dim <= _MOST_STAGED else 32

    @classmethod
    def layout(cls, w: AttentionWorkload) -> tuple[dict[str, int], int]:
        sizes = {
            "queries": cls.height_of(w) * (w.head_dim + _PAD),
            "weights": cls.height_of(w) * (BLOCK + _PAD),
            "keys": w.head_dim * BLOCK,
        }
        if own := w.head_dim <= _MOST_STAGED:
            sizes["values"] = BLOCK * w.head_dim
        starts = {name: sum(list(sizes.values())[:i]) for i, name in enumerate(sizes)}
        return starts if own else starts | {"values": starts["keys"]}, sum(sizes.values())

    def own_rows(self) -> list[Any]:
        self.side = T.bind(T.floormod(self.thread, T.int64(_SIDE)))
        own = self.height_of(self.w) * _SIDE // THREADS
        self.first = T.bind(T.floordiv(self.thread, T.int64(_SIDE)) * own)
        return [self.first + m for m in range(own)]

    @property
    def reach(self) -> list[int]:
        return [8, 4, 2, 1]

    def open(self) -> None:
        """All threads come to a barrier before they read what is written here."""
        q, w = self.call.buffers["q"], self.w
        with strided(self.height_of(self.w) * self.pieces, self.thread, THREADS) as at:
            i, column = T.bind(T.floordiv(at, T.int64(self.pieces))), T.floormod(at, T.int64(self.pieces)) * QUAD
            r = T.bind(T.min(self.row0 + i, self.call.rows - 1))
            head = T.bind(self.kv * w.group + T.floormod(r, T.int64(w.group)))
            x = q[self.b, T.floordiv(r, T.int64(w.group)), T.ramp(head * self.D + column, 1, QUAD)]
            T.buffer_store(self.memory, x * T.broadcast(T.float32(factor(w)), QUAD), [self._query(i, column)])

    def _query(self, row: Any, d: Any) -> Any:
        return T.ramp(self.places["queries"] + row * (self.D + _PAD) + d, 1, QUAD)

    def _weight(self, row: Any, key: Any) -> Any:
        return T.ramp(self.places["weights"] + row * (BLOCK + _PAD) + key, 1, QUAD)

    def put_keys(self, d: Any, column: Any, keys: Few) -> None:
        at = T.ramp(self.places["keys"] + d * BLOCK + column, 1, QUAD)
        T.buffer_store(self.memory, keys.buffer[T.ramp(0, 1, QUAD)], [at])

    def put_value(self, k: Any, column: Any, value: Few) -> None:
        at = T.ramp(self.places["values"] + k * self.D + column, 1, QUAD)
        T.buffer_store(self.memory, value.buffer[T.ramp(0, 1, QUAD)], [at])

    def scores(self) -> list[tuple[int, Any, Cell]]:
        sums = [zeros(QUAD) for _ in self.rows]
        with T.serial(0, self.pieces) as piece:
            d = T.bind(T.Cast("int64", piece) * QUAD)
            keys = [self._staged("keys", (d + i) * BLOCK + self.side * QUAD) for i in range(QUAD)]
            self._multiply(sums, lambda m: self._query(self.first + m, d), keys)
        return [(m, self.side * QUAD + j, Cell(sums[m][j])) for m in range(len(self.rows)) for j in range(QUAD)]

    def values(self, weights: list[tuple[int, Any, Cell]]) -> None:
        for m in range(len(self.rows)):
            row = Few(QUAD)
            for j, weight in enumerate(weight for i, _, weight in weights if i == m):
                row.put(j, weight.v)
            at = [self._weight(self.first + m, self.side * QUAD)]
            T.buffer_store(self.memory, row.buffer[T.ramp(0, 1, QUAD)], at)
            for few in self.sums[m]:
                for i in range(QUAD):
                    few.put(i, few[i] * self.decay[m].v)
        warp_barrier()
        count = T.min(self.limit.v - self.cache.key0, T.int32(BLOCK))
        for piece in range(self.each):
            number = T.bind(self.side + piece * _SIDE)
            with T.If(number < self.pieces), T.Then():
                with T.serial(0, T.floordiv(count + (QUAD - 1), T.int32(QUAD))) as step:
                    k = T.bind(T.Cast("int64", step) * QUAD)
                    found = [self._staged("values", (k + i) * self.D + number * QUAD) for i in range(QUAD)]
                    by = lambda m, k=k: self._weight(self.first + m, k)  # type: ignore[misc]  # noqa: E731
                    self._multiply([s[piece] for s in self.sums], by, found)
        warp_barrier()

    def _multiply(self, sums: list[Few], left: Callable[[int], Any], right: list[Few]) -> None:
        """sums += left right: four of k, whose left sides lie side by side in shared memory."""
        for m, few in enumerate(sums):
            x = Few(QUAD)
            x.fill(self.memory[left(m)])
            for i, y in enumerate(right):
                for j in range(QUAD):
                    few.put(j, few[j] + x[i] * y[j])

    def store(self, norms: list[Cell]) -> None:
        for m, (row, norm) in enumerate(zip(self.rows, norms, strict=True)):
            with T.If(self.row0 + self.first + m < self.call.rows), T.Then():
                for piece, few in enumerate(self.sums[m]):
                    number = T.bind(self.side + piece * _SIDE)
                    with T.If(number < self.pieces), T.Then():
                        out = few.buffer[T.ramp(0, 1, QUAD)] * T.broadcast(norm.v, QUAD)
                        at = T.ramp(row.head * self.D + number * QUAD, 1, QUAD)
                        T.buffer_store(self.call.buffers["out"], out, [self.b, row.s, at])
