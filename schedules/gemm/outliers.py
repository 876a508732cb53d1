"""The low-bit linear layer with outliers: a few channels of x are multiplied in float32, all others as int8.

LLM.int8() (Dettmers et al., arXiv:2208.07339) splits at run time; here the channels are known when the kernel is built
for a model. Their values are zero to the quantiser, so that they do not set the scale of a row, and wait in a small
buffer of their own until the sums of a register block are float: n more multiply-adds, in registers, are all that the
split costs. Nothing is permuted: whoever makes x need not know, and one x serves layers with and without outliers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llmc.errors import KernelError
from llmc.schedules import epilogue
from llmc.schedules.base import Arrays, Config, Work
from llmc.schedules.formats import Outliers, QuantizedWeight
from llmc.schedules.gemm.activations import Quantized
from llmc.schedules.gemm.lowbit import LOWBIT, LowBitLinear, LowBitLinearWorkload
from llmc.schedules.gemm.lowbit_a8 import Int8Kernel
from llmc.schedules.gemm.lowbit_kernel import Block
from llmc.schedules.gemm.lowbit_tiles import Int8TileKernel
from llmc.targets.base import Target
from llmc.tvm_shim import T

_UNIT = 4  # outliers that are written out; `OutlierLinearWorkload.outliers` is a multiple


@dataclass(frozen=True)
class OutlierLinearWorkload(LowBitLinearWorkload):
    """A linear of which `outliers` channels, a multiple of 4, are multiplied in float32."""

    outliers: int = _UNIT

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.outliers % _UNIT or not 0 < self.outliers <= self.K:
            raise KernelError(f"{self.outliers} of {self.K} channels cannot be outliers", hint=f"a multiple of {_UNIT}")
        if self.activations != "a8":
            raise KernelError("outliers matter where activations are rounded: to a8")

    @classmethod
    def of(cls, weight: QuantizedWeight, **epilogue_: Any) -> OutlierLinearWorkload:
        """The workload that multiplies with `weight`, which has outliers."""
        plain = LowBitLinearWorkload.of(replace(weight, outliers=None), **epilogue_)
        return cls(**vars(plain), outliers=len(weight.outlier_channels))

    @property
    def kernel_name(self) -> str:
        return f"{super().kernel_name}_outliers"


class OutlierLinear(LowBitLinear):
    """Template "outliers": `LowBitLinear` for weights with outliers. Packed: q, scale, (zero), keep float32 [K], 0 for
    outliers and 1 for all others, channels int32 [n], columns float32 [blocks, n, lanes], (bias)."""

    name = "outliers"
    serves = OutlierLinearWorkload

    def prepack(self, weights: Mapping[str, Any], workload: Any, config: Config, target: Target) -> Arrays:
        packed = super().prepack(weights, workload, config, target)
        bias = {"bias": packed.pop("bias")} if workload.bias else {}
        layout, outliers = workload.layout(target.lanes), weights["weight"].outliers
        keep = np.ones(workload.K, np.float32)
        keep[outliers.channels] = 0
        rows = layout.arrange_rows(outliers.columns).reshape(layout.blocks, layout.lanes, -1)
        columns = np.ascontiguousarray(rows.transpose(0, 2, 1))
        return {**packed, "keep": keep, "channels": outliers.channels, "columns": columns, **bias}

    def build(self, workload: Any, target: Target, config: Config) -> Any:
        if not self.accepts(workload, target):
            raise KernelError(f"{workload.key()} is outside what the linear with outliers computes", where=target.name)
        kernel = OutlierTileKernel if target.tiles else OutlierKernel
        return kernel(workload, target, config).build()

    def reference(self, workload: Any, inputs: Mapping[str, np.ndarray], weights: Mapping[str, Any]) -> Arrays:
        """The quantised part as `LowBitLinear` has it, the outliers in float64."""
        weight: QuantizedWeight = weights["weight"]
        assert weight.outliers is not None
        x, channels = inputs["x"].copy(), weight.outliers.channels
        aside = x[:, channels].astype(np.float64)
        x[:, channels] = 0
        plain = replace(weight, outliers=None)
        y = LOWBIT.reference(LowBitLinearWorkload.of(plain), {"x": x}, {"weight": plain})["y"]
        y = y + aside @ weight.outliers.columns.T.astype(np.float64)
        y = epilogue.reference(workload.activation, y + weights["bias"] if workload.bias else y)
        return {"y": y + inputs["residual"] if workload.residual else y}

    def work(self, workload: Any, dims: Mapping[str, int]) -> Work:
        plain, aside = super().work(workload, dims), workload.N * workload.outliers
        return replace(plain, ops=plain.ops + 2 * dims["M"] * aside, bytes=plain.bytes + 4 * aside)

    def example_weights(self, workload: Any, rng: np.random.Generator) -> dict[str, Any]:
        weights = super().example_weights(workload, rng)
        channels = np.sort(rng.permutation(workload.K)[: workload.outliers]).astype(np.int32)
        columns = rng.standard_normal((workload.N, workload.outliers), np.float32)
        return weights | {"weight": replace(weights["weight"], outliers=Outliers(channels, columns))}


@dataclass(frozen=True)
class _Kept:
    """x where outliers are zero, read as a buffer is."""

    x: Any
    keep: Any

    def __getitem__(self, at: tuple[Any, Any]) -> Any:
        return self.x[at] * self.keep[at[1]]


class OutlierKernel(Int8Kernel):
    """`Int8Kernel`, whose sums go on with the outliers once they are float."""

    workload: OutlierLinearWorkload

    def declare_weights(self) -> None:
        super().declare_weights()
        w, layout = self.workload, self.layout
        self.keep = T.arg("keep", T.Buffer((w.K,), "float32"))
        self.channels = T.arg("channels", T.Buffer((w.outliers,), "int32"))
        self.columns = T.arg("columns", T.Buffer((layout.blocks, w.outliers, layout.lanes), "float32"))

    def activations(self, M: Any) -> Quantized:
        self.aside = T.alloc_buffer((M, self.workload.outliers), "float32")
        return super().activations(M)

    def quantize_row(self, out: Quantized, m: Any) -> None:
        with T.serial(0, self.workload.outliers) as i:
            T.buffer_store(self.aside, self.x[m, self.channels[i]], [m, i])
        self.quantizer.row(_Kept(self.x, self.keep), out, m)

    def multiply(self, x: Quantized, panel: Any, first: Any, rows: int, blocks: list[Any], ahead: int) -> Block:
        acc = super().multiply(x, panel, first, rows, blocks, ahead)
        self.add_outliers(acc, first, blocks)
        return acc

    def add_outliers(self, acc: Block, first: Any, blocks: list[Any]) -> None:
        """acc += the outliers of rows `first`, `first` + 1 … times their columns of the weight."""
        with T.serial(0, self.workload.outliers // _UNIT) as step:
            for i in (step * _UNIT + j for j in range(_UNIT)):
                for v, block in enumerate(blocks):
                    column = T.bind(self.columns[block, i, self.simd.span(0)])
                    for m, row in enumerate(acc):
                        row[v].v = self.simd.fma(column, self.simd.splat(self.aside[first + m, i]), row[v].v)


class OutlierTileKernel(OutlierKernel, Int8TileKernel):
    """The same on AMX tiles, for many rows: the sums of int8 leave the tiles, and the outliers follow."""

    def sum_tiles(
        self, x: Quantized, expanded: Any, firsts: list[Any], rows: Any, blocks: list[Any], total: Any
    ) -> None:
        super().sum_tiles(x, expanded, firsts, rows, blocks, total)
        with T.serial(0, rows) as m:
            for t, first in enumerate(firsts):
                acc = self.zeros(1, len(blocks))
                for v, register in enumerate(acc[0]):
                    register.v = total[t, v, m, self.simd.span(0)]
                self.add_outliers(acc, first + m, blocks)
                for v, register in enumerate(acc[0]):
                    T.buffer_store(total, register.v, [t, v, m, self.simd.span(0)])


OUTLIERS = OutlierLinear()
