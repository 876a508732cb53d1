"""Linear layers on tensor cores, y = act(x W^T + bias) + residual: weights of few bits, x rounded to float16."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.schedules.base import Arrays, Config, Space, Workload
from llmc.schedules.gemm.cuda_mma_kernel import MmaKernel
from llmc.schedules.gemm.cuda_mma_packing import FragmentLayout
from llmc.schedules.gemm.cuda_mma_tile import BlockTile
from llmc.schedules.gemm.lowbit import LowBitLinear, LowBitLinearWorkload
from llmc.targets.base import Target
from llmc.targets.cuda import CudaTarget
from llmc.tvm_shim import IRBuilder  # noqa: F401


@dataclass(frozen=True)
class HalfLinearWorkload(LowBitLinearWorkload):
    """As `LowBitLinearWorkload`, with x rounded to float16; sums are float32."""

    @property
    def kernel_name(self) -> str:
        return f"linear_w{self.bits}a16"


class MmaLinear(LowBitLinear):
    """Template "lowbit_mma". Weights in: weight, a `QuantizedWeight`; bias [N]. Packed: `cuda_mma_packing`; bias [N].

    Knobs: more than 16 rows go to blocks of BM rows by BN columns, whose warps stand `down` over one another; up to 16
    rows to blocks of 32 columns, whose `along` warps share k. Weights are copied `stages` - 1 steps ahead.
    """

    name = "lowbit_mma"
    serves = HalfLinearWorkload

    def accepts(self, workload: Workload, target: Target) -> bool:
        if type(workload) is not self.serves or target.kind != "cuda":
            return False
        w = workload
        step = self._layout(w).step
        grouped = w.group_size < w.K
        # A scale is constant over a product, and changes at the same places in every step.
        fits = not grouped or (w.group_size % 16 == 0 and (step % w.group_size == 0 or w.group_size % step == 0))
        zero = not w.symmetric or (float(w.zero).is_integer() and 0 <= w.zero < 1024)
        return w.bits > 1 and w.K % 4 == 0 and fits and zero and w.activations == "a32"

    def space(self, workload: Any, target: Target) -> Space:
        assert isinstance(target, CudaTarget)

        def valid(config: Config) -> bool:
            many = self._tiles(config)[1]
            if many.rows % (16 * many.down) or not 1 <= many.products <= 4:
                return False
            return all(self._fits(tile, workload, target) for tile in self._tiles(config))

        return Space(
            {"BM": (32, 64, 128), "BN": (64, 128), "down": (1, 2, 4), "along": (2, 4, 8), "stages": (2, 3, 4)}, valid
        )

    def default(self, workload: Any, target: Target) -> dict[str, int | str]:
        stages = 4 if workload.bits <= 4 else 3
        return {"BM": 64, "BN": 128, "down": 2, "along": 4, "stages": stages}

    def prepack(self, weights: Mapping[str, Any], workload: Any, config: Config, target: Target) -> Arrays:
        layout, weight = self._layout(workload), weights["weight"]
        packed = {"q": layout.pack_codes(np.asarray(weight.q)).reshape(layout.tiles, layout.units, -1)}
        scale = layout.pack_plane(np.asarray(weight.scale, np.float32))
        if workload.scale_dtype == "bfloat16":
            packed["scale"] = (scale.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
        else:
            packed["scale"] = scale.astype(workload.scale_dtype)
        if not workload.symmetric:
            zero = np.broadcast_to(np.asarray(weight.zero, np.float32), weight.scale.shape)
            packed["zero"] = layout.pack_plane(zero)
        if workload.bias:
            packed["bias"] = np.asarray(weights["bias"], np.float32).reshape(-1)
        return packed

    def layout(self, workload: Any, config: Config, target: Target) -> str:
        layout = self._layout(workload)
        return f"mma.{layout.width}.{layout.pack}.{layout.halves}.{workload.scale_dtype}.{workload.symmetric}"

    def build(self, workload: Any, target: Target, config: Config) -> Any:
        return MmaKernel(workload, target, self._tiles(config), self._layout(workload), "f16").build()

    def _products(self, workload: Any, inputs: Mapping[str, np.ndarray], weight: Any) -> np.ndarray:
        rounded = np.asarray(inputs["x"], np.float16).astype(np.float32)
        return super()._products(workload, {**inputs, "x": rounded}, weight)

    def _layout(self, w: Any) -> FragmentLayout:
        return FragmentLayout(w.N, w.K, 4 if w.bits == 3 else w.bits, 2, w.halves)

    def _tiles(self, config: Config) -> tuple[BlockTile, BlockTile]:
        BM, BN, down, along, stages = (int(config[k]) for k in ("BM", "BN", "down", "along", "stages"))
        return BlockTile(16, 1, 1, along, stages), BlockTile(BM, down, BN // 32, 1, stages)

    def _fits(self, tile: BlockTile, w: Any, target: CudaTarget) -> bool:
        return True


MMA_LOWBIT = MmaLinear()
