"""Linear layers on GPUs, y = act(x W^T + bias) + residual, in float32 arithmetic: tiles in shared memory.

The plain form of the family: it serves every weight. Codes become float32 on their way into shared memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from llmc.schedules import epilogue
from llmc.schedules.base import Arrays, Config, Kernel, Space, Template, Workload
from llmc.schedules.formats import E4M3, QuantizedWeight
from llmc.schedules.gemm.bf16 import Bf16LinearWorkload
from llmc.schedules.gemm.cuda_codes import Codes
from llmc.schedules.gemm.cuda_f16 import MMA_F16
from llmc.schedules.gemm.cuda_fp8 import MMA_FP8, MMA_FP8_F16
from llmc.schedules.gemm.cuda_mma import MMA_BF16, MMA_INT8, MMA_LOWBIT, HalfLinearWorkload, packed_bias
from llmc.schedules.gemm.cuda_outliers import MMA_OUTLIERS, HalfOutlierLinearWorkload
from llmc.schedules.gemm.cuda_tables import MMA_INT8_TABLE, MMA_TABLE, HalfTableLinearWorkload
from llmc.schedules.gemm.cuda_wgmma import WGMMA_BF16, WGMMA_F16, WGMMA_FP8, WGMMA_LOWBIT
from llmc.schedules.gemm.dense import DenseLinear, DenseLinearWorkload
from llmc.schedules.gemm.f16 import F16LinearWorkload
from llmc.schedules.gemm.fp8 import Fp8LinearWorkload
from llmc.schedules.gemm.lowbit import TABLE, LowBitLinear, LowBitLinearWorkload, TableLinearWorkload
from llmc.targets.base import Target
from llmc.targets.threads import Cell, Scalar, barrier, launch, shared
from llmc.tvm_shim import IRBuilder, T

_SIDE = 16  # threads along either side of a tile
_THREADS = _SIDE * _SIDE

Weight = Callable[[Any, Any], Any]  # the float32 at a row and a column


class CudaLinear(DenseLinear):
    """Template "dense_cuda". Weights in: weight, [N, K] float32 or a `QuantizedWeight` that becomes float32; bias [N].
    Packed: the same, as rows.

    Knobs: a block makes BM rows by BN columns of the product, BK deep at a time.
    """

    name = "dense_cuda"

    def accepts(self, workload: Workload, target: Target) -> bool:
        return isinstance(workload, DenseLinearWorkload) and workload.dtype == "float32" and target.kind == "cuda"

    def space(self, workload: DenseLinearWorkload, target: Target) -> Space:
        return _SPACE

    def default(self, workload: DenseLinearWorkload, target: Target) -> dict[str, int | str]:
        return dict(_DEFAULT)

    def prepack(
        self, weights: Mapping[str, Any], workload: DenseLinearWorkload, config: Config, target: Target
    ) -> Arrays:
        weight = weights["weight"]
        rows = weight.dequantize() if isinstance(weight, QuantizedWeight) else np.ascontiguousarray(weight, np.float32)
        return {"weight": rows, **packed_bias(weights, workload)}

    def layout(self, workload: DenseLinearWorkload, config: Config, target: Target) -> str:
        return "rows"

    def build(self, workload: DenseLinearWorkload, target: Target, config: Config) -> Any:
        def weight() -> Weight:
            rows = T.arg("weight", T.Buffer((workload.N, workload.K), "float32"))
            return lambda n, k: rows[n, k]

        return _Tiled(workload, target, config).build("dense", weight)


class CudaLowBitLinear(LowBitLinear):
    """Template "lowbit_cuda": weights as `cuda_codes` packs them, activations in float32. Knobs as `CudaLinear`'s."""

    name = "lowbit_cuda"

    def accepts(self, workload: Workload, target: Target) -> bool:
        if not isinstance(workload, LowBitLinearWorkload) or type(workload) is not self.serves:
            return False
        return workload.activations == "a32" and target.kind == "cuda"

    def space(self, workload: LowBitLinearWorkload, target: Target) -> Space:
        return _SPACE

    def default(self, workload: LowBitLinearWorkload, target: Target) -> dict[str, int | str]:
        return dict(_DEFAULT)

    def prepack(
        self, weights: Mapping[str, Any], workload: LowBitLinearWorkload, config: Config, target: Target
    ) -> Arrays:
        return {**_codes(workload).pack(weights["weight"]), **packed_bias(weights, workload)}

    def layout(self, workload: LowBitLinearWorkload, config: Config, target: Target) -> str:
        return _codes(workload).label

    def build(self, workload: LowBitLinearWorkload, target: Target, config: Config) -> Any:
        codes = _codes(workload)

        def weight() -> Weight:
            codes.declare()
            return codes.value

        return _Tiled(workload, target, config).build(workload.kernel_name, weight)


class CudaTableLinear(CudaLowBitLinear):
    """Template "table_cuda": `CudaLowBitLinear` for codes that stand for the values of a table."""

    name = "table_cuda"
    serves = TableLinearWorkload

    def example_weights(self, workload: Any, rng: np.random.Generator) -> dict[str, Any]:
        return TABLE.example_weights(workload, rng)


_SPACE = Space({"BM": (16, 32, 64, 128), "BN": (32, 64, 128), "BK": (8, 16, 32)})
_DEFAULT: dict[str, int | str] = {"BM": 64, "BN": 64, "BK": 16}


def _codes(w: LowBitLinearWorkload) -> Codes:
    return Codes(w.N, w.K, w.bits, w.group_size, w.scale_dtype, w.symmetric, w.zero, w.table)


class _Tiled:
    """One kernel under construction. A thread makes BM/16 rows by BN/16 columns, 16 apart, of its block's tile.

    With gate and up (`halves` = 2) the tile's right half are the rows of the weight that go with its left half's.
    """

    def __init__(self, workload: Any, target: Target, config: Config) -> None:
        self.w, self.scalar = workload, Scalar(target)
        self.BM, self.BN, self.BK = (int(config[k]) for k in ("BM", "BN", "BK"))
        self.width = self.BN // workload.halves  # columns of y that a block makes

    def build(self, name: str, declare: Callable[[], Weight]) -> Any:
        w = self.w
        with IRBuilder() as ib, T.prim_func(s_tir=True):
            T.func_name(name)
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            inputs = {arg.name: T.arg(arg.name, T.handle()) for arg in w.inputs()}
            self.weight = declare()
            self.bias = T.arg("bias", T.Buffer((w.N,), "float32")) if w.bias else None
            y = T.arg("y", T.handle())
            self.M = T.int64()
            self.x = T.match_buffer(inputs["x"], (self.M, w.K), "float32")
            self.residual = T.match_buffer(inputs["residual"], (self.M, w.columns), "float32") if w.residual else None
            self.y = T.match_buffer(y, (self.M, w.columns), "float32")
            tiles = T.floordiv(self.M + (self.BM - 1), T.int64(self.BM))
            with launch(_THREADS, -(-w.columns // self.width), tiles) as (thread, column_tile, row_tile):
                self._tile(thread, row_tile * self.BM, column_tile * self.width)
        return ib.get()

    def _tile(self, thread: Any, first_row: Any, first_column: Any) -> None:
        K, BM, BN, BK = self.w.K, self.BM, self.BN, self.BK
        # Columns more than needed: the lanes of a warp, which write all k of 32 / BK rows, meet different banks.
        gap = max(32 // BK, 1)
        a, b = shared((BK, BM + gap)), shared((BK, BN + gap))
        rows, columns = (
            [T.bind(start + _SIDE * i) for i in range(size // _SIDE)] for start, size in self._places(thread)
        )
        sums = [[Cell(T.float32(0)) for _ in columns] for _ in rows]
        with T.serial(0, -(-K // BK)) as step:
            k0 = T.Cast("int64", step) * BK
            self._fill(a, BM, thread, lambda r, k: self._x(first_row + r, k0 + k))
            self._fill(b, BN, thread, lambda c, k: self._w(self._row_of(first_column, c), k0 + k))
            barrier()
            with T.serial(0, BK) as k:
                left, right = [Cell(a[k, r]) for r in rows], [Cell(b[k, c]) for c in columns]
                for i, row in enumerate(sums):
                    for j, cell in enumerate(row):
                        cell.v = cell.v + left[i].v * right[j].v
            barrier()
        self._finish(sums, [T.bind(first_row + r) for r in rows], [first_column + c for c in columns])

    def _places(self, thread: Any) -> tuple[tuple[Any, int], tuple[Any, int]]:
        """Where a thread's rows and columns begin in the tile, and the tile's sizes."""
        return (T.floordiv(thread, T.int64(_SIDE)), self.BM), (T.floormod(thread, T.int64(_SIDE)), self.BN)

    def _fill(self, tile: Any, size: int, thread: Any, value: Callable[[Any, Any], Any]) -> None:
        """tile[k, i] := value(i, k), neighbouring threads taking neighbouring k."""
        BK = self.BK
        for start in range(0, size * BK, _THREADS):
            at = T.bind(thread + start)
            i, k = T.bind(T.floordiv(at, T.int64(BK))), T.bind(T.floormod(at, T.int64(BK)))
            if start + _THREADS <= size * BK:
                T.buffer_store(tile, value(i, k), [k, i])
            else:
                with T.If(at < size * BK), T.Then():
                    T.buffer_store(tile, value(i, k), [k, i])

    def _x(self, m: Any, k: Any) -> Any:
        return T.if_then_else(T.And(m < self.M, k < self.w.K), self.x[m, k], T.float32(0))

    def _w(self, n: Any, k: Any) -> Any:
        return T.if_then_else(T.And(n < self.w.N, k < self.w.K), self.weight(n, k), T.float32(0))

    def _row_of(self, first_column: Any, c: Any) -> Any:
        """The weight's row for column c of the tile; beyond the last one where there is none."""
        w = self.w
        if w.halves == 1:
            return first_column + c
        column = T.bind(first_column + T.floormod(c, T.int64(self.width)))
        up = T.floordiv(c, T.int64(self.width)) * w.columns
        return T.Select(column < w.columns, column + up, T.int64(w.N))

    def _finish(self, sums: list[list[Cell]], rows: list[Any], columns: list[Any]) -> None:
        """Bias, activation, residual, store."""
        w, made = self.w, len(columns) // self.w.halves
        for m, row in zip(rows, sums, strict=True):
            for j in range(made):
                column = columns[j]
                with T.If(T.And(m < self.M, column < w.columns)), T.Then():
                    values = [self._biased(row[j + h * made].v, column + h * w.columns) for h in range(w.halves)]
                    if w.activation == "silu_mul":
                        value = epilogue.silu_mul(self.scalar, *values)
                    else:
                        value = epilogue.apply(self.scalar, w.activation, values[0])
                    if self.residual is not None:
                        value = value + self.residual[m, column]
                    T.buffer_store(self.y, value, [m, column])

    def _biased(self, value: Any, n: Any) -> Any:
        return Cell(value if self.bias is None else value + self.bias[n]).v


CUDA_LINEAR, CUDA_LOWBIT, CUDA_TABLE = CudaLinear(), CudaLowBitLinear(), CudaTableLinear()


def linear(
    weight: np.ndarray | QuantizedWeight, bias: bool, activation: str, residual: bool, activations: str, target: Target
) -> Kernel:
    """The kernel that multiplies with `weight` [N, K].

    On tensor cores where x may be rounded, and their kernels take the shape: codes are multiplied with x in float16, or
    in int8 with `activations` "a8", and "bf16" and "f16" round both to these types. "fp8" rounds x to E4M3, or to
    float16 on GPUs without such products. All else is float32.
    """
    same: dict[str, Any] = {"bias": bias, "activation": activation, "residual": residual}
    rounded: list[Kernel] = []
    template: Template
    if isinstance(weight, np.ndarray):
        N, K = weight.shape
        plain = Kernel(CUDA_LINEAR, DenseLinearWorkload(N, K, **same))
        if activations == "bf16":
            for template in (WGMMA_BF16, MMA_BF16):
                rounded.append(Kernel(template, Bf16LinearWorkload(N, K, **same, activations="bf16")))
        if activations == "f16":
            for template in (WGMMA_F16, MMA_F16):
                rounded.append(Kernel(template, F16LinearWorkload(N, K, **same, activations="f16")))
    elif weight.table == E4M3:
        plain = Kernel(CUDA_LINEAR, DenseLinearWorkload(weight.N, weight.K, **same))
        for template, x in ((WGMMA_FP8, "fp8"), (MMA_FP8, "fp8"), (MMA_FP8_F16, "f16")):
            rounded.append(Kernel(template, Fp8LinearWorkload(weight.N, weight.K, **same, activations=x)))
    elif weight.outliers:
        plain = Kernel(CUDA_LINEAR, DenseLinearWorkload(weight.N, weight.K, **same))
        rounded.append(Kernel(MMA_OUTLIERS, HalfOutlierLinearWorkload.of(weight, activations="a32", **same)))
    elif weight.table:
        plain = Kernel(CUDA_TABLE, TableLinearWorkload.of(weight, activations="a32", **same))
        if activations == "a8":
            rounded.append(Kernel(MMA_INT8_TABLE, TableLinearWorkload.of(weight, activations="a8", **same)))
        rounded.append(Kernel(MMA_TABLE, HalfTableLinearWorkload.of(weight, activations="a32", **same)))
    else:
        plain = Kernel(CUDA_LOWBIT, LowBitLinearWorkload.of(weight, activations="a32", **same))
        if activations == "a8":
            rounded.append(Kernel(MMA_INT8, LowBitLinearWorkload.of(weight, activations="a8", **same)))
        for template in (WGMMA_LOWBIT, MMA_LOWBIT):
            rounded.append(Kernel(template, HalfLinearWorkload.of(weight, activations="a32", **same)))
    return next((k for k in rounded if k.template.accepts(k.workload, target)), plain)
