"""Quantisation of activations inside a kernel: int8, symmetric, one scale for each row and group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.targets.intrinsics import Simd
from llmc.tvm_shim import T

_UNROLL = 8  # registers of a group that are written out; longer groups loop
_TINY = 2.0**-100  # a group whose largest value is below this is zero: its inverse scale would overflow


@dataclass(frozen=True)
class Quantized:
    """Workspaces of M rows. q [M, padded_K] int8, scale [M, groups] float32 = max|x| / 127.

    `start` [M, groups] int32 = offset * sum(q) is where the dot products of a group begin, and `total` [M, groups]
    float32 = scale * sum(q) what a group's zero point is multiplied by; None where the format needs none.
    """

    q: Any
    scale: Any
    start: Any | None
    total: Any | None


@dataclass(frozen=True)
class Quantizer:
    """Emits the quantisation of rows of x [M, K] in groups of `group`; `offset` and `totals` say what `Quantized`
    holds beside codes and scales."""

    simd: Simd
    K: int
    group: int
    offset: int
    totals: bool

    @property
    def groups(self) -> int:
        return -(-self.K // self.group)

    def allocate(self, M: Any) -> Quantized:
        """Workspaces for M rows; M may be symbolic."""
        return Quantized(
            q=T.alloc_buffer((M, self.groups * self.group), "int8"),
            scale=T.alloc_buffer((M, self.groups), "float32"),
            start=T.alloc_buffer((M, self.groups), "int32") if self.offset else None,
            total=T.alloc_buffer((M, self.groups), "float32") if self.totals else None,
        )

    def row(self, x: Any, out: Quantized, m: Any) -> None:
        """Quantise row m of x."""
        full = self.K // self.group
        if full:
            with T.serial(0, full) as g:
                self._group(x, out, m, g, self.group)
        if self.K % self.group:
            self._group(x, out, m, full, self.K % self.group)

    def _group(self, x: Any, out: Quantized, m: Any, g: Any, width: int) -> None:
        """Quantise `width` values, pad the group with zeros."""
        simd, start = self.simd, g * self.group
        R, vectors = simd.lanes, width // simd.lanes
        high = simd.reg()
        high.v = simd.f32(0)

        def find(i: Any) -> None:
            high.v = T.max(high.v, T.abs(x[m, simd.span(start + i * R)]))

        self._repeat(vectors, find)
        largest = T.alloc_buffer((1,), "float32")
        T.buffer_store(largest, simd.reduce_max(high.v), [0])
        for k in range(vectors * R, width):
            T.buffer_store(largest, T.max(largest[0], T.abs(x[m, start + k])), [0])
        inverse = T.bind(T.if_then_else(largest[0] > T.float32(_TINY), T.float32(127) / largest[0], T.float32(0)))

        sums = simd.reg("int32")
        sums.v = simd.i32(0)

        def quantize(i: Any) -> None:
            at = simd.span(start + i * R)
            code = T.bind(T.Cast(f"int32x{R}", simd.round_even(x[m, at] * simd.splat(inverse))))
            T.buffer_store(out.q, T.Cast(f"int8x{R}", code), [m, at])
            sums.v = sums.v + code

        self._repeat(vectors, quantize)
        total = T.alloc_buffer((1,), "int32")
        T.buffer_store(total, simd.reduce_add_i32(sums.v), [0])
        with T.serial(vectors * R, width) as k:
            rounded = T.bind(T.Cast("int32", T.nearbyint(x[m, start + k] * inverse)))
            T.buffer_store(out.q, T.Cast("int8", rounded), [m, start + k])
            T.buffer_store(total, total[0] + rounded, [0])
        with T.serial(width, self.group) as k:
            T.buffer_store(out.q, T.int8(0), [m, start + k])
        scale = T.bind(largest[0] * T.float32(1 / 127))
        T.buffer_store(out.scale, scale, [m, g])
        if out.start is not None:
            T.buffer_store(out.start, total[0] * T.int32(self.offset), [m, g])
        if out.total is not None:
            T.buffer_store(out.total, scale * T.Cast("float32", total[0]), [m, g])

    @staticmethod
    def _repeat(count: int, body: Any) -> None:
        if count <= _UNROLL:
            for i in range(count):
                body(i)
        else:
            with T.serial(0, count) as i:
                body(i)


def quantize_reference(x: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """x [M, K] float32 -> codes [M, groups, group] and scales [M, groups] with the kernel's float32 arithmetic."""
    M, K = x.shape
    padded = np.pad(x.astype(np.float32), ((0, 0), (0, -K % group))).reshape(M, -1, group)
    largest = np.abs(padded).max(-1, initial=0)
    inverse = np.zeros_like(largest)
    np.divide(np.float32(127), largest, out=inverse, where=largest > np.float32(_TINY))
    return np.rint(padded * inverse[..., None]), largest * np.float32(1 / 127)
