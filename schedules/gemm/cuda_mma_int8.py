"""Linear layers on tensor cores with x rounded to int8, by row and group, on its way into shared memory.

A thread stages 16 values of a row; the threads of a group find its largest value together. Products and their sums are
whole numbers; both scales come on the sum of each group.
"""

from __future__ import annotations

from typing import Any

from llmc.schedules.gemm.cuda_mma_kernel import MmaBlock
from llmc.schedules.gemm.cuda_mma_tile import swizzled
from llmc.targets import mma
from llmc.targets.threads import WARP, Cell, shared
from llmc.tvm_shim import T

# As in `activations`: a group below this is zero; adding 1.5 * 2**23 leaves the nearest integer in the low bits.
_TINY, _ROUND = 2.0**-100, 1.5 * 2**23
_STAGED = 16  # values of one thread, one chunk of 16 bytes
GROUPS = (32, 64, 128)  # of which each is a whole product, and inside of one step


class Int8Block(MmaBlock):
    """As `MmaBlock`, for elements of 8 bits. `x_scale` [2, rows, groups of a step] in shared memory."""

    ones = 0x01010101
    sums_dtype = "uint32"

    def emit(self) -> None:
        self.x_scale = shared((2, self.tile.rows, self.tile.along * self.spans))
        super().emit()

    def _store_x(self, slot: Any) -> None:
        assert self.k.group is not None
        together = self.k.group // _STAGED  # neighbouring threads
        largest, inverse = Cell(T.float32(0)), Cell(T.float32(0))
        other = Cell(T.float32(0))
        words = T.alloc_buffer((4,), "uint32", scope="local")
        for item in range(self.items):
            row, chunk = self._x_place(item)
            values = [self.held[item * _STAGED + i] for i in range(_STAGED)]
            largest.v = T.float32(0)
            for value in values:
                largest.v = T.max(largest.v, T.abs(value))
            distance = 1
            while distance < together:
                other.v = T.tvm_warp_shuffle_xor(T.uint32(0xFFFFFFFF), largest.v, distance, WARP, WARP)
                largest.v = T.max(largest.v, other.v)
                distance *= 2
            inverse.v = T.if_then_else(largest.v > T.float32(_TINY), T.float32(127) / largest.v, T.float32(0))
            for word in range(4):
                codes = [_code(values[4 * word + i], inverse.v) for i in range(4)]
                joined = codes[0]
                for i in range(1, 4):
                    joined = T.bitwise_or(joined, T.shift_left(codes[i], T.uint32(8 * i)))
                T.buffer_store(words, joined, [word])
            to = swizzled(chunk, row) * 4
            T.buffer_store(self.a, words[T.ramp(0, 1, 4)], [slot, row, T.ramp(to, 1, 4)])
            with T.If(T.floormod(chunk, T.int64(together)) == 0), T.Then():
                group = T.floordiv(chunk, T.int64(together))
                T.buffer_store(self.x_scale, largest.v * T.float32(1 / 127), [slot, row, group])

    def _decoded(self, word: Any, i: int) -> Any:
        """Register i of a word: four codes less the zero point, with sign; as they are where zero points differ."""
        width = self.layout.width
        bits = T.shift_right(word, T.uint32(width * i)) if i else word
        if width < 8:
            bits = T.bitwise_and(bits, T.uint32(((1 << width) - 1) * 0x01010101))
        if not self.k.symmetric:
            return bits
        if self.k.w.zero < 128:  # no byte overflows: a code less the zero point is below 128
            bits = bits + T.uint32((128 - int(self.k.w.zero)) * 0x01010101)
        return T.bitwise_xor(bits, T.uint32(0x80808080))

    def _fold_span(self, sums: Any, row_sums: list[list[Cell]], slot: Any, a_slot: Any, span: int) -> None:
        scale = self._of_span("scale", slot, span)
        zero = [] if self.k.symmetric else self._of_span("zero", slot, span)
        for m, row in enumerate(sums):
            for h in range(2):
                place = (self.down * self.tile.products + m) * mma.ROWS + 8 * h + self.r
                of_x = Cell(self.x_scale[a_slot, place, self.along * self.spans + span]).v
                for j, registers in enumerate(row):
                    for e in range(2):
                        value = _float(registers[2 * h + e].v)
                        if zero:
                            value = value - zero[2 * j + e] * _float(row_sums[m][2 * h].v)
                        total = self.sums[m][j][2 * h + e]
                        total.v = total.v + value * (of_x * scale[2 * j + e])


def _code(value: Any, inverse: Any) -> Any:
    """value * inverse as the nearest whole number, ties to even, in the lowest byte."""
    bits = T.reinterpret("uint32", value * inverse + T.float32(_ROUND))
    return T.bitwise_and(bits, T.uint32(0xFF))


def _float(register: Any) -> Any:
    return T.Cast("float32", T.reinterpret("int32", register))
