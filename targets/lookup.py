"""Sums of bytes looked up in tables of sixteen, a table in every 128 bits of a register (vpshufb)."""

from __future__ import annotations

from typing import Any

from llmc.targets.intrinsics import Simd, pure
from llmc.tvm_shim import T


def look_up(simd: Simd, tables: Any, codes: Any) -> Any:
    """A register of bytes: in each 128 bits, table[code] of the 16 int8 that `tables` has there; codes are below 16."""
    n = 4 * simd.lanes
    name = "llvm.x86.avx512.pshuf.b.512" if simd.lanes == 16 else "llvm.x86.avx2.pshuf.b"
    return pure(name, tables, T.reinterpret(f"int8x{n}", codes), dtype=f"int8x{n}")


def weigh_pairs(simd: Simd, weights: tuple[int, int], values: Any) -> Any:
    """int16 [2 * lanes]: of every two neighbouring int8, the sum with these weights, which are unsigned bytes.

    Exact as long as it fits int16.
    """
    n = 2 * simd.lanes
    pair = T.reinterpret(f"uint8x{2 * n}", T.broadcast(T.int16(weights[0] | weights[1] << 8), n))
    name = "llvm.x86.avx512.pmaddubs.w.512" if simd.lanes == 16 else "llvm.x86.avx2.pmadd.ub.sw"
    return pure(name, pair, values, dtype=f"int16x{n}")


def alternate(simd: Simd, even: Any, odd: Any) -> Any:
    """A register of bytes whose even bytes are those of `even`, and whose odd ones those of `odd`."""
    n = 2 * simd.lanes
    low, high = (T.broadcast(T.uint16(mask), n) for mask in (0x00FF, 0xFF00))
    words = [T.reinterpret(f"uint16x{n}", each) for each in (even, odd)]
    return T.reinterpret(f"int8x{2 * n}", T.bitwise_or(T.bitwise_and(words[0], low), T.bitwise_and(words[1], high)))
