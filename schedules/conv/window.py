"""Depthwise convolution and pooling over channels-last tensors: vectors of channels, windows of pixels.

A register block is MR neighbouring pixels of one row by NV registers of channels. Each register of x that the block's
windows see is loaded once and goes into every pixel whose window it is in. Rows of a window that hang over an edge are
left out by the bounds of a loop; columns by a test of each, in blocks at the edges only. Where the last registers of
channels would hang over, they are moved back: some channels are computed twice, to the same values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from llmc.schedules import epilogue
from llmc.schedules.base import Arrays, Config, Space, Template, Work, Workload
from llmc.schedules.conv.blocks import cut, flat
from llmc.schedules.conv.reference import slide
from llmc.schedules.conv.workloads import WindowWorkload
from llmc.targets.base import Target
from llmc.targets.intrinsics import Opaque, Reg, Simd
from llmc.tvm_shim import IRBuilder, T

_LOWEST = float("-inf")
_GRAIN = 1 << 15  # products below which a call stays on its thread


class WindowTemplate(Template):
    """Template "window". Weights in, for depthwise: weight [C, 1, KH, KW], bias [C]. Packed: weight [KH, KW, C], bias.

    Knobs: MR pixels by NV registers of channels is the register block.
    """

    name = "window"

    def accepts(self, workload: Workload, target: Target) -> bool:
        return isinstance(workload, WindowWorkload) and target.kind == "llvm"

    def space(self, workload: WindowWorkload, target: Target) -> Space:
        def valid(config: Config) -> bool:
            MR, NV = int(config["MR"]), int(config["NV"])
            return (NV == 1 or NV * target.lanes <= workload.C) and target.vector_registers >= MR * NV + 2 * NV

        return Space({"MR": (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14), "NV": (1, 2, 4)}, valid)

    def default(self, workload: WindowWorkload, target: Target) -> dict[str, int | str]:
        wide = 2 * target.lanes <= workload.C
        return {"MR": (7 if wide else 8) if target.vector_registers >= 32 else 4, "NV": 2 if wide else 1}

    def prepack(self, weights: Mapping[str, Any], workload: WindowWorkload, config: Config, target: Target) -> Arrays:
        if workload.kind != "depthwise":
            return {}
        weight = np.asarray(weights["weight"]).reshape(-1, workload.KH, workload.KW)
        packed = {"weight": np.ascontiguousarray(weight.transpose(1, 2, 0))}
        return packed | ({"bias": np.ascontiguousarray(weights["bias"])} if workload.bias else {})

    def layout(self, workload: WindowWorkload, config: Config, target: Target) -> str:
        return "depthwise"

    def build(self, workload: WindowWorkload, target: Target, config: Config) -> Any:
        return _Kernel(workload, target, config).build()

    def reference(
        self, workload: WindowWorkload, inputs: Mapping[str, np.ndarray], weights: Mapping[str, Any]
    ) -> Arrays:
        return {"y": slide(workload, inputs["x"], weights)}

    def work(self, workload: WindowWorkload, dims: Mapping[str, int]) -> Work:
        w, B = workload, dims["B"]
        x = B * (w.H or dims["H"]) * (w.W or dims["W"]) * w.C
        y = B * (w.OH or dims["OH"]) * (w.OW or dims["OW"]) * w.C
        weight = w.C * w.KH * w.KW if w.kind == "depthwise" else 0
        return Work(ops=(2 if w.kind == "depthwise" else 1) * y * w.KH * w.KW, bytes=4 * (x + y + weight))

    def example_weights(self, workload: WindowWorkload, rng: np.random.Generator) -> dict[str, Any]:
        w = workload
        if w.kind != "depthwise":
            return {}
        weight = rng.standard_normal((w.C, 1, w.KH, w.KW), np.float32)
        return {"weight": weight, "bias": rng.standard_normal(w.C, np.float32)}

    def corners(self, workload: WindowWorkload) -> Sequence[Mapping[str, int]]:
        if workload.H and workload.W:
            return [workload.sizes(B, workload.OH, workload.OW) for B in (1, 2, 3)]
        return [workload.sizes(B, OH, OW) for B, OH in ((1, 3), (2, 1)) for OW in (*range(1, 18), 31)]


@dataclass(frozen=True)
class _Block:
    """Where a body works: where x and y begin (for the first pixel's window, be that outside), the first column of that
    window, the rows low..high of windows that are inside of x, and the first channel."""

    x: Any
    y: Any
    left: Any
    low: Any
    high: Any
    channel: Any


class _Kernel:
    """One kernel under construction: what the pieces of its body share."""

    def __init__(self, workload: WindowWorkload, target: Target, config: Config) -> None:
        self.workload, self.simd = workload, Simd(target)
        self.MR, self.NV = int(config["MR"]), int(config["NV"])
        self.width = min(self.simd.lanes, workload.C)  # channels of one register
        self.taken = self.NV * self.width  # of one block
        self.chunks = -(-workload.C // self.taken)

    def build(self) -> Any:
        w = self.workload
        with IRBuilder() as ib:
            with T.prim_func(s_tir=True):
                T.func_name("window")
                T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
                x = T.arg("x", T.handle())
                if w.kind == "depthwise":
                    self.weight = T.arg("weight", T.Buffer((w.KH, w.KW, w.C), "float32"))
                self.bias = T.arg("bias", T.Buffer((w.C,), "float32")) if w.bias else None
                y = T.arg("y", T.handle())
                B, self.H, self.W = T.int64(), w.H or T.int64(), w.W or T.int64()
                OH, OW = w.OH or T.int64(), w.OW or T.int64()
                images = T.match_buffer(x, (B, self.H, self.W, w.C), "float32")
                results = T.match_buffer(y, (B, OH, OW, w.C), "float32")
                self.x, self.y = flat(images), flat(results)
                self._rows(B, OH, OW)
        return ib.get()

    def _rows(self, B: Any, OH: Any, OW: Any) -> None:
        """All rows, in parallel, unless it is known that images are small, and there are few of them."""
        w = self.workload
        tasks = T.bind(B * OH * T.int64(self.chunks))
        products = w.OH * w.OW * w.C * w.KH * w.KW  # of one image; 0 where they are not known
        if not 0 < products < _GRAIN:
            with T.parallel(0, tasks) as task:
                self._row(task, OH, OW)
            return
        with T.If(B * T.int64(products) < T.int64(_GRAIN)):
            with T.Then():
                with T.serial(0, tasks) as task:
                    self._row(task, OH, OW)
            with T.Else():
                with T.parallel(0, tasks) as task:
                    self._row(task, OH, OW)

    def _row(self, task: Any, OH: Any, OW: Any) -> None:
        """One block of channels of one row of y."""
        w = self.workload
        self.opaque = opaque = Opaque()
        row, chunk = T.bind(T.floordiv(task, T.int64(self.chunks))), T.bind(T.floormod(task, T.int64(self.chunks)))
        b, oh = T.bind(T.floordiv(row, OH)), T.bind(T.floormod(row, OH))
        top = T.bind(oh * w.SH - w.top)  # may be negative: rows above x
        low = opaque(_steps(-top, w.DH)) if w.top else 0
        high = opaque(T.min(_steps(self.H - top, w.DH), T.int64(w.KH)))
        channel = opaque(T.min(chunk * self.taken, T.int64(w.C - self.taken)))

        def block(first: Any, count: int) -> None:
            left = opaque(first * w.SW - w.left)
            x = opaque(((b * self.H + top) * self.W + left) * w.C + channel)
            y = opaque((row * OW + first) * w.C + channel)
            self._edges(_Block(x, y, left, low, high, channel), count)

        cut(OW, self.MR, opaque).each(opaque, block)

    def _edges(self, at: _Block, count: int) -> None:
        """A body without tests where all windows of the block are inside of x, and one with."""
        w = self.workload
        span = (count - 1) * w.SW + (w.KW - 1) * w.DW + 1
        with T.If(T.And(at.left >= 0, at.left + span <= self.W)):
            with T.Then():
                self._block(at, count, tested=False)
            with T.Else():
                self._block(at, count, tested=True)

    def _block(self, at: _Block, count: int, tested: bool) -> None:
        w, NV = self.workload, self.NV
        acc = [[Reg(self.width) for _ in range(NV)] for _ in range(count)]
        for pixel, v in product(acc, range(NV)):
            pixel[v].v = self._splat(_LOWEST if w.kind == "max" else 0)
        with T.serial(at.low, at.high) as kh:
            x = self.opaque(at.x + kh * w.DH * self.W * w.C)
            for column in sorted({m * w.SW + kw * w.DW for m in range(count) for kw in range(w.KW)}):
                readers = [(m, kw) for m, kw in product(range(count), range(w.KW)) if m * w.SW + kw * w.DW == column]
                if not tested:
                    self._column(at, kh, x + column * w.C, readers, acc)
                    continue
                with T.If(T.And(at.left + column >= 0, at.left + column < self.W)):
                    with T.Then():
                        self._column(at, kh, x + column * w.C, readers, acc)
        for m, pixel in enumerate(acc):
            scale = self._share(at, m) if w.kind == "average" else None
            for v in range(NV):
                value = pixel[v].v
                if scale is not None:
                    value = value * scale
                if self.bias is not None:
                    value = value + self.bias[self.simd.span(at.channel + v * self.width, self.width)]
                place = self.simd.span(at.y + m * w.C + v * self.width, self.width)
                T.buffer_store(self.y, self._activation(value), [place])

    def _column(self, at: _Block, kh: Any, x: Any, readers: list[tuple[int, int]], acc: list[list[Reg]]) -> None:
        """One pixel of x goes into the windows (m, kw) that see it."""
        w = self.workload
        for v in range(self.NV):
            span = self.simd.span(at.channel + v * self.width, self.width)
            value = T.bind(self.x[self.simd.span(x + v * self.width, self.width)])
            for m, kw in readers:
                if w.kind == "depthwise":
                    acc[m][v].v = self.simd.fma(value, self.weight[kh, kw, span], acc[m][v].v, self.width)
                else:
                    acc[m][v].v = T.max(acc[m][v].v, value) if w.kind == "max" else acc[m][v].v + value

    def _share(self, at: _Block, m: int) -> Any:
        """One over the number of places that count in the window of pixel m."""
        w = self.workload
        if w.count_pad:
            return self._splat(1 / (w.KH * w.KW))
        start = T.bind(at.left + m * w.SW)
        low = _steps(-start, w.DW)
        high = T.min(_steps(self.W - start, w.DW), T.int64(w.KW))
        places = T.max((at.high - at.low) * (high - low), T.int64(1))
        return self.simd.splat(T.bind(T.float32(1) / T.Cast("float32", places)), self.width)

    def _splat(self, value: float) -> Any:
        return self.simd.f32(value, self.width)

    def _activation(self, value: Any) -> Any:
        """The workload's activation. Vectors that are not a whole register take a detour through one."""
        kind = self.workload.activation
        if kind == "none" or self.width == self.simd.lanes:
            return epilogue.apply(self.simd, kind, T.bind(value))
        whole = self.simd.reg()
        whole.v = self.simd.f32(0)
        T.buffer_store(whole.buffer, value, [self.simd.span(0, self.width)])
        whole.v = epilogue.apply(self.simd, kind, whole.v)
        return whole.buffer[self.simd.span(0, self.width)]


def _steps(distance: Any, step: int) -> Any:
    """How many steps until a distance is covered; none if it is negative.

    Simplification makes differences of this that can be negative: `with_plain_division` leaves their divisions alone.
    """
    room = T.max(distance, T.int64(0))
    return room if step == 1 else T.floordiv(room + (step - 1), T.int64(step))


WINDOW = WindowTemplate()
