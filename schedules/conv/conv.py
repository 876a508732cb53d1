"""fp32 convolution over channels-last tensors, as a matrix product that gathers its rows while it reads them.

A pixel of the output is a sum over taps and channels. In the order [B, H, W, C] all that one row of a window reads
lies in one run of KW * C floats, so the body is that of a matrix product: a register block of MR neighbouring pixels
by NV registers of outputs, weights in panels [K, NR] as for a linear layer (`schedules.gemm.dense`), one broadcast of
x for each pixel and step. No matrix of windows is ever written. Pixels of a block lie at constant distances, so that
one address serves them all (compare Georganas et al., "Anatomy of High-Performance Deep Learning Convolutions on SIMD
Architectures", 2018).

Each row of the output is cut into blocks of at most MR pixels (`blocks`); where the width is known and small, a block
is several whole rows. There is a body for each shape of a block that can occur. Every (panel, block)
is one iteration of one parallel loop, panels outermost: threads get equal shares, and a panel is read from the cache by
all blocks. While they do, they fetch the next panel: without that, deep layers, whose weights are many and whose pixels
few, would wait for memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from llmc.schedules import epilogue
from llmc.schedules.base import Arrays, Config, Space, Template, Work, Workload
from llmc.schedules.conv.blocks import choose, cut, flat
from llmc.schedules.conv.reference import convolve
from llmc.schedules.conv.workloads import ConvWorkload
from llmc.schedules.gemm.panels import pack_panels
from llmc.targets.base import Target
from llmc.targets.intrinsics import Opaque, Reg, Simd
from llmc.tvm_shim import IRBuilder, T

_LINE = 64  # bytes of a cache line
_FEW = 16  # blocks of an image, up to which each fetches its part of the next panel
_CHAINS = 8  # independent sums that keep both FMA units busy: 2 a cycle, latency 4


class Conv(Template):
    """Template "conv". Weights in: weight [N, C / groups, KH, KW], bias [N]. Packed: weight [panels, K, NR] with K in
    the order (KH, KW, C / groups), and bias [panels, NR]; each group has its own panels, padded with zeros.

    Knobs: MR pixels by NV registers is the register block, KU the unrolling of the sum.
    """

    name = "conv"

    def accepts(self, workload: Workload, target: Target) -> bool:
        return isinstance(workload, ConvWorkload) and target.kind == "llvm"

    def space(self, workload: ConvWorkload, target: Target) -> Space:
        def valid(config: Config) -> bool:
            MR, NV = int(config["MR"]), int(config["NV"])
            return target.vector_registers > MR * NV + NV

        return Space(
            {"MR": (3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 24, 28), "NV": (1, 2, 3, 4), "KU": (1, 2, 4, 8)}, valid
        )

    def default(self, workload: ConvWorkload, target: Target) -> dict[str, int | str]:
        """The register block that wastes least of the last panel. Of these one that is four registers wide reads least:
        MR + NV loads make MR * NV products. But a panel has to stay in the second-level cache."""
        each, lanes = workload.N // workload.groups, target.lanes
        blocks = [(14, 2), (8, 3), (24, 1)] if target.vector_registers >= 32 else [(6, 2), (4, 3), (12, 1)]
        if target.vector_registers >= 32 and workload.K * 4 * lanes * 4 <= target.l2_bytes // 3:
            blocks.insert(0, (6, 4))
        MR, NV = min(blocks, key=lambda b: -(-each // (b[1] * lanes)) * b[1])
        return {"MR": MR, "NV": NV, "KU": 4}

    def prepack(self, weights: Mapping[str, Any], workload: ConvWorkload, config: Config, target: Target) -> Arrays:
        NR = int(config["NV"]) * target.lanes
        packed = {"weight": weight_panels(workload, weights["weight"], NR).astype(np.float32, copy=False)}
        if workload.bias:
            packed["bias"] = bias_panels(workload, weights["bias"], NR).astype(np.float32, copy=False)
        return packed

    def layout(self, workload: ConvWorkload, config: Config, target: Target) -> str:
        return f"conv.{int(config['NV']) * target.lanes}.{workload.groups}"

    def build(self, workload: ConvWorkload, target: Target, config: Config) -> Any:
        return ConvKernel(workload, target, config).build()

    def reference(self, workload: ConvWorkload, inputs: Mapping[str, np.ndarray], weights: Mapping[str, Any]) -> Arrays:
        w = workload
        y = convolve(inputs["x"], weights["weight"], (w.SH, w.SW), (w.DH, w.DW), w.groups)
        y = y + weights["bias"] if w.bias else y
        return {"y": epilogue.reference(w.activation, y + inputs["residual"] if w.residual else y)}

    def work(self, workload: ConvWorkload, dims: Mapping[str, int]) -> Work:
        w, B = workload, dims["B"]
        pixels = B * (w.OH or dims["OH"]) * (w.OW or dims["OW"])
        x = B * (w.H or dims["H"]) * (w.W or dims["W"]) * w.C
        return Work(ops=2 * pixels * w.N * w.K, bytes=4 * (w.N * w.K + x + pixels * w.N * (1 + w.residual)))

    def example_weights(self, workload: ConvWorkload, rng: np.random.Generator) -> dict[str, Any]:
        w = workload
        weight = rng.standard_normal((w.N, w.C // w.groups, w.KH, w.KW), np.float32)
        return {"weight": weight, "bias": rng.standard_normal(w.N, np.float32)}

    def corners(self, workload: ConvWorkload) -> Sequence[Mapping[str, int]]:
        if workload.H and workload.W:
            return [{"B": B} for B in (1, 2, 3)]
        return [workload.sizes(B, OH, OW) for B, OH in ((1, 3), (2, 1)) for OW in (*range(1, 18), 31)]


def weight_panels(w: ConvWorkload, weight: np.ndarray, NR: int) -> np.ndarray:
    """[N, C / groups, KH, KW], or without KH where that is 1, -> [panels, K, NR]."""
    rows = np.asarray(weight).reshape(w.N, -1, w.KH, w.KW).transpose(0, 2, 3, 1)
    groups = rows.reshape(w.groups, w.N // w.groups, w.K)
    return np.concatenate([pack_panels(group, NR) for group in groups])


def bias_panels(w: ConvWorkload, bias: np.ndarray, NR: int) -> np.ndarray:
    """[N] -> [panels, NR]."""
    groups = np.asarray(bias).reshape(w.groups, -1, 1)
    return np.concatenate([pack_panels(group, NR)[:, 0] for group in groups])


@dataclass(frozen=True)
class _Block:
    """Where a body works: its panel, its number among the panel's blocks, and where x and y begin."""

    panel: Any
    place: Any
    x: Any
    y: Any


class ConvKernel:
    """One kernel under construction: what the pieces of its body share. Numbers and their products are the float32
    kernel's; `integer` has others."""

    name = "conv"
    unit = 1  # terms of a sum that one multiplication takes
    dtypes: Mapping[str, str] = {"x": "float32", "weight": "float32", "bias": "float32", "y": "float32"}

    def __init__(self, workload: ConvWorkload, target: Target, config: Config) -> None:
        self.workload, self.simd = workload, Simd(target)
        self.MR, self.NV, self.KU = int(config["MR"]), int(config["NV"]), int(config["KU"])
        self.NR = self.NV * self.simd.lanes
        self.each = workload.N // workload.groups  # outputs of one group
        self.panels = -(-self.each // self.NR)  # of one group
        # A window is `runs` pieces of `run` floats: whole rows where the channels of neighbouring taps are neighbours.
        whole = workload.groups == 1 and workload.DW == 1
        channels = workload.C // workload.groups
        self.taps = (workload.KH, 1) if whole else (workload.KH, workload.KW)
        run = workload.KW * channels if whole else channels
        self.run, self.units = run, run // self.unit
        w = workload
        self.rows = min(w.OH, max(1, self.MR // w.OW)) if w.OH and w.OW else 1  # of one block
        # Prefetches in a step, such that one image's blocks fetch a panel. Where blocks are many, the first one's
        # waiting weighs little, and less than the prefetches of all the others.
        blocks = -(-w.OH // self.rows) * -(-w.OW // self.MR) if w.OH and w.OW else 0
        lines = self.KU * self.NR * 4 // _LINE
        self.fetches = -(-lines // blocks) if 0 < blocks <= _FEW and target.l1_bytes < 4 * w.K * self.NR else 0

    def build(self) -> Any:
        w = self.workload
        panels = w.groups * self.panels
        with IRBuilder() as ib:
            with T.prim_func(s_tir=True):
                T.func_name(self.name)
                T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
                inputs = {arg.name: T.arg(arg.name, T.handle()) for arg in w.inputs()}
                packed = (panels, w.K // self.unit, self.unit * self.NR)
                self.weight = T.arg("weight", T.Buffer(packed, self.dtypes["weight"]))
                self.bias = T.arg("bias", T.Buffer((panels, self.NR), self.dtypes["bias"])) if w.bias else None
                y = T.arg("y", T.handle())
                B, H, W = T.int64(), w.H or T.int64(), w.W or T.int64()
                OH, OW = w.OH or T.int64(), w.OW or T.int64()
                out = (B, OH, OW, w.N)
                handles = {"x": (inputs["x"], (B, H, W, w.C)), "y": (y, out)}
                if w.residual:
                    handles["residual"] = inputs["residual"], out
                buffers = {
                    name: T.match_buffer(handle, shape, self.dtypes["x" if name == "x" else "y"])
                    for name, (handle, shape) in handles.items()
                }
                runs = {name: flat(buffer) for name, buffer in buffers.items()}
                self.x, self.y, self.residual = runs["x"], runs["y"], runs.get("residual")
                self.W, self.OW = W, OW
                groups, row = T.bind(T.ceildiv(OH, T.int64(self.rows))), cut(OW, self.MR, Opaque())
                each = T.bind(B * groups * row.count)
                with T.parallel(0, each * panels) as task:
                    opaque = Opaque()
                    panel, place = T.bind(T.floordiv(task, each)), T.bind(T.floormod(task, each))
                    line, block = T.bind(T.floordiv(place, row.count)), T.bind(T.floormod(place, row.count))
                    b, top = T.bind(T.floordiv(line, groups)), T.bind(T.floormod(line, groups) * self.rows)
                    left, count = row.block(block, opaque)
                    height = T.bind(T.min(OH - top, T.int64(self.rows)))
                    heights = [r for r in (self.rows, w.OH % self.rows) if r]
                    first = opaque(((b * H + top * w.SH) * W + left * w.SW) * w.C)
                    into = opaque(((b * OH + top) * OW + left) * w.N)
                    self._choose(_Block(panel, place, first, into), (height, heights), (count, row.lengths))
        return ib.get()

    def _choose(self, at: _Block, height: tuple[Any, Sequence[int]], width: tuple[Any, Sequence[int]]) -> None:
        """The body for a block of that height and width; each is a value, and what it can be."""
        choose(*height, lambda rows: choose(*width, lambda columns: self._block(at, rows, columns)))

    def _block(self, at: _Block, rows: int, columns: int) -> None:
        """One panel's outputs of rows x columns pixels."""
        w, NV, KU, units = self.workload, self.NV, self.KU, self.units
        pixels = list(product(range(rows), range(columns)))
        chains = 1
        while chains * len(pixels) * NV < _CHAINS and chains < KU:
            chains *= 2
        acc = [[[self.zero() for _ in range(NV)] for _ in pixels] for _ in range(chains)]
        group = T.bind(T.floordiv(at.panel, T.int64(self.panels))) if w.groups > 1 else 0
        start = T.bind(at.x + group * (w.C // w.groups))

        def step(tap: Any, x: Any, k: Any, chain: list[list[Reg]]) -> None:
            """The k-th multiplication of all sums in a tap's run, which for the first pixel begins at x."""
            weight = [T.bind(self.weights(at.panel, tap * units + k, v)) for v in range(NV)]
            for (i, j), sums in zip(pixels, chain, strict=True):
                a = T.bind(self.pixel(x + (i * w.SH * self.W + j * w.SW) * w.C + k * self.unit))
                for v in range(NV):
                    sums[v].v = self.multiply(weight[v], a, sums[v].v)

        steps = units // KU
        with T.serial(0, self.taps[0]) as kh, T.serial(0, self.taps[1]) as kw:
            tap = kh * self.taps[1] + kw
            x = T.bind(start + (kh * w.DH * self.W + kw * w.DW) * w.C)
            with T.serial(0, steps) as ko:
                if self.fetches:
                    self._fetch(at, (at.place * self.taps[0] * self.taps[1] + tap) * steps + ko)
                for ku in range(KU):
                    step(tap, x, ko * KU + ku, acc[ku % chains])
            for k in range(units // KU * KU, units):
                step(tap, x, k, acc[k % chains])
        for chain, m, v in product(acc[1:], range(len(pixels)), range(NV)):
            acc[0][m][v].v = acc[0][m][v].v + chain[m][v].v
        self._finish(at, group, pixels, acc[0])

    # -- numbers ------------------------------------------------------------------------------------------------
    def zero(self) -> Reg:
        register = self.simd.reg()
        register.v = self.simd.f32(0)
        return register

    def weights(self, panel: Any, k: Any, v: int) -> Any:
        return self.weight[panel, k, self.simd.span(v * self.simd.lanes)]

    def pixel(self, at: Any) -> Any:
        """The number of x at `at`, in every lane."""
        return self.simd.splat(self.x[at])

    def multiply(self, weight: Any, x: Any, acc: Any) -> Any:
        return self.simd.fma(weight, x, acc)

    def activate(self, value: Any) -> Any:
        return epilogue.apply(self.simd, self.workload.activation, value)

    # -- pieces of a body ---------------------------------------------------------------------------------------
    def _fetch(self, at: _Block, step: Any) -> None:
        """Step `step` of all that a panel's blocks take fetches its part of the next panel, as long as there is one."""
        each = _LINE * self.unit // 4  # elements of a line: 16 floats, or 64 bytes that are multiplied by fours
        last = self.workload.K * self.NR // each - 1
        for i in range(self.fetches):
            line = T.min(step * self.fetches + i, T.int64(last))
            self.simd.prefetch(self.weight[at.panel + 1, 0, line * each])

    def _finish(self, at: _Block, group: Any, pixels: list[tuple[int, int]], acc: list[list[Reg]]) -> None:
        """Bias, residual, activation, store."""
        simd = self.simd
        if self.bias is not None:
            for v in range(self.NV):
                bias = T.bind(self.bias[at.panel, simd.span(v * simd.lanes)])
                for pixel in acc:
                    pixel[v].v = pixel[v].v + bias
        inside = T.bind(at.panel - group * self.panels) if self.workload.groups > 1 else at.panel
        y = T.bind(at.y + group * self.each + inside * self.NR)
        left = self.each - (self.panels - 1) * self.NR  # outputs in a group's last panel
        if left == self.NR:
            self._store(y, pixels, acc, self.NR)
            return
        with T.If(inside < self.panels - 1):
            with T.Then():
                self._store(y, pixels, acc, self.NR)
            with T.Else():
                self._store(y, pixels, acc, left)

    def _store(self, y: Any, pixels: list[tuple[int, int]], acc: list[list[Reg]], width: int) -> None:
        simd = self.simd
        for (i, j), pixel in zip(pixels, acc, strict=True):
            for v, start in enumerate(range(0, width, simd.lanes)):
                n = min(simd.lanes, width - start)
                place = simd.span(y + (i * self.OW + j) * self.workload.N + start, n)
                if self.residual is not None and n == simd.lanes:
                    pixel[v].v = pixel[v].v + self.residual[place]
                elif self.residual is not None:
                    part = simd.reg()
                    part.v = pixel[v].v
                    T.buffer_store(part.buffer, part.buffer[simd.span(0, n)] + self.residual[place], [simd.span(0, n)])
                    pixel[v] = part
                pixel[v].v = self.activate(pixel[v].v)
                T.buffer_store(self.y, pixel[v].v if n == simd.lanes else pixel[v].part(n), [place])


CONV = Conv()
