"""Low-bit weights times int8 activations: integer dot products inside a group, float sums across groups."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llmc.schedules.base import Config
from llmc.schedules.formats import STEPS, whole_table
from llmc.schedules.gemm.activations import Quantized, Quantizer
from llmc.schedules.gemm.lowbit_kernel import Block, LowBitKernel
from llmc.schedules.gemm.packing import Piece
from llmc.targets.base import Target
from llmc.targets.dot import ByteDot
from llmc.targets.intrinsics import Reg
from llmc.tvm_shim import T

if TYPE_CHECKING:
    from llmc.schedules.gemm.lowbit import LowBitLinearWorkload

_SIGN = 128  # added to a table's values, so that they are unsigned bytes
_SERIAL = 1 << 14  # values that one thread quantises sooner (about 1 us) than it wakes others


class Int8Kernel(LowBitKernel):
    """y = sum over groups of (scale * x_scale) * dot(codes, xq) [+ (-zero * scale) * x_scale * sum(xq)].

    A zero point that all groups share starts the integer sums at -zero * sum(xq) instead, which costs nothing.
    """

    def __init__(self, workload: LowBitLinearWorkload, target: Target, config: Config) -> None:
        super().__init__(workload, target, config)
        self.dot = ByteDot(self.simd, 8 if workload.table else workload.bits)
        zero = _SIGN if workload.table else int(workload.zero)
        offset = self.dot.offset - (zero if workload.symmetric else 0)
        self.quantizer = Quantizer(self.simd, workload.K, self.layout.group, offset, totals=not workload.symmetric)

    def registers(self, rows: int, blocks: int) -> int:
        sums = rows * blocks * (1 if self.layout.groups == 1 else 2)
        return sums + blocks

    def activations(self, M: Any) -> Quantized:
        out = self.quantizer.allocate(M)
        few = max(1, _SERIAL // self.workload.K)
        with T.If(T.int64(few) >= M):
            with T.Then(), T.serial(0, M) as m:
                self.quantize_row(out, m)
            with T.Else(), T.parallel(0, M) as m:
                self.quantize_row(out, m)
        return out

    def quantize_row(self, out: Quantized, m: Any) -> None:
        self.quantizer.row(self.x, out, m)

    def multiply(self, x: Quantized, panel: Any, first: Any, rows: int, blocks: list[Any], ahead: int) -> Block:
        acc = self.zeros(rows, len(blocks))
        if self.layout.groups == 1:
            self._group(x, panel, first, blocks, 0, acc, ahead)
        else:
            with T.serial(0, self.layout.groups) as g:
                for block in blocks:
                    self.prefetch_planes(block, g, ahead)
                self._group(x, panel, first, blocks, g, acc, ahead)
        return acc

    def _group(self, x: Quantized, panel: Any, first: Any, blocks: list[Any], g: Any, acc: Block, ahead: int) -> None:
        """acc += one group's products."""
        simd = self.simd
        sums = [[simd.reg("int32") for _ in row] for row in acc]
        for m, row in enumerate(sums):
            start = simd.i32(0) if x.start is None else T.bind(simd.splat(x.start[first + m, g]))
            for register in row:
                register.v = start

        layout = self.layout

        def step(unit: Any, units: int) -> None:
            k = g * layout.group + unit * (4 * layout.unit_quads)
            quads = [
                lambda m, t=t: simd.broadcast_quad(x.q, first + m, k + t * 4)  # type: ignore[misc]
                for t in range(units * layout.unit_quads)
            ]
            self.dot.accumulate(sums, self._codes(panel, blocks, g, unit, units, ahead), quads)

        units = self.KU // layout.unit_quads
        whole, left = divmod(layout.units, units)
        if whole == 1:
            step(0, units)
        elif whole:
            with T.serial(0, whole) as s:
                step(s * units, units)
        if left:
            step(whole * units, left)

        for v, block in enumerate(blocks):
            scale = self.scales(block, g)
            zero = None if self.zero is None else self.shifts(block, g)
            for m, row in enumerate(acc):
                self.add_group(row[v], sums[m][v].v, scale, zero, x, first + m, g)

    def add_group(self, total: Reg, sums: Any, scale: Any, zero: Any | None, x: Quantized, m: Any, g: Any) -> None:
        """total += the integer sums of row m and group g, scaled."""
        simd = self.simd
        sums = T.Cast(f"float32x{simd.lanes}", sums)
        total.v = simd.fma(sums, scale * simd.splat(x.scale[m, g]), total.v)
        if zero is not None and x.total is not None:
            total.v = simd.fma(zero, simd.splat(x.total[m, g]), total.v)

    def _codes(
        self, panel: Any, blocks: list[Any], g: Any, unit: Any, units: int, ahead: int
    ) -> list[Callable[[int], Any]]:
        """For each quad of k in `units` units from `unit`: which codes row block v multiplies it with.

        A unit's lines are loaded when its first quad is asked for, and taken apart in registers: expanding a panel
        once for all rows costs as much traffic from L2 as it saves instructions.
        """
        loaded: dict[tuple[int, int], list[Any]] = {}

        def code(v: int, i: int, p: int) -> Any:
            if p == 0:
                loaded[v, i] = self.unit(blocks[v], g, unit + i, ahead)
            return self.codes_of(loaded[v, i], p)

        return [
            lambda v, i=i, p=p: code(v, i, p)  # type: ignore[misc]
            for i in range(units)
            for p in range(self.layout.unit_quads)
        ]

    def codes_of(self, lines: list[Any], p: int) -> Any:
        """The codes of the p-th quad of a unit, one a byte."""
        codes = functools.reduce(T.bitwise_or, (self._in_place(lines[i.line], i) for i in self.layout.pieces(p)))
        if not self.workload.table:
            return codes
        return self.simd.look_up([int(v) + _SIGN for v in whole_table(self.workload.table)], T.bind(codes))

    def _in_place(self, line: Any, piece: Piece) -> Any:
        width, shift = 4 * self.simd.lanes, piece.start - piece.at
        shifted = T.shift_right(line, T.broadcast(T.uint8(shift), width)) if shift else line
        if piece.start + piece.width == 8 and not piece.at:  # nothing else is left
            return shifted
        return T.bitwise_and(shifted, T.broadcast(T.uint8((2**piece.width - 1) << piece.at), width))

    def scales(self, block: Any, g: Any) -> Any:
        scale = super().scales(block, g)
        if not self.workload.table:
            return scale
        return T.bind(scale * self.simd.f32(1 / STEPS[self.workload.table]))
