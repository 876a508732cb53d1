"""Low-bit weights times int8 activations: integer dot products inside a group, float sums across groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llmc.schedules.base import Config
from llmc.schedules.gemm.activations import Quantized, Quantizer
from llmc.schedules.gemm.lowbit_kernel import Block, LowBitKernel
from llmc.targets.base import Target
from llmc.targets.dot import ByteDot
from llmc.tvm_shim import T

if TYPE_CHECKING:
    from llmc.schedules.gemm.lowbit import LowBitLinearWorkload

_SERIAL = 1 << 14  # values that one thread quantises sooner (about 1 us) than it wakes others

Codes = Callable[[Any, Any, int], list[Callable[[int], Any]]]  # (group, first quad, count) -> [quad](row block)


class Int8Kernel(LowBitKernel):
    """y = sum over groups of (scale * x_scale) * dot(codes, xq) [+ (-zero * scale) * x_scale * sum(xq)].

    A zero point that all groups share starts the integer sums at -zero * sum(xq) instead, which costs nothing.
    """

    def __init__(self, workload: LowBitLinearWorkload, target: Target, config: Config) -> None:
        super().__init__(workload, target, config)
        self.dot = ByteDot(self.simd, workload.bits)
        offset = self.dot.offset - (int(workload.zero) if workload.symmetric else 0)
        self.quantizer = Quantizer(self.simd, workload.K, self.layout.group, offset, totals=not workload.symmetric)

    def registers(self, rows: int, blocks: int) -> int:
        sums = rows * blocks * (1 if self.layout.groups == 1 else 2)
        return sums + blocks

    def activations(self, M: Any) -> Quantized:
        out = self.quantizer.allocate(M)
        few = max(1, _SERIAL // self.workload.K)
        with T.If(T.int64(few) >= M):
            with T.Then(), T.serial(0, M) as m:
                self.quantizer.row(self.x, out, m)
            with T.Else(), T.parallel(0, M) as m:
                self.quantizer.row(self.x, out, m)
        return out

    def stream(self, x: Quantized, rows: int, blocks: list[Any]) -> Block:
        def codes(g: Any, first: Any, count: int) -> list[Callable[[int], Any]]:
            per, line, ahead = self.layout.codes_per_byte, T.bind(first // self.layout.codes_per_byte), self.ahead(rows)
            if isinstance(first, int) and first == 0:
                for block in blocks:
                    self.prefetch_planes(block, g, ahead)
            packed: dict[tuple[int, int], Any] = {}

            def code(t: int, v: int) -> Any:
                at = v, t // per
                if at not in packed:
                    self.prefetch_line(blocks[v], g, line + t // per, ahead)
                    packed[at] = self.line(blocks[v], g, line + t // per)
                return self._code(packed[at], t % per)

            return [lambda v, t=t: code(t, v) for t in range(count)]  # type: ignore[misc]

        return self._walk(x, codes, 0, rows, blocks)

    def expand(self, blocks: list[Any]) -> Any:
        """Scratch [groups, quads of a group, NV, 4R] uint8; codes that are bytes already stay where they are."""
        layout, width = self.layout, 4 * self.simd.lanes
        per = layout.codes_per_byte
        if per == 1:
            return None
        scratch = T.alloc_buffer((layout.groups, layout.group // 4, len(blocks), width), "uint8")
        with T.serial(0, layout.groups) as g, T.serial(0, layout.lines) as i:
            for v, block in enumerate(blocks):
                self.prefetch_line(block, g, i, self.ahead_many)
                line = self.line(block, g, i)
                for p in range(per):
                    T.buffer_store(scratch, self._code(line, p), [g, i * per + p, v, self.simd.span(0, width)])
        return scratch

    def multiply(self, x: Quantized, panel: Any, first: Any, rows: int, blocks: list[Any]) -> Block:
        width = 4 * self.simd.lanes

        def codes(g: Any, quad: Any, count: int) -> list[Callable[[int], Any]]:
            def code(t: int, v: int) -> Any:
                if panel is None:
                    return self.line(blocks[v], g, quad + t)
                return panel[g, quad + t, v, self.simd.span(0, width)]

            return [lambda v, t=t: code(t, v) for t in range(count)]  # type: ignore[misc]

        return self._walk(x, codes, first, rows, blocks)

    def _code(self, line: Any, p: int) -> Any:
        """The p-th code of every byte."""
        bits, width = self.layout.bits, 4 * self.simd.lanes
        if p:
            line = T.shift_right(line, T.broadcast(T.uint8(bits * p), width))
        if p == self.layout.codes_per_byte - 1:
            return line
        return T.bitwise_and(line, T.broadcast(T.uint8(2**bits - 1), width))

    def _walk(self, x: Quantized, codes: Codes, first: Any, rows: int, blocks: list[Any]) -> Block:
        """Rows first to first + rows times `blocks`, over all groups."""
        acc = self.zeros(rows, len(blocks))
        if self.layout.groups == 1:
            self._group(x, codes, first, blocks, 0, acc)
        else:
            with T.serial(0, self.layout.groups) as g:
                self._group(x, codes, first, blocks, g, acc)
        return acc

    def _group(self, x: Quantized, codes: Codes, first: Any, blocks: list[Any], g: Any, acc: Block) -> None:
        """acc += one group's products."""
        simd = self.simd
        sums = [[simd.reg("int32") for _ in row] for row in acc]
        for m, row in enumerate(sums):
            start = simd.i32(0) if x.start is None else T.bind(simd.splat(x.start[first + m, g]))
            for register in row:
                register.v = start

        def step(quad: Any, count: int) -> None:
            k = g * self.layout.group + quad * 4
            quads = [lambda m, t=t: simd.broadcast_quad(x.q, first + m, k + t * 4) for t in range(count)]  # type: ignore[misc]
            self.dot.accumulate(sums, codes(g, quad, count), quads)

        quads = self.layout.group // 4
        whole, left = divmod(quads, self.KU)
        if whole == 1:
            step(0, self.KU)
        elif whole:
            with T.serial(0, whole) as s:
                step(s * self.KU, self.KU)
        if left:
            step(whole * self.KU, left)

        for v, block in enumerate(blocks):
            scale = self.scales(block, g)
            zero = None if self.zero is None else T.bind(self.zero[block, g, simd.span(0)])
            for m, row in enumerate(acc):
                total = T.Cast(f"float32x{simd.lanes}", sums[m][v].v)
                row[v].v = simd.fma(total, scale * simd.splat(x.scale[first + m, g]), row[v].v)
                if zero is not None and x.total is not None:
                    row[v].v = simd.fma(zero, simd.splat(x.total[first + m, g]), row[v].v)
