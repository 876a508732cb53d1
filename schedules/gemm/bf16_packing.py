"""The packed layout of bfloat16 weights: R = lanes output rows side by side, two k at a time.

    weight [blocks, pairs, 2R] uint16: element 2r + j of line i holds k = 2i + j of row r of the block

A line is one register, and a row of an AMX tile. K is padded with zeros to whole tiles, rows to whole 32s.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmc.schedules.gemm.packing import RowBlocks

_TILE = 32  # k in a tile
_ROWS = 4096  # rows that are rounded at a time: bounds the scratch


@dataclass(frozen=True)
class Bf16Layout(RowBlocks):
    """Where the elements of a [N, K] weight lie; `halves` as in `LowBitLayout`."""

    N: int
    K: int
    lanes: int
    halves: int = 1

    @property
    def padded_K(self) -> int:
        return -(-self.K // _TILE) * _TILE

    @property
    def weight_shape(self) -> tuple[int, int, int]:
        return self.blocks, self.padded_K // 2, 2 * self.lanes

    @property
    def label(self) -> str:
        """What tells this layout from another one of the same weight."""
        return f"bf16.{self.lanes}x{self.halves}"


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 -> the upper halves of the nearest bfloat16s, uint16; ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def from_bf16(halves: np.ndarray) -> np.ndarray:
    """The inverse: uint16 -> float32."""
    return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)


def pack_bf16(layout: Bf16Layout, weight: np.ndarray) -> np.ndarray:
    """weight [N, K] float32, of any strides -> [blocks, pairs, 2R] uint16."""
    rounded = np.zeros((layout.N, layout.padded_K), np.uint16)
    for first in range(0, layout.N, _ROWS):
        rounded[first : first + _ROWS, : layout.K] = round_to_bf16(weight[first : first + _ROWS])
    pairs = layout.arrange_rows(rounded).view(np.uint32).reshape(layout.blocks, layout.lanes, -1)
    return np.ascontiguousarray(pairs.transpose(0, 2, 1)).view(np.uint16)
