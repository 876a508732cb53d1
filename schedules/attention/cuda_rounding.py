"""Rounds keys and values as they enter a cache, on a GPU: the writing side of `kv_format`.

A block of threads fills what a call brings to one block of the cache. A warp takes a token, its lanes the dimensions;
tokens that share bytes are one warp's, one after the other, so that no two threads write to a byte.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from llmc.schedules.attention import e4m3
from llmc.schedules.attention.kv_format import FORMATS
from llmc.schedules.attention.layout import BLOCK
from llmc.schedules.attention.workloads import KVAppendWorkload
from llmc.targets.threads import WARP, Cell, warp_reduce
from llmc.tvm_shim import T

THREADS = 128
_LOWEST = -3.4e38

Load = Callable[[Any, Any], Any]  # the float32 of a token of the call, at a dimension


def _key_byte(j: Any, d: Any) -> tuple[str, list[Any]]:
    return "kp", [d, j]


def _value_byte(j: Any, d: Any) -> tuple[str, list[Any]]:
    return "v", [j, d]


class DeviceRounding:
    """Of one call: which threads round which tokens."""

    def __init__(self, workload: KVAppendWorkload, buffers: dict[str, Any], symbols: dict[str, Any]) -> None:
        self.D, self.buffers, self.symbols = workload.head_dim, buffers, symbols
        self.format = FORMATS[workload.kv_cache]
        self.narrow = BLOCK // self.format.per_byte  # bytes of a block's 64 tokens

    def block(self, thread: Any, place: list[Any], key0: Any, start: Any, key: Load, value: Load) -> None:
        """The tokens of the call, of which the first has position `start`, that belong to the block which begins at
        position `key0` and lies at `place`."""
        self.lane, warp = (T.bind(f(thread, T.int64(WARP))) for f in (T.floormod, T.floordiv))
        warps = THREADS // WARP
        with T.serial(0, self.narrow // warps) as step:
            j = T.bind(T.Cast("int64", step) * warps + warp)
            for half in range(self.format.per_byte):
                token = T.bind(j + half * self.narrow)
                s = T.bind(key0 + token - start)
                with T.If(T.And(s >= 0, s < self.symbols["S"])), T.Then():
                    of_key, of_value = partial(key, s), partial(value, s)
                    self._vector(place, token, half, of_key, partial(_key_byte, j), False)
                    self._vector(place, token, half, of_value, partial(_value_byte, j), True)

    def _vector(
        self,
        place: list[Any],
        token: Any,
        half: int,
        load: Callable[[Any], Any],
        byte: Callable[[Any], tuple[str, list[Any]]],
        values: bool,
    ) -> None:
        """A token's key, or its value: planes, and codes where `byte` says."""
        f = self.format
        for dims, scale_row, low_row in f.plane_rows(self.D, values):
            own = [T.bind(dims.start + self.lane + i * WARP) for i in range(-(-len(dims) // WARP))]
            xs = [Cell(T.float32(0)) for _ in own]
            most, least = Cell(T.float32(_LOWEST)), Cell(T.float32(-_LOWEST))
            for d, x in zip(own, xs, strict=True):
                with T.If(d < dims.stop), T.Then():
                    x.v = load(d)
                    most.v = T.max(most.v, T.abs(x.v) if f.symmetric else x.v)
                    least.v = T.min(least.v, x.v)
            warp_reduce(most, T.max)
            low = Cell(T.float32(0))
            if not f.symmetric:
                warp_reduce(least, T.min)
                low.v = self._plane(least.v, [*place, low_row, token])
            scale = Cell(self._plane((most.v - low.v) / T.float32(f.highest), [*place, scale_row, token]))
            inverse = Cell(T.Select(scale.v > T.float32(0), T.float32(1) / scale.v, T.float32(0)))
            for d, x in zip(own, xs, strict=True):
                with T.If(d < dims.stop), T.Then():
                    scaled = (x.v - low.v) * inverse.v
                    scaled = scaled if f.floats else T.nearbyint(scaled)
                    code = T.min(T.max(scaled, T.float32(f.lowest)), T.float32(f.highest))
                    code = e4m3.rounded(Cell(code).v) if f.floats else T.Cast("int32", code)
                    name, at = byte(d)
                    self._put(name, Cell(code, "int32").v, [*place, *at], half)

    def _plane(self, x: Any, index: list[Any]) -> Any:
        """Put a scale or a low into the planes; returns what they hold of it."""
        stored = Cell(T.Cast(self.format.planes, x), self.format.planes)
        with T.If(self.lane == 0), T.Then():
            T.buffer_store(self.buffers["planes"], stored.v, index)
        return Cell(T.Cast("float32", stored.v)).v

    def _put(self, name: str, code: Any, index: list[Any], half: int) -> None:
        """A code into its byte, or into its half of one."""
        buffer = self.buffers[name]
        if self.format.per_byte == 2:
            others = T.bitwise_and(T.Cast("int32", buffer[tuple(index)]), T.int32(15 if half else 240))
            code = T.bitwise_or(others, T.shift_left(code, T.int32(4 * half)))
        T.buffer_store(buffer, T.Cast(self.format.dtype, code), index)
