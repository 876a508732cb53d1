"""The linear layer with weights in 8-bit floats, E4M3 (Micikevicius et al., "FP8 Formats for Deep Learning",
arXiv:2209.05433): what it computes. `cuda_fp8` has the kernels; CPUs have none.

w[n, k] = e4m3(q[n, k]) * scale[n]. x is rounded to float16, or to E4M3 as well, row by row as it comes: x[m, k] =
e4m3(x[m, k] / s[m]) * s[m], where s[m] is the row's largest magnitude over that of E4M3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from llmc.errors import KernelError
from llmc.schedules import epilogue
from llmc.schedules.base import Arrays, Template, Work
from llmc.schedules.formats import E4M3, E4M3_MAX, QuantizedWeight, to_e4m3
from llmc.schedules.gemm.dense import DenseLinearWorkload

TINY = 2.0**-100  # a row below this is zero


@dataclass(frozen=True)
class Fp8LinearWorkload(DenseLinearWorkload):
    """As `DenseLinearWorkload`, with a weight in E4M3 that has a scale for every row. `activations` "fp8": x is rounded
    to E4M3; "f16": to float16 (beyond 65504 it is infinite). Sums are float32."""

    activations: str = "fp8"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activations not in ("fp8", "f16"):
            raise KernelError(f"activations {self.activations!r} are unknown", hint="fp8 or f16")

    @property
    def kernel_name(self) -> str:
        return "linear_fp8" if self.activations == "fp8" else "linear_fp8_f16"

    @property
    def bits(self) -> int:
        return 8

    @property
    def scale_dtype(self) -> str:
        return "float32"


class Fp8Linear(Template):
    """Weights in: weight, a `QuantizedWeight` of the table E4M3; bias [N]."""

    def reference(
        self, workload: Fp8LinearWorkload, inputs: Mapping[str, np.ndarray], weights: Mapping[str, Any]
    ) -> Arrays:
        """Operands rounded as the kernel does it; all sums are float64."""
        x = inputs["x"]
        if workload.activations == "fp8":
            largest = np.abs(x).max(1, keepdims=True)
            inverse = np.divide(np.float32(E4M3_MAX), largest, out=np.zeros_like(largest), where=largest > TINY)
            codes = to_e4m3(x * inverse).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
            rounded = codes * (largest * np.float32(1 / E4M3_MAX))
        else:
            rounded = x.astype(np.float16).astype(np.float64)
        y = rounded @ weights["weight"].dequantize().astype(np.float64).T
        if workload.bias:
            y += weights["bias"]
        y = epilogue.reference(workload.activation, y)
        return {"y": y + inputs["residual"] if workload.residual else y}

    def work(self, workload: Fp8LinearWorkload, dims: Mapping[str, int]) -> Work:
        M, N, K = dims["M"], workload.N, workload.K
        outputs = M * workload.columns * (2 if workload.residual else 1)
        return Work(ops=2 * M * N * K, bytes=N * (K + 4) + 4 * (M * K + outputs))

    def example_weights(self, workload: Fp8LinearWorkload, rng: np.random.Generator) -> dict[str, Any]:
        N, K = workload.N, workload.K
        codes = to_e4m3(rng.normal(0, 100, (N, K)).astype(np.float32))
        scale = rng.uniform(0.001, 0.01, (N, 1)).astype(np.float32)
        weight = QuantizedWeight(codes, scale, 0.0, 8, K, E4M3)
        return {"weight": weight, "bias": rng.standard_normal(N, np.float32)}
