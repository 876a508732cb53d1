"""Tensor cores and asynchronous copies of NVIDIA GPUs behind names: PTX for sm_80 and later.

All 32 threads of a warp come to every multiplication and every `load_matrices`. A thread's share of a matrix lies in
registers of 32 bits, two elements of 16 bits or four of 8 in each ("pack"), as the PTX ISA's tables ("Matrix Fragments
for mma") lay it down; with `lane` the thread's number in its warp, r = lane / 4 and q = lane % 4:

    A  16 rows, two halves of k: register h + 2 i has row r + 8 h, the elements pack q … pack (q + 1) of half i
    B   8 columns, two halves of k: register i has column r, the same elements of half i
    C  16 rows, 8 columns: register 2 h + e has row r + 8 h, column 2 q + e
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmc.targets.threads import WARP, Cell
from llmc.tvm_shim import T

ROWS, COLUMNS = 16, 8  # of one product
ACCUMULATORS = 4  # registers of C
COPIED = 16  # bytes that one thread copies at once


def depth(pack: int) -> int:
    """k of one product: 16 elements of 16 bits, 32 of 8."""
    return 8 * pack


def multiply_add(kind: str, c: Sequence[Cell], a: Sequence[Any], b: Sequence[Any]) -> None:
    """C += A B over one warp. `kind` "f16" and "bf16" sum in float32, "s8" and "s8u8" (B unsigned) in int32, whose
    cells are uint32 like all registers. a are 4 registers, b 2."""
    operands = [cell.v for cell in c]
    T.evaluate(T.ptx[_MULTIPLY[kind]](*operands, *a, *b, *operands))


_MULTIPLY = {
    "f16": "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
    "bf16": "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
    "e4m3": "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32",
    "s8": "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32",
    "s8u8": "mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32",
    "u8s8": "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32",
}


def load_matrices(registers: Sequence[Cell], row: Any, transposed: bool = False) -> None:
    """Four 8 x 8 matrices of 16-bit elements from shared memory, one into each register (ldmatrix). `row` is the
    element where this thread's row of 16 bytes begins: threads 8 i … 8 i + 7 name the rows of matrix i. A register
    holds row r,
    columns 2 q and 2 q + 1; `transposed` it holds column r, rows 2 q and 2 q + 1."""
    into = [cell.v for cell in registers]
    way = ".trans" if transposed else ""
    T.evaluate(T.ptx[f"ldmatrix.sync.aligned.m8n8.x4{way}.shared.b16"](*into, T.address_of(row)))


def pack_bf16(register: Cell, low: Any, high: Any) -> None:
    """register := two float32 rounded to bfloat16, to nearest, ties to even."""
    pack("bf16", register, low, high)


def pack(kind: str, register: Cell, low: Any, high: Any) -> None:
    """The same for "bf16" and "f16", whose largest number is 65504: beyond it infinity begins."""
    T.evaluate(T.ptx[f"cvt.rn.{kind}x2.f32"](register.v, high, low))


def pack_e4m3(low: Any, high: Any) -> Any:
    """Two float32 rounded to E4M3, ties to even, in the lower half of a uint32; beyond 448 is 448. From sm_89 on."""
    into = Cell(T.uint16(0), "uint16")
    T.evaluate(T.ptx["cvt.rn.satfinite.e4m3x2.f32"](into.v, high, low))
    return T.Cast("uint32", into.v)


def copy_async(to: Any, source: Any, valid: Any = None) -> None:
    """Begins to copy 16 bytes from global to shared memory, past the first cache. Where `valid` is given and false, the
    bytes become 0; `source` must be an address that may be named nevertheless."""
    operands = [T.address_of(to), T.address_of(source), T.int32(COPIED)]
    if valid is not None:
        operands.append(T.Cast("uint32", T.Select(valid, T.int32(COPIED), T.int32(0))))
    T.evaluate(T.ptx["cp.async.cg.shared.global"](*operands))


def commit_copies() -> None:
    """What this thread has begun to copy since the last call becomes one group."""
    T.evaluate(T.ptx["cp.async.commit_group"]())


def wait_copies(pending: int) -> None:
    """Waits until at most `pending` of this thread's groups are on their way. Other threads see the data behind a
    barrier."""
    T.evaluate(T.ptx["cp.async.wait_group"](T.int32(pending)))


def lane_of(thread: Any) -> Any:
    """A thread's number in its warp."""
    return T.floormod(thread, T.int64(WARP))


def fragment_place(lane: Any) -> tuple[Any, Any]:
    """(r, q) of the tables above."""
    return T.floordiv(lane, T.int64(4)), T.floormod(lane, T.int64(4))
