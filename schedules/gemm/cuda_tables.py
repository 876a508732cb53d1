"""Linear layers on tensor cores with codes that stand for the values of a table (nf4, fp4, mxfp4).

FLUTE (Guo et al., arXiv:2407.10960) looks codes up in shared memory; here tables are in registers (`cuda_mma_codes`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.schedules.formats import TABLES
from llmc.schedules.gemm.cuda_mma import MmaInt8Linear, MmaLowBitLinear
from llmc.schedules.gemm.lowbit import TABLE, TableLinearWorkload


@dataclass(frozen=True)
class HalfTableLinearWorkload(TableLinearWorkload):
    """As `TableLinearWorkload`, with x and the values of the table rounded to float16; sums are float32."""

    @property
    def kernel_name(self) -> str:
        return f"linear_{self.values}a16"


class MmaTableLinear(MmaLowBitLinear):
    """Template "table_mma": `MmaLowBitLinear` for codes that stand for the values of a table."""

    name = "table_mma"
    serves = HalfTableLinearWorkload

    def example_weights(self, workload: Any, rng: np.random.Generator) -> dict[str, Any]:
        return TABLE.example_weights(workload, rng)

    def _products(self, workload: Any, inputs: Mapping[str, np.ndarray], weight: Any) -> np.ndarray:
        x = np.asarray(inputs["x"], np.float16).astype(np.float64)
        values = np.array(TABLES[workload.values], np.float16).astype(np.float64)[np.asarray(weight.q)]
        scale = np.repeat(np.asarray(weight.scale, np.float64), weight.group_size, axis=1)[:, : workload.K]
        return x @ (values * scale).T


class MmaInt8TableLinear(MmaInt8Linear):
    """Template "int8_table_mma": the same for x in int8, and values as whole numbers of `formats.STEPS`."""

    name = "int8_table_mma"
    serves = TableLinearWorkload

    def example_weights(self, workload: Any, rng: np.random.Generator) -> dict[str, Any]:
        return TABLE.example_weights(workload, rng)


MMA_TABLE, MMA_INT8_TABLE = MmaTableLinear(), MmaInt8TableLinear()
