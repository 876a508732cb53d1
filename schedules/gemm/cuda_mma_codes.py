"""Words of packed codes (`cuda_mma_packing`) as registers of a matrix: what a thread does with each.

Whole numbers below 1024 are in the lowest bits of the float16 of 1024 and more, which counts ones: a mask puts a code
there, and one subtraction leaves its value, exactly (Kim et al., "Who Says Elephants Can't Run", arXiv:2211.10017). A
code that lies w bits higher counts 2**w, which a fused multiply-add takes back, so that few codes must be shifted.

Tables are in registers: an instruction that picks four bytes of eight by the nibbles of a word (prmt) looks four codes
up at once, in one half of the table; the fourth bit of each code says in which.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from llmc.schedules.formats import TABLES, whole_table
from llmc.schedules.gemm.cuda_mma_packing import FragmentLayout
from llmc.targets.threads import Cell
from llmc.tvm_shim import T

_1024 = 0x6400  # a float16
_MANTISSA = 10  # its bits that count
_BYTES = (0x7250, 0x7351)  # what puts bytes 0 and 2, or 1 and 3, beside upper halves of a constant


class Operands(ABC):
    """Of one weight. `ones`: a register of ones, as the weight's; `sums_dtype` of a product's sums."""

    ones: int
    sums_dtype: str

    @abstractmethod
    def pair(self, words: tuple[Any, Any], i: tuple[int, int]) -> list[Any]:
        """The two registers of a product: register i[0] of the first word, i[1] of the second, or of the same word."""


class Codes(Operands):
    """Codes that are numbers, less `zero`; None where zero points differ between groups, and come later."""

    def __init__(self, layout: FragmentLayout, zero: float | None) -> None:
        self.width, self.zero = layout.width, zero

    @abstractmethod
    def register(self, word: Any, i: int) -> Any:
        """Register i of a word, both uint32."""

    def pair(self, words: tuple[Any, Any], i: tuple[int, int]) -> list[Any]:
        return [Cell(self.register(word, at), "uint32").v for word, at in zip(words, i, strict=True)]


class HalfCodes(Codes):
    """As float16; elements of 16 bits are as they are."""

    ones, sums_dtype = 0x3C003C00, "float32"

    def register(self, word: Any, i: int) -> Any:
        if self.width == 16:
            return word
        if self.width == 8:
            return self._less_zero(permuted(word, T.uint32(_1024 * 0x10001), T.uint32(_BYTES[i])), 0)
        reached = _MANTISSA // self.width  # codes that lie in the mantissa
        steps, place = divmod(i, reached)
        bits = T.shift_right(word, T.uint32(steps * reached * self.width)) if steps else word
        mask = ((1 << self.width) - 1) << self.width * place
        bits = T.bitwise_or(T.bitwise_and(bits, T.uint32(mask * 0x10001)), T.uint32(_1024 * 0x10001))
        return self._less_zero(bits, self.width * place)

    def _less_zero(self, bits: Any, w: int) -> Any:
        """Two float16 of 1024 + 2**w codes as codes less the zero point."""
        zero = 0 if self.zero is None else self.zero
        if not w:
            return T.reinterpret("uint32", T.reinterpret("float16x2", bits) - T.broadcast(T.float16(1024 + zero), 2))
        into = Cell(T.uint32(0), "uint32")
        factor, less = (T.reinterpret("uint32", T.broadcast(T.float16(v), 2)) for v in (2.0**-w, -(1024 / 2**w + zero)))
        T.evaluate(T.ptx["fma.rn.f16x2"](into.v, bits, factor, less))
        return into.v


class ByteCodes(Codes):
    """As bytes with sign, or without where zero points come later."""

    ones, sums_dtype = 0x01010101, "uint32"

    def register(self, word: Any, i: int) -> Any:
        bits = T.shift_right(word, T.uint32(self.width * i)) if i else word
        if self.width < 8:
            bits = T.bitwise_and(bits, T.uint32(((1 << self.width) - 1) * 0x01010101))
        if self.zero is None:
            return bits
        if self.zero < 128:  # no byte overflows: a code less the zero point is below 128
            bits = bits + T.uint32((128 - int(self.zero)) * 0x01010101)
        return T.bitwise_xor(bits, T.uint32(0x80808080))


class Table(Operands):
    """Codes of 4 bits that stand for the values of a table."""

    @abstractmethod
    def __init__(self, name: str) -> None:
        """`name` is the table's in `formats.TABLES`."""


class HalfTable(Table):
    """Values as float16."""

    ones, sums_dtype = 0x3C003C00, "float32"

    def __init__(self, name: str) -> None:
        bits = np.array(TABLES[name], np.float16).view(np.uint8).reshape(-1, 2)
        self.low, self.high = _Lookup(bits[:, 0]), _Lookup(bits[:, 1])

    def pair(self, words: tuple[Any, Any], i: tuple[int, int]) -> list[Any]:
        select = _Selectors(words[0], i[0] // 2)  # both registers lie in one half of a word
        low, high = self.low.bytes(select), self.high.bytes(select)
        return [permuted(low, high, T.uint32(order)) for order in (0x5140, 0x7362)]


class ByteTable(Table):
    """Values as whole numbers of one byte, in `formats.STEPS`."""

    ones, sums_dtype = 0x01010101, "uint32"

    def __init__(self, name: str) -> None:
        self.values = _Lookup(whole_table(name).view(np.uint8))

    def pair(self, words: tuple[Any, Any], i: tuple[int, int]) -> list[Any]:
        return [self.values.bytes(_Selectors(word, at)) for word, at in zip(words, i, strict=True)]


class _Selectors:
    """Of the four codes in half a word: `entry` are their lower three bits, and `upper` is 255 in the bytes of those
    whose fourth bit is set."""

    def __init__(self, word: Any, half: int) -> None:
        bits = T.shift_right(word, T.uint32(16)) if half else word
        self.entry = Cell(T.bitwise_and(bits, T.uint32(0x7777)), "uint32").v
        without_last = T.bitwise_and(T.shift_right(word, T.uint32(16 * half + 1)), T.uint32(0x7777))
        self.upper = permuted(T.uint32(0), T.uint32(0xFFFFFFFF), without_last)


class _Lookup:
    """A table of 16 bytes in four registers, of which an instruction reaches two."""

    def __init__(self, table: np.ndarray) -> None:
        self.words = [int(word) for word in np.ascontiguousarray(table).view(np.uint32)]

    def bytes(self, select: _Selectors) -> Any:
        """Of four codes."""
        if not any(self.words):
            return T.uint32(0)
        lower, upper = (permuted(T.uint32(a), T.uint32(b), select.entry) for a, b in (self.words[:2], self.words[2:]))
        chosen = T.bitwise_or(T.bitwise_and(lower, T.bitwise_not(select.upper)), T.bitwise_and(upper, select.upper))
        return Cell(chosen, "uint32").v


def permuted(low: Any, high: Any, selector: Any) -> Any:
    """Four bytes of the eight in two words, by the nibbles of `selector`."""
    into = Cell(T.uint32(0), "uint32")
    T.evaluate(T.ptx["prmt.b32"](into.v, low, high, selector))
    return into.v
