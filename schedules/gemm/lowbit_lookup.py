"""Low-bit weights as bit planes that look up sums of activations: few rows. `lookup` has the layout and the arithmetic.

Where rows are many the planes become codes again, once a panel, and are multiplied as `lowbit_a8` does it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmc.schedules.gemm.activations import Quantized
from llmc.schedules.gemm.lookup import SIGNS, TINY, UNIT, place
from llmc.schedules.gemm.lowbit_a8 import Int8Kernel
from llmc.schedules.gemm.lowbit_kernel import Block
from llmc.targets.intrinsics import Reg
from llmc.targets.lookup import alternate, look_up, weigh_pairs
from llmc.tvm_shim import T

_CHUNK = 2  # units whose sums fit int16 when both halves of a register are added: 2 * 8 quads of at most 15 * 127
_ROUND = 1.5 * 2**23  # adding it leaves a float32 rounded to an integer in the low bits


@dataclass(frozen=True)
class Tables:
    """Of a few rows: sums [rows, quads * copies * 16] int8; float32 [rows, groups]: `step` half of their scale,
    `centre` what a group adds whatever its codes are, `total` the sum of x where zero points differ."""

    sums: Any
    step: Any
    centre: Any
    total: Any | None


@dataclass(frozen=True)
class Panel:
    """`scratch` [blocks, groups, quads, 4R] uint8: the codes of row blocks, a code a byte."""

    scratch: Any
    blocks: list[Any]

    def codes(self, block: Any, g: Any, quad: Any, span: Any) -> Any:
        (place,) = (i for i, each in enumerate(self.blocks) if each is block)
        return self.scratch[place, g, quad, span]


class LookupKernel(Int8Kernel):
    """`Int8Kernel`, with tables for up to `skinny` rows."""

    def registers(self, rows: int, blocks: int) -> int:
        return 2 * rows * blocks + 2 * blocks

    def activations(self, M: Any) -> Quantized:
        out = self.quantizer.allocate(M)
        with T.If(T.int64(self.skinny) < M), T.Then(), T.parallel(0, M) as m:
            self.quantizer.row(self.x, out, m)
        return out

    def _stream_all(self, x: Quantized, rows: int) -> None:
        super()._stream_all(self._tables(rows), rows)

    # -- tables ---------------------------------------------------------------------------------------------------
    def _tables(self, rows: int) -> Tables:
        layout = self.layout
        plane, copies = (rows, layout.groups), layout.lanes // 8
        tables = Tables(
            T.alloc_buffer((rows, layout.K // 4 * copies * 16), "int8"),
            T.alloc_buffer(plane, "float32"),
            T.alloc_buffer(plane, "float32"),
            None if self.zero is None else T.alloc_buffer(plane, "float32"),
        )
        zero = self.workload.zero if self.workload.symmetric else 0.0
        with T.serial(0, rows) as m, T.serial(0, layout.groups) as g:
            self._group_tables(tables, m, g, (2**layout.bits - 1) / 2 - zero)
        return tables

    def _group_tables(self, tables: Tables, m: Any, g: Any, centre: float) -> None:
        simd, R, quads = self.simd, self.layout.lanes, self.layout.group // 4
        parts, copies = range(0, 16, R), R // 8
        signs = [[_constants(SIGNS[j][part : part + R]) for part in parts] for j in range(4)]

        def sums(quad: Any) -> list[Any]:
            x = [simd.splat(self.x[m, (g * quads + quad) * 4 + j]) for j in range(4)]
            vectors = []
            for i in range(len(parts)):
                total = x[0] * signs[0][i]
                for j in range(1, 4):
                    total = simd.fma(x[j], signs[j][i], total)
                vectors.append(T.bind(total))
            return vectors

        high, added = simd.reg(), simd.reg()
        high.v, added.v = simd.f32(0), simd.f32(0)
        with T.serial(0, quads) as quad:
            for vector in sums(quad):
                high.v = T.max(high.v, T.abs(vector))
        with T.serial(0, self.layout.group // R) as i:
            added.v = added.v + self.x[m, simd.span(g * self.layout.group + i * R)]
        largest, total = T.bind(simd.reduce_max(high.v)), T.bind(simd.reduce_add(added.v))
        inverse = T.bind(T.Select(largest > T.float32(TINY), T.float32(127) / largest, T.float32(0)))
        with T.serial(0, quads) as quad:
            for part, vector in zip(parts, sums(quad), strict=True):
                rounded = T.reinterpret(f"int32x{R}", simd.fma(vector, simd.splat(inverse), simd.f32(_ROUND)))
                codes = T.bind(T.Cast(f"int8x{R}", rounded))
                for copy in range(copies):
                    start = ((g * quads + quad) * copies + copy) * 16 + part
                    T.buffer_store(tables.sums, codes, [m, simd.span(start)])
        T.buffer_store(tables.step, largest * T.float32(0.5 / 127), [m, g])
        T.buffer_store(tables.centre, total * T.float32(centre), [m, g])
        if tables.total is not None:
            T.buffer_store(tables.total, total, [m, g])

    # -- few rows -------------------------------------------------------------------------------------------------
    def multiply(self, x: Any, panel: Any, first: Any, rows: int, blocks: list[Any], ahead: int) -> Block:
        if panel is not None:
            return super().multiply(x, panel, first, rows, blocks, ahead)
        acc = self.zeros(rows, len(blocks))
        with T.serial(0, self.layout.groups) as g:
            for v, block in enumerate(blocks):
                self.prefetch_planes(block, g, ahead)
                self._look_up_group(x, block, g, [row[v] for row in acc], ahead)
        return acc

    def _look_up_group(self, x: Tables, block: Any, g: Any, totals: list[Reg], ahead: int) -> None:
        """totals[m] += row m's products with one group."""
        simd, units = self.simd, self.layout.group // UNIT
        sums = [simd.reg("int32") for _ in totals]
        for register in sums:
            register.v = simd.i32(0)

        def chunk(first: Any, count: int) -> None:
            partial: list[Reg | None] = [None] * len(totals)
            for unit in range(count):
                self._look_up_unit(x, block, g, first + unit, partial, ahead)
            for register, part in zip(sums, partial, strict=True):
                assert part is not None
                register.v = register.v + self._folded(part)

        whole, left = divmod(units, _CHUNK)
        if whole > 1:
            with T.serial(0, whole) as i:
                chunk(i * _CHUNK, _CHUNK)
        elif whole:
            chunk(0, _CHUNK)
        if left:
            chunk(whole * _CHUNK, left)
        scale = self.scales(block, g)
        shift = None if self.zero is None else self.shifts(block, g)
        for m, (register, total) in enumerate(zip(sums, totals, strict=True)):
            value = T.Cast(f"float32x{simd.lanes}", register.v)
            value = T.bind(simd.fma(value, simd.splat(x.step[m, g]), simd.splat(x.centre[m, g])))
            total.v = simd.fma(value, scale, total.v)
            if shift is not None and x.total is not None:
                total.v = simd.fma(shift, simd.splat(x.total[m, g]), total.v)

    def _look_up_unit(self, x: Tables, block: Any, g: Any, unit: Any, partial: list[Reg | None], ahead: int) -> None:
        """partial[m] += row m's sums of a unit, int16 for each of two quads and every row of the block."""
        simd, bits, width = self.simd, self.layout.bits, 4 * self.simd.lanes
        first_quad = (g * (self.layout.group // UNIT) + unit) * 8

        def tables(m: int, quad: int) -> Any:
            """Those of two quads, each as often as it meets eight rows."""
            return T.bind(x.sums[m, simd.span((first_quad + quad) * (width // 2), width)])

        def add(m: int, weights: tuple[int, int], values: Any) -> None:
            products, part = weigh_pairs(simd, weights, values), partial[m]
            if part is None:
                part = partial[m] = Reg(2 * simd.lanes, "int16")
                part.v = products
            else:
                part.v = part.v + products

        for i in range(bits):
            line = unit * bits + i
            if ahead:
                simd.prefetch(self.q[block, g, line, ahead])
            stored = T.bind(self.q[block, g, line, simd.span(0, width)])
            for half in range(2):
                numbers = T.bind(_half(stored, half, width))
                for m in range(len(partial)):
                    if i == bits - 1 and bits % 2:
                        found = [look_up(simd, tables(m, 4 * half + 2 * s), numbers) for s in range(2)]
                        add(m, (1 << i, 1 << i), alternate(simd, *found))
                    else:
                        p = i // 2 * 2
                        add(m, (1 << p, 2 << p), look_up(simd, tables(m, 4 * (i % 2) + 2 * half), numbers))

    def _folded(self, part: Reg) -> Any:
        """The sums of both quads, int32."""
        R = self.simd.lanes
        sums = T.bind(part.v)
        halves = [T.Shuffle([sums], list(range(start, start + R))) for start in (0, R)]
        return T.Cast(f"int32x{R}", halves[0] + halves[1])

    # -- many rows ------------------------------------------------------------------------------------------------
    def expand(self, blocks: list[Any]) -> Panel:
        layout, bits, width = self.layout, self.layout.bits, 4 * self.layout.lanes
        scratch = T.alloc_buffer((len(blocks), layout.groups, layout.group // 4, width), "uint8")
        for v, block in enumerate(blocks):
            with T.serial(0, layout.groups) as g, T.serial(0, layout.group // UNIT) as unit:
                for quad in range(8):
                    planes = [self._spread_plane(block, g, unit * bits, quad, p) for p in range(bits)]
                    codes = T.reinterpret(f"uint8x{width}", T.bind(functools.reduce(T.bitwise_or, planes)))
                    T.buffer_store(scratch, codes, [v, g, unit * 8 + quad, self.simd.span(0, width)])
        return Panel(scratch, blocks)

    def _spread_plane(self, block: Any, g: Any, first_line: Any, quad: int, p: int) -> Any:
        """Bit p of the codes of a quad, int32 [R]: in place in each of a row's four bytes."""
        simd, R = self.simd, self.layout.lanes
        line, byte, half = place(self.layout.bits, quad, p)
        stored = self.q[block, g, first_line + line, simd.span(quad % 2 * 2 * R, 2 * R)]
        rows = T.Cast(f"int32x{R}", T.reinterpret(f"uint16x{R}", stored))
        number = T.bitwise_and(T.shift_right(rows, simd.i32(8 * byte + 4 * half)), simd.i32(15))
        spread = T.bitwise_and(number * simd.i32(0x00204081), simd.i32(0x01010101))  # bit j becomes byte j
        return T.shift_left(spread, simd.i32(p)) if p else spread

    def _codes(
        self, panel: Any, blocks: list[Any], g: Any, unit: Any, units: int, ahead: int
    ) -> list[Callable[[int], Any]]:
        first, width = unit * self.layout.unit_quads, 4 * self.layout.lanes
        return [
            lambda v, t=t: panel.codes(blocks[v], g, first + t, self.simd.span(0, width))  # type: ignore[misc]
            for t in range(units * self.layout.unit_quads)
        ]


def _half(stored: Any, half: int, width: int) -> Any:
    """The numbers in one half of every byte."""
    if half:
        return T.shift_right(stored, T.broadcast(T.uint8(4), width))
    return T.bitwise_and(stored, T.broadcast(T.uint8(15), width))


def _constants(values: Any) -> Any:
    return T.Shuffle([T.float32(float(v)) for v in values], list(range(len(values))))
