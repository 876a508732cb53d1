"""Linear layers on tensor cores with x rounded to int8, by row and group, on its way into shared memory.

A thread stages 16 values of a row; the threads of a group find its largest value together. Products and their sums are
whole numbers; both scales come on the sum of each group.
"""

from __future__ import annotations

from typing import Any

from llmc.schedules.formats import STEPS
from llmc.schedules.gemm.cuda_mma_codes import ByteCodes, ByteTable
from llmc.schedules.gemm.cuda_mma_decode import DecodeBlock
from llmc.schedules.gemm.cuda_mma_kernel import MmaBlock
from llmc.schedules.gemm.cuda_mma_tile import CHUNKS, swizzled
from llmc.targets import mma
from llmc.targets.threads import WARP, Cell, shared, shuffled
from llmc.tvm_shim import T

# As in `activations`: a group below this is zero; adding 1.5 * 2**23 leaves the nearest integer in the low bits.
_TINY, _ROUND = 2.0**-100, 1.5 * 2**23
_STAGED = 16  # values of one thread, one chunk of 16 bytes
GROUPS = (32, 64, 128)  # of which each is a whole product, and inside of one step


class Int8DecodeBlock(DecodeBlock):
    """As `DecodeBlock`, for x in int8. `x_scale` [groups of the block's part, rows] in shared memory, at an odd pitch:
    lanes that read those of several rows, or write those of several groups, meet different banks."""

    def emit(self) -> None:
        tile, layout = self.tile, self.layout
        groups = tile.share(layout).share * self.depth // self.k.group
        self.x_scale = shared((max(groups, 1), tile.rows(layout, self.k.room) | 1))
        super().emit()

    def _stage(self) -> None:
        together = self.k.group // _STAGED  # registers of a group, of which four neighbouring lanes have a part each
        each = min(together, 4)
        items = self.blocks * 4
        with T.serial(0, self.k.M) as at, T.serial(0, -(-items // self.tile.threads)) as step:
            row = T.Cast("int64", at)
            item = T.bind(T.Cast("int64", step) * self.tile.threads + self.thread)
            block, side = T.floordiv(item, T.int64(4)), T.floormod(item, T.int64(4))
            first = T.bind(self.begin * self.depth + item // 4 * 64 + side * 4)
            held = [self._four(row, first + 16 * i, item < items) for i in range(4)]
            words = T.alloc_buffer((4,), "uint32", scope="local")
            for start in range(0, 4, each):
                values = [four[i] for four in held[start : start + each] for i in range(4)]
                largest = Cell(_largest(values)).v
                for distance in (1, 2, 4)[: 2 + (together > 4)]:
                    largest = Cell(T.max(largest, shuffled(largest, distance))).v
                inverse = _inverse(largest)
                for i in range(each):
                    T.buffer_store(words, _four_codes(values[4 * i : 4 * i + 4], inverse), [start + i])
                group = T.floordiv(block * 4 + start, T.int64(together))
                with T.If(T.And(item < items, T.floormod(item, T.int64(4 * max(1, together // 4))) == 0)), T.Then():
                    T.buffer_store(self.x_scale, largest * T.float32(_unit(self.k.table)), [group, row])
            with T.If(item < items), T.Then():
                to = block * 16 + side * 4
                T.buffer_store(self.x, words[T.ramp(0, 1, 4)], [row, T.ramp(to, 1, 4)])

    def _x_scale(self, chunk: Any, span: int) -> list[Any]:
        group = T.floordiv(chunk * self.depth + span * (self.depth // self.spans), T.int64(self.k.group))
        return [Cell(self.x_scale[group, T.min(self.q * 2 + e, self.k.M - 1)]).v for e in range(2)]

    def _float(self, register: Any) -> Any:
        return _float(register)


class Int8Block(MmaBlock):
    """As `MmaBlock`, for elements of 8 bits. `x_scale` [2, groups of a step, rows] in shared memory: lanes read those
    of neighbouring rows. A warp writes all groups of some rows at once; a pitch that is an odd multiple of so many
    keeps them in different banks."""

    codes, tables = ByteCodes, ByteTable
    decode = Int8DecodeBlock

    def emit(self) -> None:
        tile = self.tile
        at_once = max(WARP // (CHUNKS * tile.along), 1)  # rows that a warp stages
        self.x_scale = shared((2, tile.along * self.spans, tile.rows + at_once))
        super().emit()

    def _store_x(self, slot: Any) -> None:
        assert self.k.group is not None
        together = self.k.group // _STAGED  # neighbouring threads
        words = T.alloc_buffer((4,), "uint32", scope="local")
        for item in range(self.items):
            row, chunk = self._x_place(item)
            values = [self.held[item * _STAGED + i] for i in range(_STAGED)]
            largest = Cell(_largest(values)).v
            distance = 1
            while distance < together:
                largest = Cell(T.max(largest, shuffled(largest, distance))).v
                distance *= 2
            inverse = _inverse(largest)
            for word in range(4):
                T.buffer_store(words, _four_codes(values[4 * word : 4 * word + 4], inverse), [word])
            to = swizzled(chunk, row) * 4
            T.buffer_store(self.a, words[T.ramp(0, 1, 4)], [slot, row, T.ramp(to, 1, 4)])
            with T.If(T.floormod(chunk, T.int64(together)) == 0), T.Then():
                group = T.floordiv(chunk, T.int64(together))
                T.buffer_store(self.x_scale, largest * T.float32(_unit(self.k.table)), [slot, group, row])

    def _fold_span(self, sums: Any, row_sums: list[list[Cell]], slot: Any, a_slot: Any, span: int) -> None:
        scale = self._of_span("scale", slot, span)
        zero = [] if self.k.symmetric else self._of_span("zero", slot, span)
        for m, row in enumerate(sums):
            for h in range(2):
                place = (self.down * self.tile.products + m) * mma.ROWS + 8 * h + self.r
                of_x = Cell(self.x_scale[a_slot, self.along * self.spans + span, place]).v
                for j, registers in enumerate(row):
                    for e in range(2):
                        value = _float(registers[2 * h + e].v)
                        if zero:
                            value = value - zero[2 * j + e] * _float(row_sums[m][2 * h].v)
                        total = self.sums[m][j][2 * h + e]
                        total.v = total.v + value * (of_x * scale[2 * j + e])


def _unit(table: str) -> float:
    """What the scale of x is, relative to its largest value: with it, weights of a table are whole numbers."""
    return 1 / (127 * STEPS.get(table, 1))


def _largest(values: list[Any]) -> Any:
    """The largest magnitude."""
    largest = T.abs(values[0])
    for value in values[1:]:
        largest = T.max(largest, T.abs(value))
    return largest


def _inverse(largest: Any) -> Any:
    """What makes the largest value 127."""
    return Cell(T.if_then_else(largest > T.float32(_TINY), T.float32(127) / largest, T.float32(0))).v


def _four_codes(values: list[Any], inverse: Any) -> Any:
    """Four values in one register."""
    joined = _code(values[0], inverse)
    for i, value in enumerate(values[1:], 1):
        joined = T.bitwise_or(joined, T.shift_left(_code(value, inverse), T.uint32(8 * i)))
    return joined


def _code(value: Any, inverse: Any) -> Any:
    """value * inverse as the nearest whole number, ties to even, in the lowest byte."""
    bits = T.reinterpret("uint32", value * inverse + T.float32(_ROUND))
    return T.bitwise_and(bits, T.uint32(0xFF))


def _float(register: Any) -> Any:
    return T.Cast("float32", T.reinterpret("int32", register))
