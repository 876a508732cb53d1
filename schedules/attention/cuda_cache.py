"""What attention on a GPU sees of the cache: float32, a few neighbours at a time, whatever the format and the place.

A paged cache's pages are blocks: only where a block lies is different.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from llmc.schedules.attention import e4m3
from llmc.schedules.attention.call import Operands
from llmc.schedules.attention.kv_format import FORMATS
from llmc.schedules.attention.layout import BLOCK, span
from llmc.targets.threads import Cell
from llmc.tvm_shim import T


class Few:
    """`n` variables of one thread, filled by one load."""

    def __init__(self, n: int, dtype: str = "float32") -> None:
        self.n, self.buffer = n, T.alloc_buffer((n,), dtype, scope="local")

    def __getitem__(self, i: int) -> Any:
        return self.buffer[i]

    def fill(self, vector: Any) -> None:
        T.buffer_store(self.buffer, vector, [span(0, self.n)])

    def put(self, i: int, value: Any) -> None:
        T.buffer_store(self.buffer, value, [i])


def zeros(n: int) -> Few:
    few = Few(n)
    few.fill(T.float32(0) if n == 1 else T.broadcast(T.float32(0), n))
    return few


class DeviceCache(ABC):
    """Keys and values of key head `kv` of sequence `b`. A block is opened before it is read."""

    def __init__(self, call: Operands, b: Any, kv: Any) -> None:
        self.D, self.b, self.kv = call.w.head_dim, b, kv
        self.keys, self.values = call.buffers["kp"], call.buffers["v"]
        self.table = call.buffers.get("table")
        self.block = Cell(T.int32(0), "int32")
        self.page = Cell(T.int32(0), "int32")

    def open(self, block: Any) -> None:
        """`block` is an int32."""
        self.block.v = block
        if self.table is not None:
            self.page.v = self.table[self.b, T.Cast("int64", block)]

    @property
    def key0(self) -> Any:
        """The open block's first key, int32."""
        return self.block.v * BLOCK

    @property
    def here(self) -> list[Any]:
        """Leading indices of the open block in keys, values and planes."""
        if self.table is not None:
            return [T.Cast("int64", self.page.v), self.kv]
        return [self.b, self.kv, T.Cast("int64", self.block.v)]

    @abstractmethod
    def groups(self) -> list[range]:
        """Dimensions between which `open_keys` has to come again."""

    @abstractmethod
    def open_keys(self, dims: range, column: Any, n: int) -> None:
        """Goes before `read_keys` of these dimensions, of `n` keys from `column` of the block on."""

    @abstractmethod
    def read_keys(self, d: Any, column: Any, n: int) -> Few:
        """Dimension d of `n` keys."""

    @abstractmethod
    def read_value(self, k: Any, column: Any, n: int) -> Few:
        """`n` dimensions, of one group, of the value of key k of the block."""


def device_cache(call: Operands, b: Any, kv: Any) -> DeviceCache:
    return (PlainCache if call.w.kv_cache == "float32" else RoundedCache)(call, b, kv)


class PlainCache(DeviceCache):
    """float32: kp [B, KV, CB, D, 64] and v [B, KV, C, D]; paged, kp [pages, KV, D, 64] and v [pages, KV, 64, D]."""

    def groups(self) -> list[range]:
        return [range(self.D)]

    def open_keys(self, dims: range, column: Any, n: int) -> None:
        """There is nothing to know of them."""

    def read_keys(self, d: Any, column: Any, n: int) -> Few:
        found = Few(n)
        found.fill(self.keys[(*self.here, d, span(column, n))])
        return found

    def read_value(self, k: Any, column: Any, n: int) -> Few:
        found = Few(n)
        found.fill(self.values[(*self.value_row(k), span(column, n))])
        return found

    def value_row(self, k: Any) -> list[Any]:
        return [*self.here, k] if self.table is not None else [self.b, self.kv, T.Cast("int64", self.key0) + k]


class RoundedCache(DeviceCache):
    """The layout of `kv_format`."""

    def __init__(self, call: Operands, b: Any, kv: Any) -> None:
        super().__init__(call, b, kv)
        self.format, self.planes = FORMATS[call.w.kv_cache], call.buffers["planes"]
        self.narrow = BLOCK // self.format.per_byte  # bytes of a block's 64 tokens

    def groups(self) -> list[range]:
        return self.format.groups(self.D)

    def open_keys(self, dims: range, column: Any, n: int) -> None:
        rows = next(rows for group, *rows in self.format.plane_rows(self.D, values=False) if group == dims)
        self.of_keys = []
        for row in (row for row in rows if row >= 0):
            plane = Few(n)
            plane.fill(T.Cast(_vector("float32", n), self.planes[(*self.here, row, span(column, n))]))
            self.of_keys.append(plane)

    def read_keys(self, d: Any, column: Any, n: int) -> Few:
        at = column if self.format.per_byte == 1 else T.floormod(column, T.int64(self.narrow))
        codes = self._codes(self.keys[(*self.here, d, span(at, n))], column, n)
        found = Few(n)
        for i in range(n):
            found.put(i, self._widened(codes[i], [plane[i] for plane in self.of_keys]))
        return found

    def read_value(self, k: Any, column: Any, n: int) -> Few:
        at = k if self.format.per_byte == 1 else T.floormod(k, T.int64(self.narrow))
        codes = self._codes(self.values[(*self.here, at, span(column, n))], k, n)
        each, first = (1 if self.format.symmetric else 2), self.format.rows(self.D) // 2
        row = first + T.floordiv(column, T.int64(self.format.group or self.D)) * each
        planes = [Cell(T.Cast("float32", self.planes[(*self.here, row + i, k)])).v for i in range(each)]
        found = Few(n)
        for i in range(n):
            found.put(i, self._widened(codes[i], planes))
        return found

    def _codes(self, loaded: Any, token: Any, n: int) -> Few:
        """The codes in `n` bytes: in their halves for the first or the second half of a block's tokens, by `token`."""
        codes = Few(n, "int32")
        codes.fill(T.Cast(_vector("int32", n), loaded))
        if self.format.per_byte == 2:
            shift = T.Cast("int32", T.floordiv(token, T.int64(self.narrow))) * 4
            for i in range(n):
                codes.put(i, T.bitwise_and(T.shift_right(codes[i], shift), T.int32(15)))
        return codes

    def _widened(self, code: Any, planes: list[Any]) -> Any:
        """What a code stands for, by its scale, and its low where the format has one."""
        x = (e4m3.widened(code) if self.format.floats else T.Cast("float32", code)) * planes[0]
        return x if self.format.symmetric else x + planes[1]


def _vector(dtype: str, n: int) -> str:
    return dtype if n == 1 else f"{dtype}x{n}"
