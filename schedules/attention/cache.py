"""What attention's body sees of the cache: float32 keys and values, wherever they come from.

A float32 cache is read where it lies. A rounded one is widened, a block at a time, into scratch that stays in the
core's own caches. That is done once for all rows of a task: a twentieth of the work in prefill; in decode it hides
behind the memory. Where a block lies, a paged cache's table says ("PagedAttention", Kwon et al., 2023); a page is one
block, so that nothing else changes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import product
from typing import TYPE_CHECKING, Any

from llmc.schedules.attention import e4m3
from llmc.schedules.attention.kv_format import FORMATS
from llmc.schedules.attention.layout import BLOCK, span, vectors
from llmc.tvm_shim import T

if TYPE_CHECKING:
    from llmc.schedules.attention.call import Call

LINE = 64  # bytes of a cache line


class Cache(ABC):
    """Keys and values of key head `kv` of sequence `b`.

    With `ahead` what is read next is prefetched: worth it where keys and values stream from memory and serve few rows.
    """

    def __init__(self, call: Call, b: Any, kv: Any, ahead: bool) -> None:
        self.D, self.simd, self.ahead = call.w.head_dim, call.simd, ahead
        self.keys, self.values = call.buffers["kp"], call.buffers["v"]
        self.b, self.kv = b, kv
        self.paged = call.w.paged
        self.table: Any = call.buffers.get("table")
        self.here: list[Any] = []  # leading indices of the open block, and of the one after it
        self.next: list[Any] = []

    def open_keys(self, block: Any) -> None:
        """Goes before the block's keys are read."""
        self.here, self.next = self.place(block), self.place(block + 1)

    def place(self, block: Any) -> list[Any]:
        """Leading indices of a block in keys, values and planes. The last block has none after it: itself stands in."""
        if not self.paged:
            return [self.b, self.kv, block]
        page = self.table[self.b, T.min(block, self.table.shape[1] - 1)]
        return [T.bind(T.Cast("int64", page)), self.kv]

    def open_values(self, block: Any) -> None:  # noqa: B027 - nothing to do where it is not overridden
        """Goes before the block's values are read."""

    @abstractmethod
    def key(self, block: Any, d: Any, column: Any) -> Any:
        """Dimension d of a register of the block's keys, from `column` on."""

    @abstractmethod
    def value(self, key0: Any, k: Any, column: int, n: int) -> Any:
        """`n` dimensions, from `column` on, of the value of key k of the block that starts at `key0`."""

    def fetch_values(self, block: Any, d: Any) -> None:  # noqa: B027 - nothing to do where it is not overridden
        """In step d of the scores, ask for the d-th part of the block's values: they are next."""

    def fetch_keys(self, block: Any, k: Any) -> None:  # noqa: B027 - nothing to do where it is not overridden
        """In step k of the values, ask for the k-th part of the next block's keys."""


def cache_of(call: Call, b: Any, kv: Any, ahead: bool) -> Cache:
    return (PlainCache if call.w.kv_cache == "float32" else RoundedCache)(call, b, kv, ahead)


class PlainCache(Cache):
    """float32: kp [B, KV, CB, D, 64] and v [B, KV, C, D]; paged, kp [pages, KV, D, 64] and v [pages, KV, 64, D]."""

    def key(self, block: Any, d: Any, column: Any) -> Any:
        return self.keys[(*self.here, d, self.simd.span(column))]

    def value(self, key0: Any, k: Any, column: int, n: int) -> Any:
        return self.values[(*self.row(key0, k), self.simd.span(column, n))]

    def row(self, key0: Any, k: Any) -> list[Any]:
        """Indices of the value of key k of the open block, which starts at key0."""
        return [*self.here, k] if self.paged else [self.b, self.kv, key0 + k]

    def fetch_values(self, block: Any, d: Any) -> None:
        if not self.ahead:
            return
        for column in range(0, BLOCK, LINE // 4):
            at = d * BLOCK + column
            self.simd.prefetch(self.values[(*self.row(block * BLOCK, at // self.D), at % self.D)])

    def fetch_keys(self, block: Any, k: Any) -> None:
        if not self.ahead:
            return
        rows = -(-self.D // BLOCK)
        for r, column in product(range(rows), range(0, BLOCK, LINE // 4)):
            self.simd.prefetch(self.keys[(*self.next, k * rows + r, column)])


class RoundedCache(Cache):
    """The layout of `kv_format`. `scratch` holds the keys of the open block [D, 64], then its values [64, D]."""

    def __init__(self, call: Call, b: Any, kv: Any, ahead: bool) -> None:
        super().__init__(call, b, kv, ahead)
        self.planes = call.buffers["planes"]
        self.format = FORMATS[call.w.kv_cache]
        self.narrow = BLOCK // self.format.per_byte  # tokens in the first half of the bytes; all of them in 8 bits
        self.scratch = T.alloc_buffer((self.D * BLOCK,), "float32")

    def key(self, block: Any, d: Any, column: Any) -> Any:
        return self.scratch[self.simd.span(d * BLOCK + column)]

    def value(self, key0: Any, k: Any, column: int, n: int) -> Any:
        return self.scratch[self.simd.span(k * self.D + column, n)]

    def open_keys(self, block: Any) -> None:
        """Lanes are tokens: a register of scales serves all dimensions of a group."""
        super().open_keys(block)
        simd = self.simd
        for dims, *rows in self.format.plane_rows(self.D, values=False):
            for column in range(0, self.narrow, simd.lanes):
                tokens = range(column, BLOCK, self.narrow)
                planes = [self.plane(rows, span(t, simd.lanes), simd.lanes) for t in tokens]
                with T.serial(0, len(dims)) as i:
                    d = dims.start + i
                    if self.ahead and column == 0:
                        self.fetch(self.values, self.here, d * self.narrow)
                    codes = T.bind(self.keys[(*self.here, d, simd.span(column))])
                    for half, (token, plane) in enumerate(zip(tokens, planes, strict=True)):
                        x = self.widened(codes, half, plane, simd.lanes)
                        T.buffer_store(self.scratch, x, [simd.span(d * BLOCK + token)])

    def open_values(self, block: Any) -> None:
        """Lanes are dimensions: a scale is read for every token and group."""
        simd = self.simd
        if self.ahead:
            self.fetch_planes()
        with T.serial(0, self.narrow) as j:
            if self.ahead:
                for r in range(-(-self.D // BLOCK)):
                    self.fetch(self.keys, self.next, (j * -(-self.D // BLOCK) + r) * LINE)
            tokens = [j + half * self.narrow for half in range(self.format.per_byte)]
            for dims, *rows in self.format.plane_rows(self.D, values=True):
                planes = [self.plane(rows, t, 1) for t in tokens]
                n, starts = vectors(len(dims), simd.lanes)
                for c in (dims.start + start for start in starts):
                    codes = T.bind(self.values[(*self.here, j, span(c, n))])
                    for half, (token, plane) in enumerate(zip(tokens, planes, strict=True)):
                        x = self.widened(codes, half, [simd.splat(y, n) for y in plane], n)
                        T.buffer_store(self.scratch, x, [span(token * self.D + c, n)])

    def plane(self, rows: list[int], tokens: Any, n: int) -> list[Any]:
        """Scale, and low where the format has one, of `n` tokens."""
        planes = [self.planes[(*self.here, row, tokens)] for row in rows if row >= 0]
        return [T.bind(T.Cast(_vector("float32", n), p)) for p in planes]

    def widened(self, codes: Any, half: int, plane: list[Any], n: int) -> Any:
        """What the codes in one half of `n` bytes stand for."""
        x = T.Cast(_vector("int32", n), codes)
        if self.format.per_byte == 2:
            x = T.shift_right(x, self.simd.i32(4, n)) if half else T.bitwise_and(x, self.simd.i32(15, n))
        x = e4m3.widened(x, n) if self.format.floats else T.Cast(_vector("float32", n), x)
        return x * plane[0] if self.format.symmetric else self.simd.fma(x, plane[0], plane[1], n)

    def fetch(self, codes: Any, place: list[Any], byte: Any) -> None:
        self.simd.prefetch(codes[(*place, 0, byte)])

    def fetch_planes(self) -> None:
        """Those of the next block."""
        for row, column in product(range(self.format.rows(self.D)), range(0, BLOCK, LINE // self.planes_bytes)):
            self.simd.prefetch(self.planes[(*self.next, row, column)])

    @property
    def planes_bytes(self) -> int:
        return 4 if self.format.planes == "float32" else 2


def _vector(dtype: str, n: int) -> str:
    return dtype if n == 1 else f"{dtype}x{n}"
