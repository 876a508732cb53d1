"""Dot products of unsigned codes with int8 activations, exact on every CPU that llmc knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llmc.targets.base import Target
from llmc.targets.intrinsics import Reg, Simd, pure
from llmc.tvm_shim import T


class ByteDot:
    """Adds to int32 lanes the products of four codes of `bits` bits, less `offset`, with four int8 in [-127, 127].

    - With VNNI: one instruction a register of codes; offset 0.
    - Without, codes of at most 4 bits: pairs of products (pmaddubsw) are summed as int16 over as many steps as
      cannot overflow, and widened once; offset 0.
    - Without, 8-bit codes: pmaddubsw would saturate, so w = code - 128 is split, |w| * sign(w) x: a pair is then at
      most 2 * 128 * 127 = 32512, which fits; offset 128.
    """

    def __init__(self, simd: Simd, bits: int) -> None:
        self.simd, self.bits = simd, bits
        self.vnni = simd.target.dot == "vnni"
        self.offset = 128 if not self.vnni and bits > 4 else 0

    @staticmethod
    def longest(target: Target, bits: int) -> int:
        """How many quads of k one `accumulate` may take."""
        return 32767 // (2 * 127 * (2**bits - 1)) if target.dot != "vnni" and bits <= 4 else 1 << 30

    def accumulate(
        self,
        sums: Sequence[Sequence[Reg]],
        codes: Sequence[Callable[[int], Any]],
        quads: Sequence[Callable[[int], Any]],
    ) -> None:
        """sums[m][v] += the products of step t's codes[t](v) and quads[t](m), for all t.

        Codes are uint8 registers, quads four int8 repeated in every lane; both are asked for once a step.
        """
        pairs: list[list[Reg | None]] = [[None] * len(row) for row in sums]
        for code, quad in zip(codes, quads, strict=True):
            registers = [self._split(T.bind(code(v))) for v in range(len(sums[0]))]
            for m, row in enumerate(sums):
                x = T.bind(quad(m))
                for v, register in enumerate(row):
                    if self.vnni:
                        register.v = self.simd.dot_u8s8(register.v, registers[v][0], x)
                    elif self.offset:
                        register.v = register.v + self._widen(self._signed_pairs(registers[v], x))
                    else:
                        pairs[m][v] = self._add_pairs(pairs[m][v], registers[v][0], x)
        for row, partial in zip(sums, pairs, strict=True):
            for register, pair in zip(row, partial, strict=True):
                if pair is not None:
                    register.v = register.v + self._widen(pair.v)

    def _split(self, code: Any) -> tuple[Any, ...]:
        """The operands of one register of codes: itself, or (w, |w|) where w = code - 128 is needed."""
        if not self.offset:
            return (code,)
        n = 4 * self.simd.lanes
        w = T.bind(T.reinterpret(f"int8x{n}", T.bitwise_xor(code, T.broadcast(T.uint8(128), n))))
        return w, T.bind(pure("llvm.x86.avx2.psign.b", w, w, dtype=f"int8x{n}"))

    def _signed_pairs(self, split: tuple[Any, ...], x: Any) -> Any:
        w, magnitude = split
        signed = pure("llvm.x86.avx2.psign.b", x, w, dtype=f"int8x{4 * self.simd.lanes}")
        return pure("llvm.x86.avx2.pmadd.ub.sw", magnitude, signed, dtype=f"int16x{2 * self.simd.lanes}")

    def _add_pairs(self, sum_: Reg | None, code: Any, x: Any) -> Reg:
        n = 2 * self.simd.lanes
        products = pure("llvm.x86.avx2.pmadd.ub.sw", code, x, dtype=f"int16x{n}")
        if sum_ is None:
            sum_ = Reg(n, "int16")
            sum_.v = products
        else:
            sum_.v = sum_.v + products
        return sum_

    def _widen(self, pairs: Any) -> Any:
        n = 2 * self.simd.lanes
        return pure("llvm.x86.avx2.pmadd.wd", pairs, T.broadcast(T.int16(1), n), dtype=f"int32x{n // 2}")
