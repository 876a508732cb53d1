"""Linear layers on tensor cores with outliers: channels that are multiplied apart (`cuda_mma_outliers`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llmc.schedules.base import Arrays, Config, Workload
from llmc.schedules.formats import Outliers, QuantizedWeight
from llmc.schedules.gemm.cuda_mma import HalfLinearWorkload, MmaLowBitLinear
from llmc.schedules.gemm.cuda_mma_outliers import pack_outliers
from llmc.schedules.gemm.lowbit import LowBitLinearWorkload
from llmc.targets.base import Target


@dataclass(frozen=True)
class HalfOutlierLinearWorkload(HalfLinearWorkload):
    """As `HalfLinearWorkload`, with `outliers` channels that are multiplied apart, as float16."""

    outliers: int = 0

    @classmethod
    def of(cls, weight: QuantizedWeight, **epilogue_: Any) -> HalfOutlierLinearWorkload:
        """The workload that multiplies with `weight`, which has outliers."""
        plain = HalfLinearWorkload.of(replace(weight, outliers=None), **epilogue_)
        return cls(**vars(plain), outliers=len(weight.outlier_channels))

    @property
    def kernel_name(self) -> str:
        return f"{super().kernel_name}_outliers"


class MmaOutlierLinear(MmaLowBitLinear):
    """Template "outliers_mma": `MmaLowBitLinear` for weights with outliers. Packed: the same, and
    `cuda_mma_outliers`, before the bias."""

    name = "outliers_mma"
    serves = HalfOutlierLinearWorkload

    def accepts(self, workload: Workload, target: Target) -> bool:
        return super().accepts(workload, target) and isinstance(workload, LowBitLinearWorkload) and workload.symmetric

    def layout(self, workload: Any, config: Config, target: Target) -> str:
        return f"{super().layout(workload, config, target)}.{workload.outliers}"

    def prepack(self, weights: Mapping[str, Any], workload: Any, config: Config, target: Target) -> Arrays:
        weight: QuantizedWeight = weights["weight"]
        assert weight.outliers is not None
        plain = MmaLowBitLinear.prepack(
            self, {**weights, "weight": _without_outliers(weight)}, workload, config, target
        )
        bias = {"bias": plain.pop("bias")} if workload.bias else {}
        return plain | pack_outliers(workload, weight.outliers) | bias

    def example_weights(self, workload: Any, rng: np.random.Generator) -> dict[str, Any]:
        weights = super().example_weights(workload, rng)
        channels = np.sort(rng.permutation(workload.K)[: workload.outliers]).astype(np.int32)
        columns = rng.standard_normal((workload.N, workload.outliers), np.float32)
        return weights | {"weight": replace(weights["weight"], outliers=Outliers(channels, columns))}

    def _products(self, workload: Any, inputs: Mapping[str, np.ndarray], weight: Any) -> np.ndarray:
        plain = super()._products(workload, inputs, _without_outliers(weight))
        aside = np.asarray(inputs["x"], np.float16)[:, weight.outliers.channels].astype(np.float64)
        return plain + aside @ np.asarray(weight.outliers.columns, np.float16).T.astype(np.float64)


def _without_outliers(weight: QuantizedWeight) -> QuantizedWeight:
    """The same, with zeros in the channels of outliers."""
    assert weight.outliers is not None
    codes = np.array(weight.q)
    codes[:, weight.outliers.channels] = weight.zero
    return replace(weight, q=codes, outliers=None)


MMA_OUTLIERS = MmaOutlierLinear()
