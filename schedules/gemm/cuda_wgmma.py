"""Linear layers by products of warpgroups (`cuda_wgmma_kernel`), for more rows than a few: Hopper alone has them. The
packed weights and the kernels for few rows are those of `cuda_mma`."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np

from llmc.errors import KernelError
from llmc.schedules.base import Config, Space, Workload
from llmc.schedules.gemm.cuda_f16 import MmaF16Linear
from llmc.schedules.gemm.cuda_fp8 import Fp8Block, MmaFp8Linear
from llmc.schedules.gemm.cuda_mma import HalfLinearWorkload, MmaBf16Linear, MmaLowBitLinear, MmaTemplate, tiles_of
from llmc.schedules.gemm.cuda_mma_kernel import plane_dtypes
from llmc.schedules.gemm.cuda_wgmma_fp8 import Fp8WgmmaKernel
from llmc.schedules.gemm.cuda_wgmma_kernel import WgmmaKernel
from llmc.schedules.gemm.cuda_wgmma_tile import WgmmaTile, parts_of
from llmc.schedules.gemm.packing import stored_dtype
from llmc.targets.base import Target
from llmc.targets.cuda import CudaTarget

_REPLACED = ("BM", "BN", "down", "stages")  # knobs of `cuda_mma` for many rows


class _WgmmaTemplate(MmaTemplate):
    """What the families share.

    Knobs: more than 16 rows go to blocks of `rows` rows of x by 128 `groups` rows of the weight, which is copied `ring`
    steps ahead; the others are `cuda_mma`'s.
    """

    body: type[WgmmaKernel] = WgmmaKernel

    def accepts(self, workload: Workload, target: Target) -> bool:
        if not isinstance(target, CudaTarget) or target.mcpu != "sm_90a":
            return False
        return super().accepts(workload, target)  # type: ignore[safe-super]  # the other base's

    def space(self, workload: Any, target: Target) -> Space:
        knobs = {k: v for k, v in super().space(workload, target).knobs.items() if k not in _REPLACED}
        knobs |= {"rows": (64, 128), "groups": (1, 2), "ring": (2, 3, 4)}
        return Space(knobs, lambda config: self._valid(config, workload, target))

    def default(self, workload: Any, target: Target) -> dict[str, int | str]:
        """The largest blocks for which there are registers, and the deepest ring that shared memory holds."""
        kept = {k: v for k, v in super().default(workload, target).items() if k not in _REPLACED}
        for rows, groups, ring in product((128, 64), (2, 1), (4, 3, 2)):
            config = {**kept, "rows": rows, "groups": groups, "ring": ring}
            if self._valid(config, workload, target):
                return config
        raise KernelError(f"{workload.key()} has no configuration", where=target.name)

    def build(self, workload: Any, target: Target, config: Config) -> Any:
        if not self.accepts(workload, target):
            raise KernelError(f"{workload.key()} is outside what {self.name} computes", where=target.name)
        assert isinstance(target, CudaTarget)
        decode, few, _ = tiles_of(_with_unused(config))
        layout, kind, tile = self.fragments(workload), self.kind(workload), _tile(config)
        return self.body(workload, target, (decode, few, tile), layout, kind, self.block).build()

    def _valid(self, config: Config, w: Any, target: Target) -> bool:
        assert isinstance(target, CudaTarget)
        if "rows" not in config:
            return super()._valid(config, w, target)
        layout, tile, planes, spans = self.fragments(w), _tile(config), 0, 0
        if parts_of(w):
            planes = sum(np.dtype(stored_dtype(dtype)).itemsize for dtype in plane_dtypes(w).values())
            spans = max(1, layout.step // getattr(w, "group_size", w.K))
        registers = tile.registers(layout, parts_of(w))
        fits = registers <= target.vector_registers and registers * tile.threads <= target.registers
        static, dynamic = tile.shared_bytes(layout, planes, spans)
        fits = fits and static <= target.static_shared_bytes and static + dynamic <= target.block_shared_bytes
        return fits and super()._valid(_with_unused(config), w, target)


class WgmmaLowBitLinear(_WgmmaTemplate, MmaLowBitLinear):
    """Template "lowbit_wgmma". With zero points of groups smaller than a step, sums of x do not fit into registers."""

    name = "lowbit_wgmma"

    def accepts(self, workload: Workload, target: Target) -> bool:
        if not super().accepts(workload, target) or not isinstance(workload, HalfLinearWorkload):
            return False
        return workload.symmetric or workload.group_size >= self.fragments(workload).step


class WgmmaBf16Linear(_WgmmaTemplate, MmaBf16Linear):
    """Template "bf16_wgmma"."""

    name = "bf16_wgmma"


class WgmmaF16Linear(_WgmmaTemplate, MmaF16Linear):
    """Template "f16_wgmma"."""

    name = "f16_wgmma"


class WgmmaFp8Linear(_WgmmaTemplate, MmaFp8Linear):
    """Template "fp8_wgmma"."""

    name = "fp8_wgmma"
    block, body = Fp8Block, Fp8WgmmaKernel


def _tile(config: Mapping[str, int | str]) -> WgmmaTile:
    rows, groups, ring, split = (int(config[knob]) for knob in ("rows", "groups", "ring", "split"))
    return WgmmaTile(rows, groups, ring, split)


def _with_unused(config: Config) -> dict[str, int | str]:
    """With some knobs for many rows that `cuda_mma` takes everywhere."""
    return {**config, "BM": 32, "BN": 64, "down": 1, "stages": 2}


WGMMA_LOWBIT, WGMMA_BF16, WGMMA_F16 = WgmmaLowBitLinear(), WgmmaBf16Linear(), WgmmaF16Linear()
WGMMA_FP8 = WgmmaFp8Linear()
