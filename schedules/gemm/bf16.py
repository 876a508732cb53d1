"""The linear layer with bfloat16 weights, y = act(x W^T + bias) + residual: half the bytes of `dense` a token.

Products and sums are float32. Where the target has AMX tiles x is rounded to bfloat16, too, and many rows are
multiplied there; elsewhere x stays what it is, and weights widen in registers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.errors import KernelError
from llmc.schedules import epilogue
from llmc.schedules.base import Arrays, Config, Space, Template, Work
from llmc.schedules.gemm.bf16_kernel import Bf16Kernel, Bf16TileKernel
from llmc.schedules.gemm.bf16_packing import Bf16Layout, from_bf16, pack_bf16, round_to_bf16
from llmc.schedules.gemm.dense import DenseLinearWorkload
from llmc.schedules.gemm.lowbit_kernel import knobs
from llmc.targets.base import Target


@dataclass(frozen=True)
class Bf16LinearWorkload(DenseLinearWorkload):
    """As `DenseLinearWorkload`, with a weight that is rounded to bfloat16; `activations` "bf16": x is, too."""

    activations: str = "a32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activations not in ("a32", "bf16"):
            raise KernelError(f"activations {self.activations!r} are unknown", hint="a32 or bf16")

    @property
    def kernel_name(self) -> str:
        return "linear_bf16"

    def layout(self, lanes: int) -> Bf16Layout:
        return Bf16Layout(self.N, self.K, lanes, self.halves)


class Bf16Linear(Template):
    """Template "bf16". Weights in: weight [N, K] float32 (any strides), bias [N]. Packed: `bf16_packing`, and bias
    [blocks, lanes].

    Knobs as those of "lowbit" with float activations: few rows stream the packed weight, more pass over panels that are
    expanded in scratch; on tiles MR is 16 or 32 rows, and nothing is expanded.
    """

    name = "bf16"

    def accepts(self, workload: Any, target: Target) -> bool:
        if not isinstance(workload, Bf16LinearWorkload) or target.kind != "llvm":
            return False
        return target.tiles or workload.activations == "a32"

    def space(self, workload: Bf16LinearWorkload, target: Target) -> Space:
        layout, tiles = workload.layout(target.lanes), workload.activations == "bf16"

        def valid(config: Config) -> bool:
            MR, NV, skinny = (int(config[k]) for k in ("MR", "NV", "skinny"))
            return (
                (tiles or (target.vector_registers > MR * NV + NV and skinny + 1 >= MR and NV % workload.halves == 0))
                and layout.blocks % max(NV, workload.halves) == 0
                and layout.blocks % max(int(config["blocks"]), workload.halves) == 0
            )

        return Space(knobs((3, 4, 5, 6, 7, 8, 9), tiles), valid)

    def default(self, workload: Bf16LinearWorkload, target: Target) -> dict[str, int | str]:
        MR = 32 if workload.activations == "bf16" else 8 if target.vector_registers >= 32 else 6
        return {
            "MR": MR,
            "NV": 2,
            "KU": 8,
            "blocks": 1,
            "skinny": 8,
            "ahead_one": 4096,
            "ahead_many": 4096,
            "task_rows": 96,
        }

    def prepack(
        self, weights: Mapping[str, Any], workload: Bf16LinearWorkload, config: Config, target: Target
    ) -> Arrays:
        layout = workload.layout(target.lanes)
        packed = {"weight": self.pack(layout, weights["weight"])}
        if workload.bias:
            bias = layout.arrange_rows(np.asarray(weights["bias"], np.float32).reshape(-1))
            packed["bias"] = bias.reshape(layout.blocks, layout.lanes)
        return packed

    def pack(self, layout: Any, weight: np.ndarray) -> np.ndarray:
        """The weight [N, K] as `layout` says."""
        return pack_bf16(layout, weight)

    def rounded(self, values: np.ndarray) -> np.ndarray:
        """What is left of values in the type of the weights, as float32."""
        return from_bf16(round_to_bf16(values))

    def layout(self, workload: Bf16LinearWorkload, config: Config, target: Target) -> str:
        return workload.layout(target.lanes).label

    def build(self, workload: Bf16LinearWorkload, target: Target, config: Config) -> Any:
        if not self.accepts(workload, target):
            raise KernelError(f"{workload.key()} is outside what the bfloat16 linear computes", where=target.name)
        kernel = Bf16TileKernel if workload.activations == "bf16" else Bf16Kernel
        return kernel(workload, target, config).build()  # type: ignore[arg-type]

    def reference(
        self, workload: Bf16LinearWorkload, inputs: Mapping[str, np.ndarray], weights: Mapping[str, Any]
    ) -> Arrays:
        """Operands rounded as the kernel does it; all sums are float64."""
        x, weight = inputs["x"], self.rounded(weights["weight"])
        if workload.activations != "a32":
            x = self.rounded(x)
        y = x.astype(np.float64) @ weight.astype(np.float64).T
        if workload.bias:
            y += weights["bias"]
        y = epilogue.reference(workload.activation, y)
        return {"y": y + inputs["residual"] if workload.residual else y}

    def work(self, workload: Bf16LinearWorkload, dims: Mapping[str, int]) -> Work:
        M, N, K = dims["M"], workload.N, workload.K
        outputs = M * workload.columns * (2 if workload.residual else 1)
        return Work(ops=2 * M * N * K, bytes=2 * N * K + 4 * (M * K + outputs))

    def example_weights(self, workload: Bf16LinearWorkload, rng: np.random.Generator) -> dict[str, Any]:
        weight = rng.standard_normal((workload.N, workload.K), np.float32)
        return {"weight": weight, "bias": rng.standard_normal(workload.N, np.float32)}


BF16 = Bf16Linear()
