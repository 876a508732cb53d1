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
