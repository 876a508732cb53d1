"""Linear layers on tensor cores with weights in E4M3: times x in E4M3 from sm_89 on, times x in float16 before.

x in E4M3 takes two kernels: the first finds the largest magnitude of every row, the second divides by it on the way
into shared memory. Both scales come on the finished sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from llmc.errors import KernelError
from llmc.schedules.base import Arrays, Config, Workload
from llmc.schedules.formats import E4M3_MAX
from llmc.schedules.gemm.cuda_mma import MmaTemplate, packed_bias, tiles_of
from llmc.schedules.gemm.cuda_mma_codes import Codes, permuted
from llmc.schedules.gemm.cuda_mma_decode import DecodeBlock
from llmc.schedules.gemm.cuda_mma_kernel import MmaBlock, MmaKernel
from llmc.schedules.gemm.cuda_mma_packing import FragmentLayout
from llmc.schedules.gemm.cuda_mma_tile import CHUNKS, swizzled
from llmc.schedules.gemm.fp8 import TINY, Fp8Linear, Fp8LinearWorkload
from llmc.targets import mma
from llmc.targets.base import Target
from llmc.targets.cuda import arch_number
from llmc.targets.threads import BlockReduction, Cell, launch, strided
from llmc.tvm_shim import T

_FIRST_SM = 89  # with products of E4M3
_MEASURING = 128  # threads that find a row's largest magnitude
# A float16 has the exponents of an E4M3 behind a bias that is greater by this: bits moved into place stand for a
# value that is smaller by so many powers of two.
_BIASES = 15 - 7


class WideCodes(Codes):
    """E4M3 as float16, smaller by 2**_BIASES, subnormal numbers included: exact."""

    ones, sums_dtype = 0x3C003C00, "float32"

    def register(self, word: Any, i: int) -> Any:
        upper = permuted(word, T.uint32(0), T.uint32((0x2404, 0x3414)[i]))
        sign = T.bitwise_and(upper, T.uint32(0x80008000))
        rest = T.shift_right(T.bitwise_and(upper, T.uint32(0x7F007F00)), T.uint32(1))
        return T.bitwise_or(sign, rest)


class ByteFloats(Codes):
    """E4M3 as it is."""

    ones, sums_dtype = 0x38383838, "float32"

    def register(self, word: Any, i: int) -> Any:
        return word


class WideBlock(MmaBlock):
    codes = WideCodes


class Fp8DecodeBlock(DecodeBlock):
    """As `DecodeBlock`, for x in E4M3."""

    k: Fp8Kernel

    def _stage(self) -> None:
        words = T.alloc_buffer((4,), "uint32", scope="local")
        with T.serial(0, self.k.M) as at, strided(self.blocks * 4, self.thread, self.tile.threads) as item:
            row = T.Cast("int64", at)
            inverse = self.k.inverse(row)
            block, side = T.floordiv(item, T.int64(4)), T.floormod(item, T.int64(4))
            first = T.bind(self.begin * self.depth + block * 64 + side * 4)
            for i in range(4):
                four = self._four(row, first + 16 * i)
                T.buffer_store(words, four_codes([four[e] for e in range(4)], inverse), [i])
            T.buffer_store(self.x, words[T.ramp(0, 1, 4)], [row, T.ramp(block * 16 + side * 4, 1, 4)])

    def _fold(self, sums: Any, row_sums: list[Cell], planes: Any, x_scale: Any, into: Any) -> None:
        scales = [self.k.scale(self.q * 2 + e) for e in range(2)]
        super()._fold(sums, row_sums, planes, scales, into)


class Fp8Block(MmaBlock):
    """As `MmaBlock`, for x in E4M3."""

    codes, decode = ByteFloats, Fp8DecodeBlock
    k: Fp8Kernel

    def emit(self) -> None:
        items = self.tile.rows * self.tile.along * CHUNKS // self.tile.threads
        self.inverse = [self.k.inverse(self.first_row + self._x_place(item)[0]) for item in range(items)]
        super().emit()

    def _store_x(self, slot: Any) -> None:
        words = T.alloc_buffer((4,), "uint32", scope="local")
        for item, inverse in enumerate(self.inverse):
            row, chunk = self._x_place(item)
            for word in range(4):
                values = [self.held[16 * item + 4 * word + e] for e in range(4)]
                T.buffer_store(words, four_codes(values, inverse), [word])
            to = swizzled(chunk, row) * 4
            T.buffer_store(self.a, words[T.ramp(0, 1, 4)], [slot, row, T.ramp(to, 1, 4)])

    def _fold(self, into: Any, sums: Any, row_sums: list[list[Cell]], values: Any) -> None:
        super()._fold(into, sums, row_sums, values)
        for m, row in enumerate(into):
            for h in range(2):
                place = (self.down * self.tile.products + m) * mma.ROWS + 8 * h + self.r
                scale = self.k.scale(self.first_row + place)
                for registers in row:
                    for e in range(2):
                        registers[2 * h + e].v = registers[2 * h + e].v * scale


def four_codes(values: list[Any], inverse: Any) -> Any:
    """Four values in one register."""
    low, high = (mma.pack_e4m3(*(value * inverse for value in values[i : i + 2])) for i in (0, 2))
    return T.bitwise_or(low, T.shift_left(high, T.uint32(16)))


class Fp8Kernel(MmaKernel):
    """Two kernels: `largest` [M] float32 are the magnitudes of the rows of x."""

    def _launch(self) -> None:
        self.largest = T.alloc_buffer((self.M,), "float32")
        with launch(_MEASURING, self.M) as (thread, row):
            found = Cell(T.float32(0))
            with strided(-(-self.w.K // 4), thread, _MEASURING) as quad:
                four = T.alloc_buffer((4,), "float32", scope="local")
                self.load_x(four, 0, row, quad * 4, True)
                for i in range(4):
                    found.v = T.max(found.v, T.abs(four[i]))
            largest = BlockReduction(thread, _MEASURING).max(found.v)
            with T.If(thread == 0), T.Then():
                T.buffer_store(self.largest, largest.v, [row])
        super()._launch()

    def inverse(self, row: Any) -> Any:
        """What makes the largest value of a row of x E4M3's; of the last row, where it is beyond."""
        largest = self._largest(row)
        return Cell(T.if_then_else(largest > T.float32(TINY), T.float32(E4M3_MAX) / largest, T.float32(0))).v

    def scale(self, row: Any) -> Any:
        """The same, the other way round."""
        return Cell(self._largest(row) * T.float32(1 / E4M3_MAX)).v

    def _largest(self, row: Any) -> Any:
        return Cell(self.largest[T.min(row, self.M - 1)]).v


class MmaFp8Linear(MmaTemplate, Fp8Linear):
    """Template "fp8_mma". Packed: q and scale of `cuda_mma_packing`, bias [N]."""

    name = "fp8_mma"
    activations, block, kernel = "fp8", Fp8Block, Fp8Kernel

    def accepts(self, workload: Workload, target: Target) -> bool:
        if not isinstance(workload, Fp8LinearWorkload) or target.kind != "cuda":
            return False
        able = self.activations != "fp8" or arch_number(target) >= _FIRST_SM
        return able and workload.activations == self.activations

    def fragments(self, workload: Any) -> FragmentLayout:
        return FragmentLayout(workload.N, workload.K, 8, 4, workload.halves)

    def kind(self, workload: Any) -> str:
        return "e4m3"

    def factor(self) -> float:
        """What a scale is multiplied with when it is packed."""
        return 1.0

    def prepack(self, weights: Mapping[str, Any], workload: Any, config: Config, target: Target) -> Arrays:
        layout, weight = self.fragments(workload), weights["weight"]
        scale = np.asarray(weight.scale, np.float32) * np.float32(self.factor())
        packed = {"q": layout.pack_codes(np.asarray(weight.q)), "scale": layout.pack_plane(scale)}
        return packed | packed_bias(weights, workload)

    def build(self, workload: Any, target: Target, config: Config) -> Any:
        if not self.accepts(workload, target):
            raise KernelError(f"{workload.key()} is outside what {self.name} computes", where=target.name)
        layout, kind = self.fragments(workload), self.kind(workload)
        return self.kernel(workload, target, tiles_of(config), layout, kind, self.block).build()  # type: ignore[arg-type]


class MmaWideFp8Linear(MmaFp8Linear):
    """Template "fp8_f16_mma": `MmaFp8Linear` for x in float16. Scales are packed 2**8 times as large."""

    name = "fp8_f16_mma"
    activations, block, kernel = "f16", WideBlock, MmaKernel  # type: ignore[assignment]

    def fragments(self, workload: Any) -> FragmentLayout:
        return FragmentLayout(workload.N, workload.K, 8, 2, workload.halves)

    def kind(self, workload: Any) -> str:
        return "f16"

    def factor(self) -> float:
        return 2.0**_BIASES


MMA_FP8, MMA_FP8_F16 = MmaFp8Linear(), MmaWideFp8Linear()
