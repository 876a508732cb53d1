"""How a block of threads shares a product, and what each shape of it needs."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.schedules.gemm.cuda_mma_packing import TILE, FragmentLayout
from llmc.targets import mma
from llmc.targets.threads import WARP


@dataclass(frozen=True)
class BlockTile:
    """A block makes `rows` rows by 32 `across` columns: its warps stand `down` x `across` over the product, and where
    few rows leave the GPU idle, `along` of them over one place, each with its own part of k (split-K inside a block).
    Weights are on their way `stages` - 1 steps ahead."""

    rows: int
    down: int
    across: int
    along: int
    stages: int

    @property
    def threads(self) -> int:
        return WARP * self.down * self.across * self.along

    @property
    def products(self) -> int:
        """Products of 16 rows that a warp makes of each matrix of its weight."""
        return self.rows // self.down // mma.ROWS

    def shared_bytes(self, layout: FragmentLayout, plane_bytes: int, groups: int) -> int:
        """`plane_bytes` of scales and zero points for each row, `groups` of them in a step of one warp."""
        x = 2 * self.rows * 128 * self.along
        units = layout.step // layout.unit
        weights = self.stages * self.across * self.along * (units * 512 + groups * TILE * plane_bytes)
        sums = (self.along - 1) * self.rows * TILE * self.across * 4
        return x + weights + sums
