"""AMX tiles behind names, for the bodies of kernel templates.

A thread has eight tiles, registers of up to 16 rows of up to 64 bytes. A product c += a b reads 32 bits of a and b at a
time, which are four bytes or two bfloat16 that are neighbours in k: a [M, 4q + j], b [q, 4n + j], c [M, n].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmc.targets.intrinsics import effect
from llmc.tvm_shim import T

ROWS, ROW_BYTES = 16, 64  # of the largest tile


def configure(shapes: Mapping[int, tuple[Any, int]]) -> None:
    """Give tiles their shapes, {tile: (rows, bytes of a row)}, and empty them. Rows may be known at run time only.

    Tiles belong to a thread: every parallel task configures, and releases, its own.
    """
    config = T.alloc_buffer((64,), "uint8")
    T.buffer_store(config, T.broadcast(T.uint8(0), 64), [T.ramp(0, 1, 64)])
    T.buffer_store(config, T.uint8(1), [0])  # the palette of these tiles
    for tile, (rows, row_bytes) in shapes.items():
        T.buffer_store(config, T.uint8(row_bytes), [16 + 2 * tile])
        T.buffer_store(config, T.Cast("uint8", rows), [48 + tile])
    effect("llvm.x86.ldtilecfg", T.address_of(config[0]))


def release() -> None:
    """Give the tiles back: what they held need no longer be kept when the system switches threads."""
    effect("llvm.x86.tilerelease")


def zero(tile: int) -> None:
    effect("llvm.x86.tilezero", T.int8(tile))


def load(tile: int, first: Any, stride: int) -> None:
    """From rows that lie `stride` bytes apart, the first at the buffer element `first`."""
    effect("llvm.x86.tileloadd64", T.int8(tile), T.address_of(first), T.int64(stride))


def store(tile: int, first: Any, stride: int) -> None:
    """To rows that lie `stride` bytes apart, the first at the buffer element `first`."""
    effect("llvm.x86.tilestored64", T.int8(tile), T.address_of(first), T.int64(stride))


def dot_bytes(c: int, a: int, b: int, signs: str) -> None:
    """c += a b in int32, exactly; `signs` "su": bytes of a are signed, those of b are not."""
    effect(f"llvm.x86.tdpb{signs}d", T.int8(c), T.int8(a), T.int8(b))


def dot_bf16(c: int, a: int, b: int) -> None:
    """c += a b in float32, where a and b are bfloat16: even and odd k are summed apart, denormals are zero."""
    effect("llvm.x86.tdpbf16ps", T.int8(c), T.int8(a), T.int8(b))


def to_bf16(x: Any, n: int) -> Any:
    """`n` float32 as bfloat16: their bits, uint16."""
    return T.Cast("uint16" if n == 1 else f"uint16x{n}", T.shift_right(_rounded(x, n), _all(16, n)))


def pairs(low: Any, high: Any | None, n: int) -> Any:
    """`n` pairs of bfloat16, uint32, of float32 that are neighbours in k: a row of a right operand. Without `high` the
    second of each pair is zero."""
    first = T.shift_right(_rounded(low, n), _all(16, n))
    return first if high is None else T.bitwise_or(first, T.bitwise_and(_rounded(high, n), _all(0xFFFF0000, n)))


def _rounded(x: Any, n: int) -> Any:
    """uint32, of which the upper halves are `n` float32 rounded to bfloat16, ties to even."""
    bits = T.bind(T.reinterpret("uint32" if n == 1 else f"uint32x{n}", x))
    odd = T.bitwise_and(T.shift_right(bits, _all(16, n)), _all(1, n))
    return T.bind(bits + _all(0x7FFF, n) + odd)


def _all(value: int, n: int) -> Any:
    return T.uint32(value) if n == 1 else T.broadcast(T.uint32(value), n)
