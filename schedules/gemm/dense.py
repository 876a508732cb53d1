"""fp32 linear layer, y = act(x W^T + bias) + residual: one kernel, and one packed weight, for decode and prefill.

The weight is stored as panels of NR = NV * lanes rows, laid out [K, NR]: one step in k reads NR consecutive floats.
For one row of x (decode) a panel is a single stream from memory, and k is split over several sums so that no FMA
waits for the one before. For many rows the same panel stays in the cache while register blocks of MR rows pass over
it (Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008).

Every (panel, block of MR rows) is one iteration of one parallel loop, panels outermost: threads get equal numbers of
blocks whatever M and N are, and a thread stays with its panel. The last block has the rows that are left: there is a
body for each count from 1 to MR. Where K is so long that a panel would not stay in the cache, an iteration takes
several blocks and goes over them once for each slice of k, keeping their sums in a scratch buffer in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from llmc.errors import KernelError
from llmc.schedules import epilogue
from llmc.schedules.base import Arg, Arrays, Config, Space, Template, Work, Workload
from llmc.schedules.gemm.panels import pack_panels
from llmc.targets.base import Target
from llmc.targets.intrinsics import Reg, Simd
from llmc.tvm_shim import IRBuilder, T

_BLOCKS = 8  # of rows that share a slice of a long panel: enough to pay for reading it
_CHAINS = 8  # independent sums that keep both FMA units busy: 2 a cycle, latency 4


@dataclass(frozen=True)
class DenseLinearWorkload(Workload):
    """x [M, K] float32 times weight [N, K] float32, M left to run time.

    With activation silu_mul the weight's first N/2 rows are the gate, the others the up projection, and y has N/2
    columns; else N. bias [N] is added before the activation, residual (shaped like y) after it.
    """

    N: int
    K: int
    dtype: str = "float32"
    bias: bool = False
    activation: str = "none"
    residual: bool = False

    def __post_init__(self) -> None:
        if self.activation not in epilogue.ACTIVATIONS:
            raise KernelError(
                f"activation {self.activation!r} is unknown", hint=f"one of {', '.join(epilogue.ACTIVATIONS)}"
            )
        if self.N % self.halves:
            raise KernelError(f"silu_mul needs gate and up of one size: N = {self.N} is odd")

    @property
    def halves(self) -> int:
        """How many rows of the weight make one column of y."""
        return 2 if self.activation == "silu_mul" else 1

    @property
    def columns(self) -> int:
        """Columns of y."""
        return self.N // self.halves

    def inputs(self) -> tuple[Arg, ...]:
        x, residual = Arg("x", ("M", self.K), self.dtype), Arg("residual", ("M", self.columns), self.dtype)
        return (x, residual) if self.residual else (x,)

    def outputs(self) -> tuple[Arg, ...]:
        return (Arg("y", ("M", self.columns), self.dtype),)


class DenseLinear(Template):
    """Template "dense". Weights in: weight [N, K] (any strides), bias [N]. Packed: weight [ceil(N/NR), K, NR] and
    bias [ceil(N/NR), NR], padded with zeros; for silu_mul each panel holds NR/2 gate rows, then the NR/2 up rows of
    the same columns.

    Knobs: MR rows by NV registers is the register block, KU the unrolling of k, KC the longest slice of k, `ahead` how
    many bytes before their use weights are prefetched (0: left to the hardware).
    """

    name = "dense"

    def accepts(self, workload: Workload, target: Target) -> bool:
        return isinstance(workload, DenseLinearWorkload) and workload.dtype == "float32" and target.kind == "llvm"

    def space(self, workload: DenseLinearWorkload, target: Target) -> Space:
        def valid(config: Config) -> bool:
            MR, NV = int(config["MR"]), int(config["NV"])
            return NV % workload.halves == 0 and target.vector_registers > MR * NV + NV

        rows = (3, 4, 5, 6, 7, 8, 9, 10, 12, 14)
        ahead = (0, 1024, 4096, 8192)
        return Space(
            {"MR": rows, "NV": (1, 2, 3, 4), "KU": (4, 8), "KC": (512, 1024, 2048, 4096), "ahead": ahead}, valid
        )

    def default(self, workload: DenseLinearWorkload, target: Target) -> dict[str, int | str]:
        if target.vector_registers < 32:
            MR, NV = 6, 2
        else:
            MR, NV = (6, 4) if workload.halves == 2 else (8, 3)
        return {"MR": MR, "NV": NV, "KU": 4, "KC": 2048, "ahead": 4096}

    def prepack(
        self, weights: Mapping[str, Any], workload: DenseLinearWorkload, config: Config, target: Target
    ) -> Arrays:
        NR = int(config["NV"]) * target.lanes
        packed = {"weight": pack_panels(weights["weight"], NR, workload.halves)}
        if workload.bias:
            packed["bias"] = pack_panels(weights["bias"].reshape(-1, 1), NR, workload.halves)[:, 0]
        return packed

    def layout(self, workload: DenseLinearWorkload, config: Config, target: Target) -> str:
        return f"panels.{int(config['NV']) * target.lanes}.{workload.halves}"

    def build(self, workload: DenseLinearWorkload, target: Target, config: Config) -> Any:
        return _Kernel(workload, target, config).build()

    def reference(
        self, workload: DenseLinearWorkload, inputs: Mapping[str, np.ndarray], weights: Mapping[str, Any]
    ) -> Arrays:
        y = inputs["x"].astype(np.float64) @ np.asarray(weights["weight"], np.float64).T
        if workload.bias:
            y += weights["bias"]
        y = epilogue.reference(workload.activation, y)
        return {"y": y + inputs["residual"] if workload.residual else y}

    def work(self, workload: DenseLinearWorkload, dims: Mapping[str, int]) -> Work:
        M, N, K = dims["M"], workload.N, workload.K
        outputs = M * workload.columns * (2 if workload.residual else 1)
        return Work(ops=2 * M * N * K, bytes=4 * (N * K + M * K + outputs))

    def example_weights(self, workload: DenseLinearWorkload, rng: np.random.Generator) -> dict[str, Any]:
        weight = rng.standard_normal((workload.N, workload.K), np.float32)
        return {"weight": weight, "bias": rng.standard_normal(workload.N, np.float32)}


@dataclass(frozen=True)
class _Place:
    """Where a body works: its panel, its first row, the slice of k, and its first row in the scratch buffer."""

    panel: Any
    first: Any
    slice: Any
    slot: Any


class _Kernel:
    """One kernel under construction: what the pieces of its body share."""

    def __init__(self, workload: DenseLinearWorkload, target: Target, config: Config) -> None:
        self.workload, self.simd = workload, Simd(target)
        self.MR, self.NV, self.KU = int(config["MR"]), int(config["NV"]), int(config["KU"])
        self.ahead = int(config["ahead"])
        self.NR = self.NV * self.simd.lanes
        self.width = self.NR // workload.halves  # columns of y that one panel makes
        self.panels = -(-workload.columns // self.width)
        self.slices = -(-workload.K // int(config["KC"]))
        self.steps = -(-workload.K // (self.slices * self.KU))  # of KU, in every slice but the last
        self.blocks = 1 if self.slices == 1 else _BLOCKS  # that one iteration of the parallel loop takes

    def build(self) -> Any:
        w = self.workload
        with IRBuilder() as ib:
            with T.prim_func(s_tir=True):
                T.func_name("dense")
                T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
                inputs = {arg.name: T.arg(arg.name, T.handle()) for arg in w.inputs()}
                self.weight = T.arg("weight", T.Buffer((self.panels, w.K, self.NR), "float32"))
                self.bias = T.arg("bias", T.Buffer((self.panels, self.NR), "float32")) if w.bias else None
                y = T.arg("y", T.handle())
                M = T.int64()
                self.x = T.match_buffer(inputs["x"], (M, w.K), "float32")
                self.residual = T.match_buffer(inputs["residual"], (M, w.columns), "float32") if w.residual else None
                self.y = T.match_buffer(y, (M, w.columns), "float32")
                taken = self.MR * self.blocks
                groups = T.bind(T.ceildiv(M, T.int64(taken)))
                with T.parallel(0, groups * self.panels) as task:
                    panel, first = T.bind(T.floordiv(task, groups)), T.bind(T.floormod(task, groups) * taken)
                    count = T.bind(T.min(M - first, T.int64(taken)))
                    if self.slices == 1:
                        self._dispatch(_Place(panel, first, 0, 0), count, self.MR)
                    else:
                        self._slices(panel, first, count)
        return ib.get()

    def _slices(self, panel: Any, first: Any, count: Any) -> None:
        """y[first : first + count, one panel], a slice of k at a time."""
        self.scratch = T.alloc_buffer((self.MR * self.blocks, self.NR), "float32")
        with T.serial(0, self.slices) as k, T.serial(0, T.ceildiv(count, T.int64(self.MR))) as block:
            slot = T.bind(block * self.MR)
            place = _Place(panel, T.bind(first + slot), k, slot)
            self._dispatch(place, T.bind(T.min(count - slot, T.int64(self.MR))), self.MR)

    def _dispatch(self, place: _Place, count: Any, rows: int) -> None:
        """The body for exactly `count` rows, 1 <= count <= rows."""
        if rows == 1:
            self._block(place, 1)
            return
        with T.If(count == rows):
            with T.Then():
                self._block(place, rows)
            with T.Else():
                self._dispatch(place, count, rows - 1)

    def _block(self, place: _Place, rows: int) -> None:
        """One slice of k of y[first : first + rows, one panel]."""
        simd, NV, KU, K = self.simd, self.NV, self.KU, self.workload.K
        chains = 1
        while chains * rows * NV < _CHAINS and chains < KU:
            chains *= 2
        acc = [[[simd.reg() for _ in range(NV)] for _ in range(rows)] for _ in range(chains)]
        for register in (r for chain in acc for row in chain for r in row):
            register.v = simd.f32(0)
        if self.slices > 1:
            with T.If(place.slice > 0):
                with T.Then():
                    for m, v in product(range(rows), range(NV)):
                        acc[0][m][v].v = self.scratch[place.slot + m, simd.span(v * simd.lanes)]

        def step(k: Any, chain: list[list[Reg]]) -> None:
            b = [T.bind(self.weight[place.panel, k, simd.span(v * simd.lanes)]) for v in range(NV)]
            for m in range(rows):
                a = T.bind(simd.splat(self.x[place.first + m, k]))
                for v in range(NV):
                    chain[m][v].v = simd.fma(b[v], a, chain[m][v].v)

        def fold() -> None:
            for chain, m, v in product(acc[1:], range(rows), range(NV)):
                acc[0][m][v].v = acc[0][m][v].v + chain[m][v].v

        def finish() -> None:
            for k in range(K // KU * KU, K):
                step(k, acc[k % chains])
            fold()
            self._finish(place.panel, place.first, acc[0])

        begin = place.slice * self.steps
        with T.serial(0, T.min(self.steps, K // KU - begin)) as ko:
            k = (begin + ko) * KU
            if self.ahead:
                for byte in range(0, KU * self.NR * 4, 64):
                    simd.prefetch(self.weight[place.panel, k, (self.ahead + byte) // 4])
            for ku in range(KU):
                step(k + ku, acc[ku % chains])
        if self.slices == 1:
            finish()
            return
        with T.If(place.slice == self.slices - 1):
            with T.Then():
                finish()
            with T.Else():
                fold()
                for m, v in product(range(rows), range(NV)):
                    T.buffer_store(self.scratch, acc[0][m][v].v, [place.slot + m, simd.span(v * simd.lanes)])

    def _finish(self, panel: Any, first: Any, acc: list[list[Reg]]) -> None:
        """Bias, activation, residual, store."""
        simd, activation = self.simd, self.workload.activation
        if self.bias is not None:
            for v in range(self.NV):
                bias = T.bind(self.bias[panel, simd.span(v * simd.lanes)])
                for row in acc:
                    row[v].v = row[v].v + bias
        for row in acc:
            if activation == "silu_mul":
                for gate, up in zip(row[: self.NV // 2], row[self.NV // 2 :], strict=True):
                    gate.v = epilogue.silu_mul(simd, gate.v, up.v)
            else:
                for register in row:
                    register.v = epilogue.apply(simd, activation, register.v)
        left = self.workload.columns - (self.panels - 1) * self.width  # columns of the last panel
        if left == self.width:
            self._store(panel, first, acc, self.width)
            return
        with T.If(panel < self.panels - 1):
            with T.Then():
                self._store(panel, first, acc, self.width)
            with T.Else():
                self._store(panel, first, acc, left)

    def _store(self, panel: Any, first: Any, acc: list[list[Reg]], width: int) -> None:
        lanes = self.simd.lanes
        for m, row in enumerate(acc):
            for v, start in enumerate(range(0, width, lanes)):
                n = min(lanes, width - start)
                value = row[v].v if n == lanes else row[v].part(n)
                at = [first + m, self.simd.span(panel * self.width + start, n)]
                if self.residual is not None:
                    value = value + self.residual[tuple(at)]
                T.buffer_store(self.y, value, at)


DENSE = DenseLinear()
