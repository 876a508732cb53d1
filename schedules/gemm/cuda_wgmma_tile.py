"""How a block of warpgroups shares a product (`cuda_wgmma_kernel`), and what each shape of it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmc.schedules.gemm.cuda_mma_packing import TILE, FragmentLayout
from llmc.schedules.gemm.cuda_mma_tile import CHUNKS
from llmc.targets import wgmma
from llmc.targets.threads import WARP

_TILES = wgmma.GROUP // WARP  # of a warpgroup


@dataclass(frozen=True)
class WgmmaTile:
    """A block makes `rows` rows of x by 128 `groups` rows of the weight. Weights are copied `stages` steps ahead. Up to
    `split` blocks share the k of one place."""

    rows: int
    groups: int
    stages: int
    split: int

    @property
    def across(self) -> int:
        """Tiles of the weight."""
        return _TILES * self.groups

    @property
    def threads(self) -> int:
        return wgmma.GROUP * self.groups

    def steps(self, layout: FragmentLayout, K: int) -> int:
        return -(-K // layout.step)

    def registers(self, layout: FragmentLayout, parts: int) -> int:
        """About how many a thread needs: sums, `parts` more of one group, with sums of x where it is one; operands,
        staged x, addresses."""
        sums = self.rows // 2 * (2 + parts + (parts == 1))
        staged = self.rows * CHUNKS * 4 * layout.pack // self.threads
        return sums + 32 + staged + 40

    def shared_bytes(self, layout: FragmentLayout, plane_bytes: int, spans: int) -> tuple[int, int]:
        """(static, dynamic) of a block. `plane_bytes` of scales and zero points for each row of the weight, `spans` of
        them in a step."""
        slots = self.stages * self.across
        x = 2 * self.rows * (128 + 4 * spans)
        return x + slots * (spans * TILE * plane_bytes + 8), slots * layout.step // layout.unit * 512


def parts_of(workload: Any) -> int:
    """How many products have sums of one group, or step, apart; none where those of whole rows are enough."""
    if not getattr(workload, "symmetric", True):
        return 1
    # Tensor cores add up products of E4M3 with fewer bits than float32's (DeepSeek-AI, arXiv:2412.19437, 3.3.2).
    apart = getattr(workload, "group_size", workload.K) < workload.K or workload.activations == "fp8"
    return 2 if apart else 0
