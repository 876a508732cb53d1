"""Convolution of bytes: what `conv` does, four products at a time in one instruction (VNNI), summed in int32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.schedules.base import Arg, Arrays, Config, Work, Workload
from llmc.schedules.conv.conv import Conv, ConvKernel, bias_panels, weight_panels
from llmc.schedules.conv.reference import convolve
from llmc.schedules.conv.workloads import ConvWorkload
from llmc.targets.base import Target
from llmc.targets.intrinsics import Reg
from llmc.tvm_shim import T


@dataclass(frozen=True)
class IntegerConvWorkload(ConvWorkload):
    """y int32 = conv(x) + bias, x uint8 [B, H, W, C] and padded already, weight int8, bias int32: sizes as in
    `ConvWorkload`. No activation and no residual: what follows rounds to bytes again."""

    def inputs(self) -> tuple[Arg, ...]:
        (x,) = super().inputs()
        return (Arg("x", x.shape, "uint8"),)

    def outputs(self) -> tuple[Arg, ...]:
        (y,) = super().outputs()
        return (Arg("y", y.shape, "int32"),)


class IntegerConv(Conv):
    """Template "integer_conv". Weights in: weight int8 [N, C / groups, KH, KW], bias int32 [N]. Packed: weight
    [panels, K / 4, 4 NR], four neighbours in K side by side for each output, and bias [panels, NR].

    Knobs as for "conv"; KU counts steps of four.
    """

    name = "integer_conv"

    def accepts(self, workload: Workload, target: Target) -> bool:
        if not isinstance(workload, IntegerConvWorkload) or workload.residual or workload.activation != "none":
            return False
        whole = workload.groups == 1 and workload.DW == 1
        run = workload.C // workload.groups * (workload.KW if whole else 1)
        return target.kind == "llvm" and target.dot == "vnni" and run % 4 == 0

    def prepack(self, weights: Mapping[str, Any], workload: Any, config: Config, target: Target) -> Arrays:
        w, NR = workload, int(config["NV"]) * target.lanes
        panels = weight_panels(w, weights["weight"], NR)
        quads = panels.reshape(len(panels), w.K // 4, 4, NR).transpose(0, 1, 3, 2)
        packed = {"weight": np.ascontiguousarray(quads).reshape(len(panels), w.K // 4, 4 * NR)}
        if w.bias:
            packed["bias"] = bias_panels(w, weights["bias"], NR)
        return packed

    def layout(self, workload: Any, config: Config, target: Target) -> str:
        return f"integer_conv.{int(config['NV']) * target.lanes}.{workload.groups}"

    def build(self, workload: Any, target: Target, config: Config) -> Any:
        return _Kernel(workload, target, config).build()

    def reference(self, workload: Any, inputs: Mapping[str, np.ndarray], weights: Mapping[str, Any]) -> Arrays:
        w = workload
        y = convolve(inputs["x"], weights["weight"], (w.SH, w.SW), (w.DH, w.DW), w.groups)  # float64: exact to 2**53
        return {"y": (y + weights["bias"] if w.bias else y).astype(np.int32)}

    def work(self, workload: Any, dims: Mapping[str, int]) -> Work:
        w, real = workload, super().work(workload, dims)
        pixels = dims["B"] * (w.OH or dims["OH"]) * (w.OW or dims["OW"])
        return Work(ops=real.ops, bytes=(real.bytes - 4 * pixels * w.N) / 4 + 4 * pixels * w.N, unit="dot")

    def example_weights(self, workload: Any, rng: np.random.Generator) -> dict[str, Any]:
        w = workload
        weight = rng.integers(-127, 128, (w.N, w.C // w.groups, w.KH, w.KW), np.int8)
        return {"weight": weight, "bias": rng.integers(-(2**20), 2**20, w.N, np.int32)}

    def example_inputs(self, workload: Any, dims: Mapping[str, int], rng: np.random.Generator) -> Arrays:
        (x,) = workload.inputs()
        return {"x": rng.integers(0, 256, tuple(dims[d] if isinstance(d, str) else d for d in x.shape), np.uint8)}


class _Kernel(ConvKernel):
    name, unit = "integer_conv", 4
    dtypes: Mapping[str, str] = {"x": "uint8", "weight": "int8", "bias": "int32", "y": "int32"}

    def zero(self) -> Reg:
        register = self.simd.reg("int32")
        register.v = self.simd.i32(0)
        return register

    def weights(self, panel: Any, k: Any, v: int) -> Any:
        width = 4 * self.simd.lanes
        return self.weight[panel, k, self.simd.span(v * width, width)]

    def pixel(self, at: Any) -> Any:
        quad = T.reinterpret("int32", self.x[T.ramp(at, 1, 4)])
        return T.reinterpret(f"uint8x{4 * self.simd.lanes}", T.broadcast(quad, self.simd.lanes))

    def multiply(self, weight: Any, x: Any, acc: Any) -> Any:
        return self.simd.dot_u8s8(acc, x, weight)

    def activate(self, value: Any) -> Any:
        return value


INTEGER_CONV = IntegerConv()
