"""Products of warpgroups in E4M3 (`cuda_wgmma_kernel`): x is rounded by the largest magnitude of its row, as `cuda_fp8`
does it, and both scales come on the finished sums."""

from __future__ import annotations

from typing import Any

from llmc.schedules.gemm.cuda_fp8 import Fp8Kernel, four_codes
from llmc.schedules.gemm.cuda_wgmma_kernel import WgmmaBlock, WgmmaKernel


class Fp8WgmmaBlock(WgmmaBlock):
    """As `WgmmaBlock`, for x in E4M3."""

    k: Fp8WgmmaKernel

    def _prepare(self) -> None:
        self.inverse = [self.k.inverse(self.first_row + self._x_place(item)[0]) for item in range(self.items)]

    def _rounded(self, item: int, at: int) -> Any:
        return four_codes([self.held[at + e] for e in range(4)], self.inverse[item])

    def _of_column(self, row: Any) -> Any:
        return self.k.scale(row)


class Fp8WgmmaKernel(WgmmaKernel, Fp8Kernel):
    """As `Fp8Kernel`, for many rows."""

    many = Fp8WgmmaBlock
