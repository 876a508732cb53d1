"""Prefill on tensor cores: `Prefill` with both products in bfloat16 or float16, summed in float32.

For workloads that may round. Queries stay in registers, where the products want them; of heads so wide that the sums
take those, in shared memory. Keys [D, 64] and values [64, D] are rounded in shared memory, as they lie: ldmatrix
transposes on the way. Weights are rounded as they are made, and summed before; the registers that a product left them
in are those that the next one takes.
"""

from __future__ import annotations

from typing import Any

from llmc.schedules.attention.cuda_cache import Few
from llmc.schedules.attention.cuda_masks import factor
from llmc.schedules.attention.cuda_prefill import QUAD, THREADS, Prefill
from llmc.schedules.attention.layout import BLOCK
from llmc.schedules.attention.workloads import AttentionWorkload
from llmc.targets.base import Target
from llmc.targets.cuda import SM80, CudaTarget
from llmc.targets.mma import ACCUMULATORS, COLUMNS, fragment_place, lane_of, load_matrices, multiply_add, pack
from llmc.targets.mma import ROWS as HEIGHT
from llmc.targets.threads import WARP, Cell, strided
from llmc.tvm_shim import T

LEAST_DIM, MOST_DIM = 16, 256
_MOST_IN_REGISTERS = 128  # dimensions of queries
_DEPTH = 16  # of one product
_PAD = 8  # elements behind a row: the eight rows that ldmatrix reads at once lie in different banks


def serves(w: AttentionWorkload, target: Target) -> bool:
    """May products round, and do tiles fit into a block's shared memory?"""
    assert isinstance(target, CudaTarget)
    return w.rounds and w.head_dim % COLUMNS == 0 and LEAST_DIM <= w.head_dim <= MOST_DIM


class MmaPrefill(Prefill):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.kind = "f16" if self.w.f16 else "bf16"
        self.steps = -(-self.D // _DEPTH)
        self.sums = [[Cell(T.float32(0)) for _ in range(ACCUMULATORS)] for _ in range(self.D // COLUMNS)]

    @classmethod
    def layout(cls, w: AttentionWorkload) -> tuple[dict[str, int], int]:
        """Without copies where they do not fit: the threads then round what they load."""
        depth = -(-w.head_dim // _DEPTH) * _DEPTH
        sizes = {"rounded_keys": depth * (BLOCK + _PAD) // 2, "rounded_values": BLOCK * (depth + _PAD) // 2}
        if w.head_dim > _MOST_IN_REGISTERS:
            sizes["queries"] = cls.height_of(w) * (depth + _PAD) // 2
        copies = {"keys": w.head_dim * BLOCK, "values": BLOCK * w.head_dim}
        if w.kv_cache == "float32" and 4 * sum((sizes | copies).values()) <= SM80.block_shared_bytes:
            sizes |= copies
        starts = {name: sum(list(sizes.values())[:i]) for i, name in enumerate(sizes)}
        return starts, sum(sizes.values())

    def own_rows(self) -> list[Any]:
        self.lane = T.bind(lane_of(self.thread))
        r, self.q = (T.bind(place) for place in fragment_place(self.lane))
        self.first = T.bind(T.floordiv(self.thread, T.int64(WARP)) * HEIGHT + r)
        return [self.first, self.first + HEIGHT // 2]

    @property
    def reach(self) -> list[int]:
        return [2, 1]

    def open(self) -> None:
        """The registers of each product's left side; zeros for the dimensions that keys and queries have not."""
        scale = T.float32(factor(self.w))
        self.queries = [[Cell(T.uint32(0), "uint32") for _ in range(4)] for _ in range(self.steps)]
        for step, registers in enumerate(self.queries):
            for half in range(2):
                d = step * _DEPTH + half * COLUMNS
                if d >= self.D:
                    continue
                for m, row in enumerate(self.rows):
                    pair = Few(2)
                    column = row.head * self.D + d + 2 * self.q
                    pair.fill(self.call.buffers["q"][self.b, row.s, T.ramp(column, 1, 2)])
                    pack(self.kind, registers[m + 2 * half], pair[0] * scale, pair[1] * scale)
        if "queries" in self.places:
            self._put_queries()
        if self.steps * _DEPTH > self.D:
            zero = T.broadcast(T.float32(0), QUAD)
            with strided(COLUMNS * BLOCK // 2 // QUAD, self.thread, THREADS) as at:
                d, pair = self.D + T.floordiv(at, T.int64(BLOCK // 8)), T.floormod(at, T.int64(BLOCK // 8)) * QUAD
                T.buffer_store(self.memory, zero, [T.ramp(self._key(d, 0) + pair, 1, QUAD)])
            with strided(BLOCK, self.thread, THREADS) as k:
                T.buffer_store(self.memory, zero, [T.ramp(self._value(k, self.D), 1, QUAD)])

    def _put_queries(self) -> None:
        """Registers to shared memory; there is a barrier before a product reads them."""
        for step, registers in enumerate(self.queries):
            for i, register in enumerate(registers):
                at = self._query(self.first + i % 2 * (HEIGHT // 2), step * _DEPTH + i // 2 * COLUMNS) + self.q
                T.buffer_store(self.memory, T.reinterpret("float32", register.v), [at])

    def _queries(self, step: int) -> list[Cell]:
        """The left side of a product of scores: four matrices of 8 rows and 8 dimensions."""
        if "queries" not in self.places:
            return self.queries[step]
        registers = [Cell(T.uint32(0), "uint32") for _ in range(4)]
        row = T.floordiv(self.thread, T.int64(WARP)) * HEIGHT + T.floormod(self.lane, T.int64(HEIGHT))
        half = T.floordiv(self.lane, T.int64(HEIGHT)) * (COLUMNS // 2)
        load_matrices(registers, self.memory[self._query(row, step * _DEPTH) + half])
        return registers

    def _query(self, row: Any, d: int) -> Any:
        return self.places["queries"] + row * ((self.steps * _DEPTH + _PAD) // 2) + d // 2

    def _key(self, d: Any, column: Any) -> Any:
        """Where in `memory` the pair of keys from `column` on begins, in dimension d."""
        return self.places["rounded_keys"] + d * ((BLOCK + _PAD) // 2) + self._half(column)

    def _value(self, k: Any, column: Any) -> Any:
        return self.places["rounded_values"] + k * ((self.steps * _DEPTH + _PAD) // 2) + self._half(column)

    @staticmethod
    def _half(column: Any) -> Any:
        return column // 2 if isinstance(column, int) else T.floordiv(column, T.int64(2))

    def put_keys(self, d: Any, column: Any, keys: Few) -> None:
        self._put(self._key(d, column), keys)

    def put_value(self, k: Any, column: Any, value: Few) -> None:
        self._put(self._value(k, column), value)

    def _put(self, at: Any, found: Few) -> None:
        """Four numbers of 16 bits take the place of two floats."""
        rounded = Few(2)
        for i in range(2):
            pair = Cell(T.uint32(0), "uint32")
            pack(self.kind, pair, found[2 * i], found[2 * i + 1])
            rounded.put(i, T.reinterpret("float32", pair.v))
        T.buffer_store(self.memory, rounded.buffer[T.ramp(0, 1, 2)], [T.ramp(at, 1, 2)])

    def scores(self) -> list[tuple[int, Any, Cell]]:
        tiles = [[Cell(T.float32(0)) for _ in range(ACCUMULATORS)] for _ in range(BLOCK // COLUMNS)]
        for step in range(self.steps):
            queries = self._queries(step)
            for column in range(0, BLOCK, 2 * COLUMNS):
                right = self._load(lambda d, c, step=step, column=column: self._key(step * _DEPTH + d, column + c))
                for n in range(2):
                    self._multiply(tiles[column // COLUMNS + n], queries, right[2 * n : 2 * n + 2])
        return [
            (h, n * COLUMNS + 2 * self.q + e, tile[2 * h + e])
            for n, tile in enumerate(tiles)
            for h in range(2)
            for e in range(2)
        ]

    def values(self, weights: list[tuple[int, Any, Cell]]) -> None:
        for tile in self.sums:
            for h in range(2):
                for e in range(2):
                    tile[2 * h + e].v = tile[2 * h + e].v * self.decay[h].v
        tiles = [[weight for _, _, weight in weights[n : n + 4]] for n in range(0, len(weights), 4)]
        for step in range(BLOCK // _DEPTH):
            left = [Cell(T.uint32(0), "uint32") for _ in range(4)]
            for half in range(2):
                for h in range(2):
                    low, high = tiles[2 * step + half][2 * h : 2 * h + 2]
                    pack(self.kind, left[h + 2 * half], low.v, high.v)
            for column in range(0, self.D, 2 * COLUMNS):
                right = self._load(lambda k, c, step=step, column=column: self._value(step * _DEPTH + k, column + c))
                for n in range(min(2, (self.D - column) // COLUMNS)):
                    self._multiply(self.sums[column // COLUMNS + n], left, right[2 * n : 2 * n + 2])

    def _load(self, place: Any) -> list[Cell]:
        """The registers of the right sides of two products: 16 rows and twice 8 columns; `place` of (row, column)."""
        registers = [Cell(T.uint32(0), "uint32") for _ in range(4)]
        row = T.floormod(self.lane, T.int64(_DEPTH))
        load_matrices(
            registers, self.memory[place(row, T.floordiv(self.lane, T.int64(_DEPTH)) * COLUMNS)], transposed=True
        )
        return registers

    def _multiply(self, sums: list[Cell], left: list[Cell], right: list[Cell]) -> None:
        multiply_add(self.kind, sums, [cell.v for cell in left], [cell.v for cell in right])

    def store(self, norms: list[Cell]) -> None:
        for h, (row, norm) in enumerate(zip(self.rows, norms, strict=True)):
            with T.If(self.row0 + self.first + h * (HEIGHT // 2) < self.call.rows), T.Then():
                for n, tile in enumerate(self.sums):
                    pair = Few(2)
                    for e in range(2):
                        pair.put(e, tile[2 * h + e].v * norm.v)
                    column = row.head * self.D + n * COLUMNS + 2 * self.q
                    T.buffer_store(
                        self.call.buffers["out"], pair.buffer[T.ramp(0, 1, 2)], [self.b, row.s, T.ramp(column, 1, 2)]
                    )
