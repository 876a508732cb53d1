"""The packed layout of low-bit weights, shared by the linear that multiplies with them and the embedding that looks
rows up in them.

R = lanes output rows lie side by side, a group of k at a time:

    q      [blocks, groups, lines, 4R] uint8: byte 4r + j of a line holds, for row r of the block, codes of k = 4i + j.
           A unit is as few lines as hold whole codes: one line with the p-th of its quads i in the p-th lowest `bits`
           of every byte; 3-bit codes fill three (`_THREE`)
    scale  [blocks, groups, R] float32 or float16, or the upper halves of float32: bfloat16
    zero   [blocks, groups, R] float32 or float16, -zero * scale: only where zero points differ between groups

A line is one register, a row block one stream of consecutive bytes. K is padded to whole groups with codes 0. Rows
are padded to a multiple of 32, so that every plane's size is a multiple of 64 bytes and 32/R blocks are always there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llmc.errors import KernelError
from llmc.schedules.formats import PackedCodes, QuantizedWeight

_ROWS = 32  # padding of N
_ROUNDING = 2.0**-22  # relative error of a float32 product of two rounded float32 values


@dataclass(frozen=True)
class Piece:
    """Bits of a code: `width` bits of line `line` of a unit, from bit `start` of a byte, are its bits from `at`."""

    line: int
    start: int
    width: int
    at: int

    @property
    def steps(self) -> int:
        """Instructions that bring it into place: a mask, and a shift before."""
        return 1 + (self.start != self.at)


# Eight 3-bit codes in the same byte of three lines. Two whole codes go into each byte, and the two bits that each has
# left make two codes more: 17 instructions take eight registers of codes apart (with AVX-512, which selects bits of
# two registers and masks them in two), where a plane of two bits and one of one bit would take 29. The low pairs of
# bits lie where they need no shift.
_THREE = (
    (Piece(0, 2, 3, 0),),
    (Piece(0, 5, 3, 0),),
    (Piece(1, 2, 3, 0),),
    (Piece(1, 5, 3, 0),),
    (Piece(2, 0, 3, 0),),
    (Piece(2, 3, 3, 0),),
    (Piece(0, 0, 2, 0), Piece(2, 6, 1, 2)),
    (Piece(1, 0, 2, 0), Piece(2, 7, 1, 2)),
)


class RowBlocks:
    """The N rows of a weight in blocks of `lanes`. `halves` = 2 alternates blocks of the first N/2 rows with blocks of
    the others."""

    N: int
    lanes: int
    halves: int

    @property
    def used_blocks(self) -> int:
        """Row blocks that hold rows of the weight."""
        return self.halves * -(-self.N // self.halves // self.lanes)

    @property
    def blocks(self) -> int:
        unit = _ROWS // self.lanes
        return -(-self.used_blocks // unit) * unit

    def arrange_rows(self, rows: np.ndarray) -> np.ndarray:
        """[N, ...] -> [blocks * lanes, ...] in the layout's order, missing rows zero."""
        per_half = self.N // self.halves
        width = self.used_blocks // self.halves * self.lanes
        arranged = np.zeros((self.blocks * self.lanes, *rows.shape[1:]), rows.dtype)
        view = arranged[: self.used_blocks * self.lanes].reshape(-1, self.halves, self.lanes, *rows.shape[1:])
        for half in range(self.halves):
            part = rows[half * per_half : (half + 1) * per_half]
            if per_half < width:
                part = np.concatenate([part, np.zeros((width - per_half, *rows.shape[1:]), rows.dtype)])
            view[:, half] = part.reshape(-1, self.lanes, *rows.shape[1:])
        return arranged

    def restore_rows(self, arranged: np.ndarray) -> np.ndarray:
        """The inverse of `arrange_rows`."""
        view = arranged[: self.used_blocks * self.lanes].reshape(-1, self.halves, self.lanes, *arranged.shape[1:])
        halves = [view[:, h].reshape(-1, *arranged.shape[1:])[: self.N // self.halves] for h in range(self.halves)]
        return np.concatenate(halves)


@dataclass(frozen=True)
class LowBitLayout(RowBlocks):
    """Where the codes of a [N, K] weight of one format lie. `halves` = 2 alternates blocks of the first N/2 rows
    (the gate of silu_mul) with blocks of the others (up)."""

    N: int
    K: int
    bits: int
    group_size: int
    lanes: int
    halves: int = 1

    @property
    def unit_lines(self) -> int:
        return 3 if self.bits == 3 else 1

    @property
    def unit_quads(self) -> int:
        """Quads of k, four neighbours, in a unit."""
        return 8 * self.unit_lines // self.bits

    def pieces(self, p: int) -> tuple[Piece, ...]:
        """Where the codes of a unit's p-th quad lie."""
        return _THREE[p] if self.bits == 3 else (Piece(0, self.bits * p, self.bits, 0),)

    @property
    def unpack_steps(self) -> float:
        """Instructions that it takes to make one register of codes."""
        return sum(piece.steps for p in range(self.unit_quads) for piece in self.pieces(p)) / self.unit_quads

    @property
    def group(self) -> int:
        """k of one scale, padding included; a single group is as long as whole units need."""
        unit = 4 * self.unit_quads
        return self.group_size if self.group_size < self.K else -(-self.K // unit) * unit

    @property
    def groups(self) -> int:
        return -(-self.K // self.group)

    @property
    def padded_K(self) -> int:
        return self.groups * self.group

    @property
    def units(self) -> int:
        """In one group of one row block."""
        return self.group // (4 * self.unit_quads)

    @property
    def lines(self) -> int:
        """Registers full of bytes in one group of one row block."""
        return self.units * self.unit_lines

    @property
    def q_shape(self) -> tuple[int, int, int, int]:
        return self.blocks, self.groups, self.lines, 4 * self.lanes

    @property
    def plane_shape(self) -> tuple[int, int, int]:
        return self.blocks, self.groups, self.lanes

    @property
    def label(self) -> str:
        """What tells this layout from another one of the same weight."""
        return f"lowbit.{self.bits}.{self.group}.{self.lanes}x{self.halves}"

    def representable(self) -> bool:
        """Can this layout hold the format at all: whole units and registers to a group?"""
        return (
            self.bits in (1, 2, 3, 4, 8)
            and self.N % self.halves == 0
            and min(self.N, self.K, self.group_size) > 0
            and (self.groups == 1 or self.group % max(16, 4 * self.unit_quads) == 0)
        )


def pack_codes(layout: LowBitLayout, codes: np.ndarray | PackedCodes) -> np.ndarray:
    """codes [N, K] uint8, or as files pack them -> the plane q."""
    if codes.shape != (layout.N, layout.K):
        raise KernelError(f"codes of shape {codes.shape} do not fit a weight of {(layout.N, layout.K)}")
    rows = layout.arrange_rows(np.asarray(codes))
    if layout.padded_K != layout.K:
        rows = np.pad(rows, ((0, 0), (0, layout.padded_K - layout.K)))
    # Four codes move as one uint32: shifts and masks never let one byte's bits into the next.
    quads = np.ascontiguousarray(rows).view(np.uint32)
    quads = quads.reshape(layout.blocks, layout.lanes, layout.groups, layout.units, layout.unit_quads)
    packed = np.zeros((layout.blocks, layout.groups, layout.units, layout.unit_lines, layout.lanes), np.uint32)
    for p in range(layout.unit_quads):
        for piece in layout.pieces(p):
            bits = quads[..., p].transpose(0, 2, 3, 1)
            if piece.width < layout.bits:
                bits = bits >> np.uint32(piece.at) & _repeated(piece.width)
            packed[:, :, :, piece.line] |= bits << np.uint32(piece.start)
    return packed.view(np.uint8).reshape(layout.q_shape)


def unpack_codes(layout: LowBitLayout, q: np.ndarray) -> np.ndarray:
    """The inverse of `pack_codes`: [N, K] uint8."""
    lines = q.view(np.uint32).reshape(layout.blocks, layout.groups, layout.units, layout.unit_lines, layout.lanes)
    lines = lines.transpose(3, 0, 4, 1, 2)
    quads = np.zeros((*lines.shape[1:], layout.unit_quads), np.uint32)
    for p in range(layout.unit_quads):
        for piece in layout.pieces(p):
            bits = lines[piece.line] >> np.uint32(piece.start) & _repeated(piece.width)
            quads[..., p] |= bits << np.uint32(piece.at)
    rows = quads.reshape(layout.blocks * layout.lanes, -1).view(np.uint8)
    return layout.restore_rows(rows)[:, : layout.K]


def _repeated(width: int) -> np.uint32:
    """The lowest `width` bits of each of four bytes."""
    return np.uint32(0x01010101 * (2**width - 1))


def pack_plane(layout: LowBitLayout, values: np.ndarray, dtype: str = "float32", tolerance: float = 0.0) -> np.ndarray:
    """values [N, groups] -> [blocks, groups, lanes] of `dtype`.

    bfloat16 is stored as the upper halves of float32, uint16. Raises KernelError where `dtype` does not hold all of
    them within `tolerance`, relative.
    """
    held = _is_bfloat16(values) if dtype == "bfloat16" else _holds(values.astype(dtype), values, tolerance)
    if not held:
        raise KernelError(f"scales are not exactly representable as {dtype}", hint="keep them as float32")
    cast = _upper_halves(values) if dtype == "bfloat16" else values.astype(dtype)
    rows = layout.arrange_rows(cast.reshape(layout.N, layout.groups))
    return np.ascontiguousarray(rows.reshape(layout.blocks, layout.lanes, layout.groups).transpose(0, 2, 1))


def unpack_plane(layout: LowBitLayout, plane: np.ndarray) -> np.ndarray:
    """The inverse of `pack_plane`: [N, groups]."""
    rows = plane.transpose(0, 2, 1).reshape(layout.blocks * layout.lanes, layout.groups)
    return layout.restore_rows(rows)


def pack_weight(
    layout: LowBitLayout,
    weight: QuantizedWeight,
    scale_dtype: str,
    symmetric: bool,
    zero_dtype: str = "float32",
    pack: Callable[[LowBitLayout, np.ndarray | PackedCodes], np.ndarray] = pack_codes,
) -> dict[str, np.ndarray]:
    """The planes q (as `pack` makes it), scale and, if not symmetric, zero, in the order of the kernels' parameters."""
    planes = {"q": pack(layout, weight.q), "scale": pack_plane(layout, weight.scale, scale_dtype)}
    if not symmetric:
        planes["zero"] = pack_plane(layout, _shifts(weight), zero_dtype, _ROUNDING)
    return planes


def _shifts(weight: QuantizedWeight) -> np.ndarray:
    """-zero * scale, [N, groups] float32."""
    return (-np.asarray(weight.zero) * weight.scale).astype(np.float32)


def common_zero(weight: QuantizedWeight) -> float | None:
    """The zero point of the whole weight. None where groups differ, and where it is fractional: integer sums cannot
    start there, so that it is stored as if groups differed."""
    zero = weight.zero
    return None if isinstance(zero, np.ndarray) or not float(zero).is_integer() else float(zero)


def smallest_scale_dtype(scale: np.ndarray) -> str:
    """float16 or bfloat16 where it holds every scale exactly, else float32."""
    if _holds(_half(scale), scale):
        return "float16"
    return "bfloat16" if _is_bfloat16(scale) else "float32"


def stored_dtype(dtype: str) -> str:
    """The dtype of a plane's array: NumPy has no bfloat16."""
    return "uint16" if dtype == "bfloat16" else dtype


def smallest_zero_dtype(weight: QuantizedWeight) -> str:
    """float16 where it holds every -zero * scale to within that product's own rounding in float32.

    Zero points recovered from a minimum, as in GGML's Q4_1, are such: the product gives the float16 minimum back.
    """
    shifts = _shifts(weight)
    return "float16" if _holds(_half(shifts), shifts, _ROUNDING) else "float32"


def _is_bfloat16(values: np.ndarray) -> bool:
    return not np.any(np.ascontiguousarray(values, np.float32).view(np.uint32) & np.uint32(0xFFFF))


def _upper_halves(values: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def _half(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return values.astype(np.float16)


def _holds(cast: np.ndarray, values: np.ndarray, tolerance: float = 0.0) -> bool:
    return bool(np.all(np.abs(cast.astype(np.float32) - values) <= tolerance * np.abs(values)))
