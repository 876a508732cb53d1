"""fp32 convolution over channels-last tensors, as a matrix product that gathers its rows while it reads them.

A pixel of the output is a sum over taps and channels. In the order [B, H, W, C] all that one row of a window reads
lies in one run of KW * C floats, so the body is that of a matrix product: a register block of MR neighbouring pixels
by NV registers of outputs, weights in panels [K, NR] as for a linear layer (`schedules.gemm.dense`), one broadcast of
x for each pixel and step. No matrix of windows is ever written. Pixels of a block lie at constant distances, so that
one address serves them all (compare Georganas et al., "Anatomy of High-Performance Deep Learning Convolutions on SIMD
Architectures", 2018).

Each row of the output is cut into blocks of nearly equal length, at most MR: there is a body for each length that can
occur, which is two where the width is known. Every (panel, row, block) is one iteration of one parallel loop, panels
outermost: threads get equal shares, and a panel is read from the cache by all blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np

from llmc.schedules import epilogue
from llmc.schedules.base import Arrays, Config, Space, Template, Work, Workload
from llmc.schedules.conv.reference import convolve
from llmc.schedules.conv.workloads import ConvWorkload
from llmc.schedules.gemm.panels import pack_panels
from llmc.targets.base import Target
from llmc.targets.intrinsics import Reg, Simd
from llmc.tvm_shim import IRBuilder, T

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

        return Space({"MR": (3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 24), "NV": (1, 2, 3, 4), "KU": (1, 2, 4, 8)}, valid)

    def default(self, workload: ConvWorkload, target: Target) -> dict[str, int | str]:
        """The register block that wastes least of the last panel; of these the one that reads least, which is two
        registers wide where there are 32: MR + NV loads make MR * NV products."""
        each, lanes = workload.N // workload.groups, target.lanes
        blocks = ((14, 2), (8, 3), (6, 4), (24, 1)) if target.vector_registers >= 32 else ((6, 2), (4, 3), (12, 1))
        MR, NV = min(blocks, key=lambda b: -(-each // (b[1] * lanes)) * b[1])
        return {"MR": MR, "NV": NV, "KU": 4}

    def prepack(self, weights: Mapping[str, Any], workload: ConvWorkload, config: Config, target: Target) -> Arrays:
        w, NR = workload, int(config["NV"]) * target.lanes
        rows = np.asarray(weights["weight"]).transpose(0, 2, 3, 1).reshape(w.groups, w.N // w.groups, w.K)
        packed = {"weight": np.concatenate([pack_panels(group, NR) for group in rows])}
        if w.bias:
            groups = np.asarray(weights["bias"]).reshape(w.groups, -1, 1)
            packed["bias"] = np.concatenate([pack_panels(group, NR)[:, 0] for group in groups])
        return packed

    def layout(self, workload: ConvWorkload, config: Config, target: Target) -> str:
        return f"conv.{int(config['NV']) * target.lanes}.{workload.groups}"

    def build(self, workload: ConvWorkload, target: Target, config: Config) -> Any:
        return _Kernel(workload, target, config).build()

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


class _Kernel:
    """One kernel under construction: what the pieces of its body share."""

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
        self.run = workload.KW * channels if whole else channels

    def build(self) -> Any:
        w = self.workload
        panels = w.groups * self.panels
        with IRBuilder() as ib:
            with T.prim_func(s_tir=True):
                T.func_name("conv")
                T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
                inputs = {arg.name: T.arg(arg.name, T.handle()) for arg in w.inputs()}
                self.weight = T.arg("weight", T.Buffer((panels, w.K, self.NR), "float32"))
                self.bias = T.arg("bias", T.Buffer((panels, self.NR), "float32")) if w.bias else None
                y = T.arg("y", T.handle())
                B, H, W = T.int64(), w.H or T.int64(), w.W or T.int64()
                OH, OW = w.OH or T.int64(), w.OW or T.int64()
                self.x = T.match_buffer(inputs["x"], (B, H, W, w.C), "float32")
                out = (B, OH, OW, w.N)
                self.residual = T.match_buffer(inputs["residual"], out, "float32") if w.residual else None
                self.y = T.match_buffer(y, out, "float32")
                blocks = -(-w.OW // self.MR) if w.OW else T.bind(T.ceildiv(OW, T.int64(self.MR)))
                rows = T.bind(B * OH)
                with T.parallel(0, rows * blocks * panels) as task:
                    place, block = T.bind(T.floordiv(task, blocks)), T.bind(T.floormod(task, blocks))
                    panel, row = T.bind(T.floordiv(place, rows)), T.bind(T.floormod(place, rows))
                    at = (T.bind(T.floordiv(row, OH)), T.bind(T.floormod(row, OH)))
                    first = T.bind(T.floordiv(block * OW, blocks))
                    count = T.bind(T.floordiv((block + 1) * OW, blocks) - first)
                    self._dispatch(panel, at, first, count, self._lengths())
        return ib.get()

    def _lengths(self) -> list[int]:
        """The numbers of pixels that a block can have, largest first."""
        if not (OW := self.workload.OW):
            return list(range(self.MR, 0, -1))
        blocks = -(-OW // self.MR)
        return sorted({OW // blocks, -(-OW // blocks)}, reverse=True)

    def _dispatch(self, panel: Any, at: tuple[Any, Any], first: Any, count: Any, lengths: list[int]) -> None:
        """The body for exactly `count` pixels, one of `lengths`."""
        if len(lengths) == 1:
            self._block(panel, at, first, lengths[0])
            return
        with T.If(count == lengths[0]):
            with T.Then():
                self._block(panel, at, first, lengths[0])
            with T.Else():
                self._dispatch(panel, at, first, count, lengths[1:])

    def _block(self, panel: Any, at: tuple[Any, Any], first: Any, count: int) -> None:
        """y[b, oh, first : first + count, one panel], at = (b, oh)."""
        w, simd, NV, KU, run = self.workload, self.simd, self.NV, self.KU, self.run
        chains = 1
        while chains * count * NV < _CHAINS and chains < KU:
            chains *= 2
        acc = [[[simd.reg() for _ in range(NV)] for _ in range(count)] for _ in range(chains)]
        for register in (r for chain in acc for pixel in chain for r in pixel):
            register.v = simd.f32(0)
        group = T.bind(T.floordiv(panel, T.int64(self.panels))) if w.groups > 1 else 0
        b, oh = at
        left = T.bind(first * w.SW)

        def step(kh: Any, kw: Any, k: Any, chain: list[list[Reg]]) -> None:
            """One term of all sums: the k-th float of the run of tap (kh, kw)."""
            at = (kh * self.taps[1] + kw) * run + k
            weight = [T.bind(self.weight[panel, at, simd.span(v * simd.lanes)]) for v in range(NV)]
            for m in range(count):
                c = group * (w.C // w.groups) + k
                a = T.bind(simd.splat(self.x[b, oh * w.SH + kh * w.DH, left + kw * w.DW + m * w.SW, c]))
                for v in range(NV):
                    chain[m][v].v = simd.fma(weight[v], a, chain[m][v].v)

        with T.serial(0, self.taps[0]) as kh, T.serial(0, self.taps[1]) as kw:
            with T.serial(0, run // KU) as ko:
                for ku in range(KU):
                    step(kh, kw, ko * KU + ku, acc[ku % chains])
            for k in range(run // KU * KU, run):
                step(kh, kw, k, acc[k % chains])
        for chain, m, v in product(acc[1:], range(count), range(NV)):
            acc[0][m][v].v = acc[0][m][v].v + chain[m][v].v
        self._finish(panel, group, (b, oh, first), acc[0])

    def _finish(self, panel: Any, group: Any, at: tuple[Any, Any, Any], acc: list[list[Reg]]) -> None:
        """Bias, residual, activation, store."""
        simd = self.simd
        if self.bias is not None:
            for v in range(self.NV):
                bias = T.bind(self.bias[panel, simd.span(v * simd.lanes)])
                for pixel in acc:
                    pixel[v].v = pixel[v].v + bias
        inside = T.bind(panel - group * self.panels) if self.workload.groups > 1 else panel
        channel = T.bind(group * self.each + inside * self.NR)
        left = self.each - (self.panels - 1) * self.NR  # outputs in a group's last panel
        if left == self.NR:
            self._store(at, channel, acc, self.NR)
            return
        with T.If(inside < self.panels - 1):
            with T.Then():
                self._store(at, channel, acc, self.NR)
            with T.Else():
                self._store(at, channel, acc, left)

    def _store(self, at: tuple[Any, Any, Any], channel: Any, acc: list[list[Reg]], width: int) -> None:
        simd, activation = self.simd, self.workload.activation
        b, oh, first = at
        for m, pixel in enumerate(acc):
            for v, start in enumerate(range(0, width, simd.lanes)):
                n = min(simd.lanes, width - start)
                place = (b, oh, first + m, simd.span(channel + start, n))
                if self.residual is not None and n == simd.lanes:
                    pixel[v].v = pixel[v].v + self.residual[place]
                elif self.residual is not None:
                    part = simd.reg()
                    part.v = pixel[v].v
                    T.buffer_store(part.buffer, part.buffer[simd.span(0, n)] + self.residual[place], [simd.span(0, n)])
                    pixel[v] = part
                pixel[v].v = epilogue.apply(simd, activation, pixel[v].v)
                T.buffer_store(self.y, pixel[v].v if n == simd.lanes else self._part(pixel[v], n), list(place))

    def _part(self, register: Reg, n: int) -> Any:
        """The first n lanes. They are taken from a copy, or LLVM would keep the accumulator itself in memory."""
        copy = self.simd.reg()
        copy.v = register.v
        return copy.buffer[self.simd.span(0, n)]


CONV = Conv()
