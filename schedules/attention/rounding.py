"""Rounds a token's key and value as they enter a cache: the writing side of `kv_format`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any

from llmc.schedules.attention import e4m3
from llmc.schedules.attention.kv_format import FORMATS
from llmc.schedules.attention.layout import BLOCK, span, vectors
from llmc.schedules.attention.workloads import KVAppendWorkload
from llmc.targets.intrinsics import Simd
from llmc.tvm_shim import T

Load = Callable[[int, int], Any]  # (first column, width) -> vector of float32


class Rounding:
    """Emits the rounding of single tokens; `at` is [b, kv, block], `token` the place inside of the block."""

    def __init__(self, workload: KVAppendWorkload, simd: Simd, buffers: dict[str, Any]) -> None:
        self.D, self.simd, self.buffers = workload.head_dim, simd, buffers
        self.format = FORMATS[workload.kv_cache]
        self.narrow = BLOCK // self.format.per_byte  # tokens in the first half of the bytes; all of them in 8 bits

    def round_key(self, rows: Any, at: list[Any], token: Any) -> None:
        """Row `token` of `rows` [64, D] := its codes, as float32; the planes get their scales."""
        for c, n, codes in self.codes(lambda c, n: rows[token, span(c, n)], at, token, values=False):
            T.buffer_store(rows, codes, [token, span(c, n)])

    def put_key(self, code: Any, at: list[Any], d: Any, token: Any) -> None:
        """One dimension of a key that `round_key` has rounded."""
        self.put("kp", code, [*at, d, self.place(token)], token, 1)

    def put_value(self, load: Load, at: list[Any], token: Any) -> None:
        """A token's value, rounded; the planes get its scales."""
        for c, n, codes in self.codes(load, at, token, values=True):
            self.put("v", codes, [*at, self.place(token), span(c, n)], token, n)

    def codes(self, load: Load, at: list[Any], token: Any, values: bool) -> Iterator[tuple[int, int, Any]]:
        """(first column, width, codes as float32) of a token's vectors. All are loaded before the first is given."""
        simd, f = self.simd, self.format
        for dims, scale_row, low_row in f.plane_rows(self.D, values):
            n, starts = vectors(len(dims), simd.lanes)
            xs = {dims.start + c: T.bind(load(dims.start + c, n)) for c in starts}
            if f.symmetric:
                reach = self.largest(T.abs(x) for x in xs.values())
            else:
                least = T.float32(0) - self.largest(simd.f32(0, n) - x for x in xs.values())
                low = self.plane(least, [*at, low_row, token])
                reach = self.largest(xs.values()) - low
                xs = {c: x - simd.splat(low, n) for c, x in xs.items()}
            scale = self.plane(reach / T.float32(f.highest), [*at, scale_row, token])
            inverse = T.bind(T.Select(scale > T.float32(0), T.float32(1) / scale, T.float32(0)))
            for c, x in xs.items():
                scaled = x * simd.splat(inverse, n)
                scaled = scaled if f.floats else simd.round_even(scaled)
                code = T.bind(T.min(T.max(scaled, simd.f32(f.lowest, n)), simd.f32(f.highest, n)))
                yield c, n, T.bind(e4m3.rounded_number(code, n)) if f.floats else code

    def largest(self, xs: Any) -> Any:
        """The largest lane of some vectors."""
        return self.simd.reduce_max(reduce(T.max, xs))

    def plane(self, x: Any, index: list[Any]) -> Any:
        """Put a scale or a low into the planes; returns what they hold of it."""
        stored = T.bind(T.Cast(self.format.planes, x))
        T.buffer_store(self.buffers["planes"], stored, index)
        return T.bind(T.Cast("float32", stored))

    def place(self, token: Any) -> Any:
        """Which byte of a block's 64 or 32 holds a token."""
        return token if self.format.per_byte == 1 else token % self.narrow

    def put(self, name: str, codes: Any, index: list[Any], token: Any, n: int) -> None:
        """Codes (whole numbers in float32) into `n` bytes of a buffer, or into the halves that are the token's."""
        buffer, simd = self.buffers[name], self.simd
        wide, narrow = (dtype if n == 1 else f"{dtype}x{n}" for dtype in ("int32", self.format.dtype))
        x = T.Cast(wide, codes)
        if self.format.per_byte == 2:
            high = T.bind(T.Cast("int32", token // self.narrow))
            others = simd.splat(T.Select(high == 1, T.int32(15), T.int32(240)), n)
            moved = x * simd.splat(1 + 15 * high, n)
            x = T.bitwise_or(T.bitwise_and(T.Cast(wide, buffer[tuple(index)]), others), moved)
        T.buffer_store(buffer, T.Cast(narrow, x), index)
