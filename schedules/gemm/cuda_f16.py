"""Linear layers on tensor cores with weights and x in float16."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmc.schedules.base import Arrays, Config, Workload
from llmc.schedules.gemm.cuda_mma import MmaTemplate, packed_bias
from llmc.schedules.gemm.cuda_mma_packing import FragmentLayout
from llmc.schedules.gemm.f16 import F16Linear, F16LinearWorkload, round_to_f16
from llmc.targets.base import Target


class MmaF16Linear(MmaTemplate, F16Linear):
    """Template "f16_mma". Weights in: weight [N, K] float32 or float16, bias [N]. Packed: q of `cuda_mma_packing`, bias
    [N]."""

    name = "f16_mma"

    def accepts(self, workload: Workload, target: Target) -> bool:
        if not isinstance(workload, F16LinearWorkload) or target.kind != "cuda":
            return False
        return workload.activations == "f16"

    def fragments(self, workload: Any) -> FragmentLayout:
        return FragmentLayout(workload.N, workload.K, 16, 2, workload.halves)

    def kind(self, workload: Any) -> str:
        return "f16"

    def prepack(self, weights: Mapping[str, Any], workload: Any, config: Config, target: Target) -> Arrays:
        codes = round_to_f16(weights["weight"]).view("uint16")
        return {"q": self.fragments(workload).pack_codes(codes)} | packed_bias(weights, workload)


MMA_F16 = MmaF16Linear()
