"""Low-bit weights times float32 activations: weights become float32 in registers (or in scratch, once a panel)."""

from __future__ import annotations

import functools
from typing import Any

from llmc.schedules.formats import TABLES
from llmc.schedules.gemm.lowbit_kernel import Block, LowBitKernel
from llmc.schedules.gemm.packing import Piece
from llmc.tvm_shim import T

_CHAINS = 8  # independent sums that keep both FMA units busy: 2 a cycle, latency 4


class Float32Kernel(LowBitKernel):
    """y = sum over k of (code * scale - zero * scale) * x."""

    def registers(self, rows: int, blocks: int) -> int:
        return rows * blocks * self._chains(rows, blocks) + 3 * blocks

    def activations(self, M: Any) -> Any:
        return self.x

    def multiply(self, x: Any, panel: Any, first: Any, rows: int, blocks: list[Any], ahead: int) -> Block:
        if panel is None:
            return self._packed(x, rows, blocks, ahead)
        return self._expanded(x, panel, first, rows, len(blocks))

    def _packed(self, x: Any, rows: int, blocks: list[Any], ahead: int) -> Block:
        """The first rows times packed blocks, taken apart in registers."""
        layout, per = self.layout, 4 * self.layout.unit_quads
        chains = self._chains(rows, len(blocks))
        acc = [self.zeros(rows, len(blocks)) for _ in range(chains)]

        def unit(g: Any, i: Any, count: int) -> None:
            """The first `count` k of unit i of group g."""
            for v, block in enumerate(blocks):
                packed, scale, shift = self.unit(block, g, i, ahead), self.scales(block, g), self._shift(block, g)
                for j in range(count):
                    weight = T.bind(self.simd.fma(self._code(packed, j), scale, shift))
                    for m in range(rows):
                        register = acc[j % chains][m][v]
                        value = self.simd.splat(x[m, g * layout.group + i * per + j])
                        register.v = self.simd.fma(weight, value, register.v)

        full, left = divmod(layout.K, layout.group)
        if full:
            with T.serial(0, full) as g, T.serial(0, layout.units) as i:
                unit(g, i, per)
        if left // per:
            with T.serial(0, left // per) as i:
                unit(full, i, per)
        if left % per:
            unit(full, left // per, left % per)
        for chain in acc[1:]:
            for total, row in zip(acc[0], chain, strict=True):
                for register, part in zip(total, row, strict=True):
                    register.v = register.v + part.v
        return acc[0]

    def expand(self, blocks: list[Any]) -> Any:
        """Scratch [padded_K, NV, R] float32."""
        layout, per = self.layout, 4 * self.layout.unit_quads
        scratch = T.alloc_buffer((layout.padded_K, len(blocks), layout.lanes), "float32")
        with T.serial(0, layout.groups) as g, T.serial(0, layout.units) as i:
            for v, block in enumerate(blocks):
                packed, scale, shift = self.unit(block, g, i), self.scales(block, g), self._shift(block, g)
                for j in range(per):
                    weight = self.simd.fma(self._code(packed, j), scale, shift)
                    T.buffer_store(scratch, weight, [g * layout.group + i * per + j, v, self.simd.span(0)])
        return scratch

    def _expanded(self, x: Any, panel: Any, first: Any, rows: int, blocks: int) -> Block:
        acc = self.zeros(rows, blocks)

        def step(k: Any) -> None:
            weights = [T.bind(panel[k, v, self.simd.span(0)]) for v in range(blocks)]
            for m, row in enumerate(acc):
                value = T.bind(self.simd.splat(x[first + m, k]))
                for register, weight in zip(row, weights, strict=True):
                    register.v = self.simd.fma(weight, value, register.v)

        K = self.layout.K
        with T.serial(0, K // self.KU) as s:
            for u in range(self.KU):
                step(s * self.KU + u)
        for k in range(K // self.KU * self.KU, K):
            step(k)
        return acc

    def _chains(self, rows: int, blocks: int) -> int:
        chains = 1
        while chains * rows * blocks < _CHAINS:
            chains *= 2
        return chains

    def _shift(self, block: Any, g: Any) -> Any:
        """-zero * scale."""
        if self.zero is not None:
            return self.shifts(block, g)
        return T.bind(self.scales(block, g) * self.simd.f32(-self.workload.zero))

    def _code(self, lines: list[Any], j: int) -> Any:
        """The codes of the j-th k of a unit, one a row, as float32."""
        simd = self.simd

        def in_place(piece: Piece) -> Any:
            lanes = T.reinterpret(f"int32x{simd.lanes}", lines[piece.line])
            shift = j % 4 * 8 + piece.start - piece.at  # four neighbours in k are the bytes of a lane
            return T.bitwise_and(T.shift_right(lanes, simd.i32(shift)), simd.i32((2**piece.width - 1) << piece.at))

        code = functools.reduce(T.bitwise_or, map(in_place, self.layout.pieces(j // 4)))
        if self.workload.table:
            return simd.look_up_floats(TABLES[self.workload.table], T.bind(code))
        return T.Cast(f"float32x{simd.lanes}", code)
