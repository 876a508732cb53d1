"""How a block of threads shares a product, and what each shape of it needs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from llmc.schedules.gemm.cuda_mma_packing import TILE, FragmentLayout
from llmc.targets import mma
from llmc.targets.threads import WARP
from llmc.tvm_shim import T

CHUNKS = 8  # of 16 bytes in the row of x that a warp takes in a step


def swizzled(chunk: Any, row: Any) -> Any:
    """Where a chunk of 16 bytes stands in its row of x: eight rows of one chunk, which a matrix is made of, and eight
    chunks of one row, which eight threads write, meet 32 different banks."""
    return chunk ^ (row & (CHUNKS - 1))


@dataclass(frozen=True)
class BlockTile:
    """A block makes `rows` rows by 32 `across` columns: its warps stand `down` x `across` over the product, and where
    few rows leave the GPU idle, `along` of them over one place, each with its own part of k (split-K inside a block).
    Weights are on their way `stages` - 1 steps ahead. Up to `split` blocks share the k of one place."""

    rows: int
    down: int
    across: int
    along: int
    stages: int
    split: int = 1

    def steps(self, layout: FragmentLayout, K: int) -> int:
        """Over all of k, of which a step of a block takes one of each warp that stands `along`."""
        return -(-K // (layout.step * self.along))

    @property
    def threads(self) -> int:
        return WARP * self.down * self.across * self.along

    @property
    def products(self) -> int:
        """Products of 16 rows that a warp makes of each matrix of its weight."""
        return self.rows // self.down // mma.ROWS

    def registers(self, layout: FragmentLayout, grouped: bool) -> int:
        """About how many a thread needs: sums (twice, where they are of groups), operands, staged x, addresses."""
        sums = self.products * 4 * mma.ACCUMULATORS * (2 if grouped else 1)
        staged = self.rows * self.along * CHUNKS * 4 * layout.pack // self.threads
        return sums + 4 * self.products + staged + 56

    def shared_bytes(self, layout: FragmentLayout, plane_bytes: int, groups: int) -> int:
        """Of a block, at most. `plane_bytes` of scales and zero points for each row of the weight, `groups` of them in
        a step of one warp."""
        x = 2 * self.along * (128 * self.rows + 4 * groups * (self.rows + WARP // CHUNKS))
        units = layout.step // layout.unit
        weights = self.stages * self.across * self.along * (units * 512 + groups * TILE * plane_bytes)
        sums = (self.along - 1) * self.rows * TILE * self.across * 4
        return x + weights + sums


@dataclass(frozen=True)
class Split:
    """How blocks share the k of one place: `parts` blocks of `share` steps each, the last one of fewer. Numbers, or
    what the host computes."""

    parts: Any
    share: Any

    @classmethod
    def even(cls, steps: int, wanted: Any) -> Split:
        """About `wanted` parts, none of them empty."""
        share = (steps + wanted - 1) // wanted if isinstance(wanted, int) else T.floordiv(wanted + (steps - 1), wanted)
        parts = (steps + share - 1) // share if isinstance(share, int) else T.floordiv(share + (steps - 1), share)
        return cls(parts, share)


# What adding parts up costs, in steps of a block: another launch, which `llmc.gpu.predict` puts at 1.6 us, where steps
# take 0.4 to 0.7 us. And what a block takes before its first step.
_MERGE, _BEGIN = 3, 1


def best_split(steps: int, places: int, multiprocessors: int, choices: Iterable[int]) -> int:
    """How many blocks should share the k of one place, where k takes `steps` one after another."""

    def cost(split: int) -> tuple[int, int]:
        of_block, waves = Split.even(steps, split).share + _BEGIN, -(-places * split // multiprocessors)
        return of_block * waves + (_MERGE if split > 1 else 0), split

    return min((split for split in choices if Split.even(steps, split).parts == split), key=cost)
