"""Quantisation of activations inside a kernel: int8, symmetric, one scale for each row and group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.targets.intrinsics import Simd
from llmc.tvm_shim import T

_UNROLL = 8  # registers of a group that are written out; longer groups loop
_TINY = 2.0**-100  # a group whose largest value is below this is zero: its inverse scale would overflow
# Adding 1.5 * 2**23 rounds a float32 of magnitude below 2**22 to the nearest integer, ties to even, and leaves that
# integer in the low bits: rounding and conversion in one addition.
_ROUND, _ROUND_BITS = 1.5 * 2**23, 0x4B400000


@dataclass(frozen=True)
class Quantized:
    """Workspaces of M rows. q [M, stride] int8, stride >= padded_K; the others [M, groups up to whole registers].

    `scale` float32 is max|x| / 127 of the group. `start` int32 = offset * sum(q) is where the dot products of a group
    begin, `total` float32 = scale * sum(q) what its zero point is multiplied by; None where the format needs none.
    """

    q: Any
    scale: Any
    start: Any | None
    total: Any | None


@dataclass(frozen=True)
class Quantizer:
    """Emits the quantisation of rows of x [M, K] in groups of `group`, a multiple of 16 unless there is one group.

    `offset` and `totals` say what `Quantized` holds beside codes and scales. Groups are taken a register's lanes at
    a time: their maxima, reciprocals and sums are then lanes of one register, and no step is scalar.
    """

    simd: Simd
    K: int
    group: int
    offset: int
    totals: bool

    def allocate(self, M: Any) -> Quantized:
        """Workspaces for M rows; M may be symbolic."""
        R, (full, rest) = self.simd.lanes, self._split()
        plane = M, _round_up(full, R) + (R if rest else 0)  # the last group's registers start anywhere
        return Quantized(
            q=T.alloc_buffer((M, _odd_lines(full * self.group + (_round_up(self.group, R) if rest else 0))), "int8"),
            scale=T.alloc_buffer(plane, "float32"),
            start=T.alloc_buffer(plane, "int32") if self.offset else None,
            total=T.alloc_buffer(plane, "float32") if self.totals else None,
        )

    def _split(self) -> tuple[int, int]:
        """Groups that are read as they are, and k behind them, which need padding."""
        return divmod(self.K, self.group) if self.group % self.simd.lanes == 0 else (0, self.K)

    def row(self, x: Any, out: Quantized, m: Any) -> None:
        """Quantise row m of x."""
        R, (full, rest) = self.simd.lanes, self._split()
        batches, left = divmod(full, R)

        def load(k: Any) -> Any:
            return x[m, self.simd.span(k)]

        if batches:
            with T.serial(0, batches) as b:
                self._batch(load, out, m, b * R, R)
        if left:
            self._batch(load, out, m, batches * R, left)
        if rest:
            first = full * self.group
            padded = self._padded_tail(x, m, first)
            self._batch(lambda k: padded[self.simd.span(k - first)], out, m, full, 1)

    def _padded_tail(self, x: Any, m: Any, first: int) -> Any:
        """The values from `first` on, followed by zeros up to a whole group."""
        R, width = self.simd.lanes, self.K - first
        size = _round_up(self.group, R)
        padded = T.alloc_buffer((size,), "float32")
        with T.serial(0, width // R) as i:
            T.buffer_store(padded, x[m, self.simd.span(first + i * R)], [self.simd.span(i * R)])
        with T.serial(width // R, size // R) as i:
            T.buffer_store(padded, self.simd.f32(0), [self.simd.span(i * R)])
        for k in range(width // R * R, width):
            T.buffer_store(padded, x[m, first + k], [k])
        return padded

    def _batch(self, load: Callable[[Any], Any], out: Quantized, m: Any, first: Any, count: int) -> None:
        """Groups first to first + count, count <= lanes."""
        simd, R = self.simd, self.simd.lanes
        vectors = _round_up(self.group, R) // R
        maxima, sums = T.alloc_buffer((count, R), "float32"), T.alloc_buffer((count, R), "int32")
        inverses = T.alloc_buffer((R,), "float32")
        with T.serial(0, count) as i:
            high = simd.reg()
            high.v = simd.f32(0)

            def find(j: Any, i: Any = i, high: Any = high) -> None:
                high.v = T.max(high.v, T.abs(load((first + i) * self.group + j * R)))

            _repeat(vectors, find)
            T.buffer_store(maxima, high.v, [i, simd.span(0)])
        largest = T.bind(simd.reduce_rows(T.max, [maxima[i, simd.span(0)] for i in range(count)]))
        inverse = T.Select(largest > simd.f32(_TINY), simd.f32(127) / largest, simd.f32(0))
        T.buffer_store(inverses, inverse, [simd.span(0)])
        with T.serial(0, count) as i:
            inverse = T.bind(simd.splat(inverses[i]))
            bits = simd.reg("int32")
            bits.v = simd.i32(0)

            def quantize(j: Any, i: Any = i, inverse: Any = inverse, bits: Any = bits) -> None:
                k = (first + i) * self.group + j * R
                code = T.bind(T.reinterpret(f"int32x{R}", simd.fma(load(k), inverse, simd.f32(_ROUND))))
                T.buffer_store(out.q, T.Cast(f"int8x{R}", code), [m, simd.span(k)])
                bits.v = bits.v + code

            _repeat(vectors, quantize)
            T.buffer_store(sums, bits.v, [i, simd.span(0)])
        at = [m, simd.span(first)]
        scale = T.bind(largest * simd.f32(1 / 127))
        T.buffer_store(out.scale, scale, at)
        if out.start is None and out.total is None:
            return
        surplus = vectors * R * _ROUND_BITS % 2**32  # sums wrap, and so does their surplus
        sum_ = simd.reduce_rows(lambda a, b: a + b, [sums[i, simd.span(0)] for i in range(count)])
        sum_ = T.bind(sum_ - simd.i32(surplus - 2**32 if surplus >= 2**31 else surplus))
        if out.start is not None:
            T.buffer_store(out.start, sum_ * simd.i32(self.offset), at)
        if out.total is not None:
            T.buffer_store(out.total, scale * T.Cast(f"float32x{R}", sum_), at)


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def _odd_lines(size: int) -> int:
    """At least `size` bytes, as an odd number of cache lines: rows at such a distance never share a cache set."""
    return _round_up(size, 128) + (64 if size % 128 == 0 or size % 128 > 64 else -64)


def _repeat(count: int, body: Callable[[Any], None]) -> None:
    if count <= _UNROLL:
        for i in range(count):
            body(i)
    else:
        with T.serial(0, count) as i:
            body(i)


def quantize_reference(x: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """x [M, K] float32 -> codes [M, groups, group] and scales [M, groups] with the kernel's arithmetic: float32, but
    for the product that is rounded to a code, which a fused multiply-add does not round before (float64 holds it)."""
    M, K = x.shape
    padded = np.pad(x.astype(np.float32), ((0, 0), (0, -K % group))).reshape(M, -1, group)
    largest = np.abs(padded).max(-1, initial=0)
    inverse = np.zeros_like(largest)
    np.divide(np.float32(127), largest, out=inverse, where=largest > np.float32(_TINY))
    return np.rint(padded.astype(np.float64) * inverse[..., None]), largest * np.float32(1 / 127)
