"""The linear layer with float16 weights, y = act(x W^T + bias) + residual: as `bf16`, with three bits more of mantissa
and a range that ends at 65504.

On CPUs x stays float32 and weights widen in registers, by one instruction that F16C and AVX-512 have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.errors import KernelError
from llmc.schedules.base import Config
from llmc.schedules.gemm.bf16 import Bf16Linear
from llmc.schedules.gemm.bf16_kernel import Bf16Kernel
from llmc.schedules.gemm.dense import DenseLinearWorkload
from llmc.schedules.gemm.packing import RowBlocks
from llmc.schedules.gemm.panels import pack_panels
from llmc.targets.base import Target
from llmc.tvm_shim import T

_ROWS = 4096  # rows that are rounded at a time: bounds the scratch


@dataclass(frozen=True)
class F16Layout(RowBlocks):
    """Where the elements of a [N, K] weight lie: panels of R = lanes rows, [blocks, padded_K, R] float16. Two k make a
    step, as in `Bf16Layout`: K is padded to an even number."""

    N: int
    K: int
    lanes: int
    halves: int = 1

    @property
    def padded_K(self) -> int:
        return self.K + self.K % 2

    @property
    def weight_shape(self) -> tuple[int, int, int]:
        return self.blocks, self.padded_K, self.lanes

    @property
    def label(self) -> str:
        """What tells this layout from another one of the same weight."""
        return f"f16.{self.lanes}x{self.halves}"

    def pack(self, weight: np.ndarray) -> np.ndarray:
        """weight [N, K] float32 or float16, of any strides -> panels. Raises KernelError as `round_to_f16` does."""
        rounded = np.zeros((self.N, self.padded_K), np.float16)
        for first in range(0, self.N, _ROWS):
            rounded[first : first + _ROWS, : self.K] = round_to_f16(weight[first : first + _ROWS])
        return pack_panels(self.arrange_rows(rounded), self.lanes)


def round_to_f16(weight: np.ndarray) -> np.ndarray:
    """float32 or float16 -> float16, to nearest, ties to even. Raises KernelError for what becomes infinite."""
    with np.errstate(over="ignore"):
        rounded = np.asarray(weight, np.float16)
    if np.any(np.isinf(rounded) & ~np.isinf(weight)):
        raise KernelError(
            f"a weight of magnitude {np.abs(weight).max():g} is beyond float16, which ends at 65504",
            hint="bf16 has float32's range: --quantize bf16",
        )
    return rounded


@dataclass(frozen=True)
class F16LinearWorkload(DenseLinearWorkload):
    """As `DenseLinearWorkload`, with a weight that is rounded to float16; `activations` "f16": x is, too (beyond 65504
    it is infinite), and sums are float32."""

    activations: str = "a32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activations not in ("a32", "f16"):
            raise KernelError(f"activations {self.activations!r} are unknown", hint="a32 or f16")

    @property
    def kernel_name(self) -> str:
        return "linear_f16"

    def layout(self, lanes: int) -> F16Layout:
        return F16Layout(self.N, self.K, lanes, self.halves)


class F16Linear(Bf16Linear):
    """Template "f16". Weights in: weight [N, K] float32 or float16 (any strides), bias [N]. Packed: `F16Layout`, and
    bias [blocks, lanes]. Knobs as those of "bf16"."""

    name = "f16"

    def accepts(self, workload: Any, target: Target) -> bool:
        return isinstance(workload, F16LinearWorkload) and target.kind == "llvm" and workload.activations == "a32"

    def build(self, workload: Any, target: Target, config: Config) -> Any:
        if not self.accepts(workload, target):
            raise KernelError(f"{workload.key()} is outside what the float16 linear computes", where=target.name)
        return F16Kernel(workload, target, config).build()

    def pack(self, layout: Any, weight: np.ndarray) -> np.ndarray:
        return layout.pack(weight)  # type: ignore[no-any-return]

    def rounded(self, values: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            return np.asarray(values, np.float16).astype(np.float32)


class F16Kernel(Bf16Kernel):
    """y = sum over k of weight * x in float32."""

    layout: F16Layout  # type: ignore[assignment]

    def declare_weights(self) -> None:
        self.weight = T.arg("weight", T.Buffer(self.layout.weight_shape, "float16"))

    def _ask(self, block: Any, i: Any, ahead: int) -> None:
        self.simd.prefetch(self.weight[block, 2 * i, ahead // 2])

    def _widened(self, block: Any, i: Any) -> list[Any]:
        wide = f"float32x{self.layout.lanes}"
        return [T.bind(T.Cast(wide, self.weight[block, 2 * i + j, self.simd.span(0)])) for j in range(2)]


F16 = F16Linear()
