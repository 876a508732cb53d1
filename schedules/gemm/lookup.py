"""Weights as bit planes that look up sums of activations (T-MAC, Wei et al., arXiv:2407.00088): layout and arithmetic.

A code's bits as signs, s = 2 bit - 1, make it (sum over planes p of 2**p s[p] + 2**bits - 1) / 2. What a row of the
weight does with a quad of k, four neighbours, is then for each plane one of 16 sums of their activations with signs:
four bits of the plane are its number. These sums are computed once for all rows, and rounded to int8 with one scale
for the quads of a group.

The plane q has the shape that `packing` gives it, and as many bytes. A unit is 8 quads in `bits` lines; every byte is
two numbers, the second in its upper half:

    planes 2i, 2i + 1   lines 2i and 2i + 1: byte 2 (R q + r) + p of line 2i + h holds plane 2i + p of row r, for the
                        quads 4h + q and 4h + 2 + q
    an odd plane        its last line: byte 2 (R q + r) + s holds the quads 2s + q and 4 + 2s + q of row r

so that 128 bits of a line belong to one table, or to two whose results alternate.
"""

from __future__ import annotations

import numpy as np

from llmc.schedules.formats import PackedCodes, QuantizedWeight
from llmc.schedules.gemm.packing import LowBitLayout

UNIT = 32  # k of a unit
TINY = 2.0**-100  # a group without sums above this is zero: its inverse scale would overflow
# SIGNS[j, n]: sign of the j-th activation of a quad in the n-th of its sums
SIGNS = np.where(np.arange(16) >> np.arange(4)[:, None] & 1, 1.0, -1.0).astype(np.float32)


def representable(layout: LowBitLayout) -> bool:
    """Whole units to a group, and nothing behind K."""
    return layout.bits <= 4 and layout.group % UNIT == 0 and layout.padded_K == layout.K


def place(bits: int, quad: int, p: int) -> tuple[int, int, int]:
    """Where a unit has plane p of a quad: the line, which of two neighbouring bytes, and which half of them."""
    if p == bits - 1 and bits % 2:
        return p, quad // 2 % 2, quad // 4
    return p // 2 * 2 + quad // 4, p % 2, quad // 2 % 2


def pack_lookup(layout: LowBitLayout, codes: np.ndarray | PackedCodes) -> np.ndarray:
    """codes [N, K] uint8, or as files pack them -> the plane q."""
    bits, R, units = layout.bits, layout.lanes, layout.group // UNIT
    rows = layout.arrange_rows(np.asarray(codes))
    quads = rows.reshape(layout.blocks, R, layout.groups, units, 8, 4).transpose(0, 2, 3, 4, 1, 5)
    q = np.zeros((layout.blocks, layout.groups, units, bits, 2, R, 2), np.uint8)
    for p in range(bits):
        numbers = _numbers(quads, p)
        for quad in range(8):
            line, byte, half = place(bits, quad, p)
            q[:, :, :, line, quad % 2, :, byte] |= numbers[:, :, :, quad] << np.uint8(4 * half)
    return q.reshape(layout.q_shape)


def _numbers(quads: np.ndarray, p: int) -> np.ndarray:
    """codes [..., 4] -> the number that bit plane p of four of them makes, uint8 [...]."""
    return (quads >> np.uint8(p) & np.uint8(1)) @ np.array([1, 2, 4, 8], np.uint8)


def tables_reference(x: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """x [M, K] float32 -> tables [M, groups, quads, 16] of integers and scales [M, groups] float32, with the kernel's
    arithmetic: float32 sums in order, but for the product that is rounded to an integer (float64 holds it)."""
    quads = x.astype(np.float32).reshape(len(x), -1, group // 4, 4)
    sums = quads[..., :1] * SIGNS[0]
    for j in range(1, 4):
        sums = sums + quads[..., j : j + 1] * SIGNS[j]
    largest = np.abs(sums).max((-1, -2))
    inverse = np.zeros_like(largest)
    np.divide(np.float32(127), largest, out=inverse, where=largest > np.float32(TINY))
    return np.rint(sums.astype(np.float64) * inverse[..., None, None]), largest * np.float32(1 / 127)


def lookup_reference(x: np.ndarray, weight: QuantizedWeight) -> np.ndarray:
    """x [M, K] float32 times the weight's transpose, [M, N] float64: integers are looked up and summed exactly."""
    group = weight.group_size
    tables, scale = tables_reference(x, group)
    codes = np.asarray(weight.q).reshape(weight.N, -1, group // 4, 4)
    numbers = np.stack([_numbers(codes, p) for p in range(weight.bits)])  # [bits, N, groups, quads]
    groups, quads = np.indices(codes.shape[1:3])
    planes = 2.0 ** np.arange(weight.bits)
    integers = np.stack([np.tensordot(planes, table[groups, quads, numbers].sum(-1), 1) for table in tables])
    totals = x.astype(np.float64).reshape(len(x), -1, group).sum(-1)
    centre = (2**weight.bits - 1) / 2 - np.broadcast_to(np.asarray(weight.zero, np.float64), weight.scale.shape)
    sums = integers * (scale[:, None].astype(np.float64) / 2) + centre * totals[:, None]
    return (sums * weight.scale).sum(-1)
