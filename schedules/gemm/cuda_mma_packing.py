"""Weights as tensor cores take them: each thread's share of a matrix is one load of 16 bytes.

The idea is MARLIN's (Frantar et al., arXiv:2408.11743) and QUICK's (Kim et al., arXiv:2402.10076): codes are laid out
in the order in which `llmc.targets.mma` wants them in registers, so that nothing is exchanged between threads on the
way.

A tile is 32 rows of the weight, four matrices B. A unit of it is as much k as one word of 32 bits holds codes for a
thread: `registers` registers of B.

    q      [tiles, units, 128] uint32: of every thread a word for each of the four matrices. Bits width i … of each
           element of a word (16 bits, or 8) are the code of register i. Where codes are looked up (`in_rows`),
           those of a register lie side by side instead: one instruction takes four of them
    scale  [tiles, groups, 32] float32 or float16, or the upper halves of float32: bfloat16; in the order q, j, e, where
           matrix j has them in column 2 q + e: the eight that a thread needs lie side by side
    zero   [tiles, groups, 32] float32: only where zero points differ between groups

With gate and up, the first two matrices of a tile are rows of the gate, the others the rows of up that go with them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmc.targets import mma

TILE = 32  # rows of the weight


@dataclass(frozen=True)
class FragmentLayout:
    """Where the weight [N, K] of codes with `width` bits goes, for registers of `pack` elements (`in_rows`: above)."""

    N: int
    K: int
    width: int
    pack: int
    halves: int
    in_rows: bool = False

    @property
    def registers(self) -> int:
        """Of B in one word."""
        return 32 // self.pack // self.width

    @property
    def unit(self) -> int:
        """k of one unit."""
        return self.registers * mma.depth(self.pack) // 2

    @property
    def step(self) -> int:
        """k that a warp takes at once: a row of x has then 128 bytes."""
        return 32 * self.pack

    @property
    def units(self) -> int:
        return -(-self.K // self.step) * self.step // self.unit

    @property
    def tiles(self) -> int:
        return -(-self.N // TILE) if self.halves == 1 else -(-self.N // 2 // (TILE // 2))

    def rows(self) -> np.ndarray:
        """int64 [tiles * 32]: the weight's row at every place, -1 where there is none."""
        width, columns = TILE // self.halves, self.N // self.halves
        column = np.arange(self.tiles * width).reshape(-1, 1, width)
        rows = np.where(column < columns, column + columns * np.arange(self.halves)[:, None], -1)
        return rows.reshape(-1)

    def pack_codes(self, codes: np.ndarray) -> np.ndarray:
        """q of codes [N, K], unsigned and below 2**width."""
        taken = self._rows_of(np.asarray(codes))
        taken = np.pad(taken, ((0, 0), (0, self.units * self.unit - self.K))).astype(np.uint32)
        # Row 8 j + r of a tile; k = ((unit, register), q, element).
        parts = taken.reshape(self.tiles, 4, 8, self.units, self.registers, 4, self.pack)
        register, element = np.arange(self.registers)[:, None], np.arange(self.pack)
        if self.in_rows:
            shifts = self.width * (self.pack * register + element)
        else:
            shifts = self.width * register + 32 // self.pack * element
        words = np.bitwise_or.reduce(
            parts.transpose(0, 3, 2, 5, 1, 4, 6) << shifts.astype(np.uint32), axis=(-2, -1)
        )  # [tiles, units, r, q, j]
        return np.ascontiguousarray(words.reshape(self.tiles, self.units, 128))

    def pack_plane(self, values: np.ndarray) -> np.ndarray:
        """[tiles, groups, 32] of values [N, groups], one for each row and group."""
        parts = self._rows_of(values).reshape(self.tiles, 4, 4, 2, values.shape[1])  # column 2 q + e of matrix j
        return np.ascontiguousarray(parts.transpose(0, 4, 2, 1, 3).reshape(self.tiles, values.shape[1], TILE))

    def _rows_of(self, values: np.ndarray) -> np.ndarray:
        rows = self.rows()
        taken = values[np.maximum(rows, 0)]
        taken[rows < 0] = 0
        return taken
