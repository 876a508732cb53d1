"""Vector instructions behind names, for the bodies of kernel templates.

A `Simd` is made from a target; its methods emit TVM expressions. Nothing else in llmc spells an LLVM intrinsic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from llmc.errors import KernelError
from llmc.targets.base import Target
from llmc.tvm_shim import T

# 2**f for |f| <= 0.5 as a polynomial in f, highest degree first: minimax with 2**0 = 1, relative error 1e-7 (2e-7 when
# evaluated in float32, as the seven Taylor terms have).
_TWO_TO_F = (
    0.001326472731307149,
    0.009671512991189957,
    0.05550733581185341,
    0.24022242426872253,
    0.6931470036506653,
    1.0,
)

_CELLS = 64


def pure(name: str, *args: Any, dtype: str) -> Any:
    """A call of the LLVM intrinsic `name` that has no side effect."""
    return T.call_llvm_pure_intrin(T.llvm_lookup_intrinsic_id(name), *args, dtype=dtype)


def effect(name: str, *args: Any) -> None:
    """A call of the LLVM intrinsic `name` for its side effect."""
    T.evaluate(T.call_llvm_intrin(T.llvm_lookup_intrinsic_id(name), *args, dtype="void"))


class Opaque:
    """Calling it with an int64 gives that number as one that TVM does not look behind: it has been through memory,
    which LLVM takes away again.

    What is only bound to a name, TVM's simplifier and code generator put in place of the name wherever it stands, and
    reason about: for seconds, where an address comes of divisions by sizes of run time. All numbers of one loop body
    share one buffer: TVM may read a number again later, and would give a buffer of its own away after the first time.
    """

    def __init__(self) -> None:
        self.cells, self.used = T.alloc_buffer((_CELLS,), "int64"), 0

    def __call__(self, value: Any) -> Any:
        cell, self.used = self.used, self.used + 1
        if cell == _CELLS:
            raise KernelError(f"a loop body has more than {_CELLS} opaque numbers")
        T.buffer_store(self.cells, value, [cell])
        return T.bind(self.cells[cell])


class Reg:
    """One vector register: a stack buffer of under 1,024 bytes that LLVM keeps in a register.

    One buffer per accumulator, held in Python lists, never becomes a heap workspace; a single buffer for a whole
    register block would, at 1,024 bytes and more.
    """

    def __init__(self, lanes: int, dtype: str = "float32") -> None:
        self.lanes, self.dtype = lanes, dtype
        self.buffer = T.alloc_buffer((lanes,), dtype)

    @property
    def v(self) -> Any:
        return self.buffer[self._all()]

    @v.setter
    def v(self, value: Any) -> None:
        T.buffer_store(self.buffer, value, [self._all()])

    def part(self, n: int) -> Any:
        """The first n lanes. They are taken from a copy, or LLVM would keep the register itself in memory."""
        copy = Reg(self.lanes, self.dtype)
        copy.v = self.v
        return copy.buffer[0 if n == 1 else T.ramp(0, 1, n)]

    def _all(self) -> Any:
        return 0 if self.lanes == 1 else T.ramp(0, 1, self.lanes)  # TVM has no vectors of one lane


class Simd:
    """The vector vocabulary of one CPU target; `lanes` 32-bit elements make one register."""

    def __init__(self, target: Target) -> None:
        if target.kind != "llvm":
            raise KernelError(f"{target.name} is not a CPU target: CPU templates cannot be built for it")
        self.target, self.lanes = target, target.lanes

    # -- values -------------------------------------------------------------------------------------------------
    def reg(self, dtype: str = "float32") -> Reg:
        return Reg(self.lanes, dtype)

    def span(self, start: Any, n: int | None = None) -> Any:
        """Index of `n` (default: one register) consecutive elements from `start`."""
        return start if n == 1 else T.ramp(start, 1, n or self.lanes)  # TVM has no vectors of one lane

    def splat(self, x: Any, n: int | None = None) -> Any:
        return x if n == 1 else T.broadcast(x, n or self.lanes)

    def f32(self, x: float, n: int | None = None) -> Any:
        return self.splat(T.float32(x), n)

    def i32(self, x: int, n: int | None = None) -> Any:
        return self.splat(T.int32(x), n)

    # -- arithmetic ---------------------------------------------------------------------------------------------
    def fma(self, a: Any, b: Any, c: Any, n: int | None = None) -> Any:
        """a * b + c, rounded once."""
        return pure("llvm.fma", a, b, c, dtype="float32" if n == 1 else f"float32x{n or self.lanes}")

    def reduce_max(self, x: Any) -> Any:
        """Largest lane of a vector of float32, of any width."""
        return self._fold(x, T.max)

    def reduce_add(self, x: Any) -> Any:
        """Sum of the lanes of a vector of float32, of any width; pairwise."""
        return self._fold(x, lambda a, b: a + b)

    def _fold(self, x: Any, combine: Callable[[Any, Any], Any]) -> Any:
        """Halve a vector until one lane is left. LLVM's own reductions keep the order of the lanes, and of NaNs:
        one scalar operation after another.
        """
        n, odd = int(x.ty.dtype.lanes), []
        while n > 1:
            x = T.bind(x)
            odd += [T.Shuffle([x], [n - 1])] if n % 2 else []
            n //= 2
            x = combine(T.Shuffle([x], list(range(n))), T.Shuffle([x], list(range(n, 2 * n))))
        for lane in odd:
            x = combine(x, lane)
        return T.bind(x)

    def reduce_add_i32(self, x: Any) -> Any:
        return pure("llvm.vector.reduce.add", x, dtype="int32")

    def reduce_rows(self, combine: Callable[[Any, Any], Any], rows: Sequence[Any]) -> Any:
        """Lane i of the result is the reduction of the i-th register of `rows`, at most `lanes` of them.

        A tree that halves the partial results of two registers at a time: 3 operations a row, where reducing each
        row by itself takes 2 log2(lanes). Lanes beyond the rows repeat the last row.
        """
        n, width = self.lanes, self.lanes
        level = [T.bind(row) for row in rows]
        while width > 1:
            width //= 2
            halves = [[start + i for start in range(0, 2 * n, 2 * width) for i in range(width)]]
            halves.append([i + width for i in halves[0]])
            if len(level) % 2:
                level.append(level[-1])
            pairs = zip(level[::2], level[1::2], strict=True)
            level = [T.bind(combine(*(T.Shuffle([a, b], half) for half in halves))) for a, b in pairs]
        return level[0]

    def round_even(self, x: Any) -> Any:
        """Nearest integer, ties to even: one instruction in the default rounding mode."""
        return T.nearbyint(x)

    def exp2(self, z: Any) -> Any:
        """2**z for a register of float32, relative error about 1e-7; z below -126 gives 2**-126.

        `T.exp` on a vector would become one scalar libm call a lane.
        """
        n = self.lanes
        z = T.bind(T.max(z, self.f32(-126)))
        whole = T.bind(self.round_even(z))
        fraction = T.bind(z - whole)
        poly = self.f32(_TWO_TO_F[0])
        for c in _TWO_TO_F[1:]:
            poly = self.fma(poly, fraction, self.f32(c))
        bits = T.shift_left(T.Cast(f"int32x{n}", whole) + self.i32(127), self.i32(23))
        return T.bind(poly * T.reinterpret(f"float32x{n}", bits))

    def exp(self, x: Any) -> Any:
        """e**x; saturates at 2**±126 so that no input yields inf or nan."""
        z = T.bind(T.min(x * self.f32(1 / math.log(2)), self.f32(126)))
        return self.exp2(z)

    def sigmoid(self, x: Any) -> Any:
        return T.bind(self.f32(1) / (self.f32(1) + self.exp(self.f32(0) - x)))

    def tanh(self, x: Any) -> Any:
        """2 sigmoid(2x) - 1; absolute error about 1e-7."""
        return T.bind(self.f32(2) * self.sigmoid(x + x) - self.f32(1))

    def erf(self, x: Any) -> Any:
        """Abramowitz and Stegun 7.1.26, absolute error below 1.5e-7."""
        n = self.lanes
        a = T.bind(T.abs(x))
        t = T.bind(self.f32(1) / self.fma(self.f32(0.3275911), a, self.f32(1)))
        poly = self.f32(1.061405429)
        for c in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
            poly = self.fma(poly, t, self.f32(c))
        y = T.bind(self.f32(1) - poly * t * self.exp(self.f32(0) - a * a))
        return T.bind(T.Select(x < T.broadcast(T.float32(0), n), self.f32(0) - y, y))

    # -- 8-bit dot products -------------------------------------------------------------------------------------
    def dot_u8s8(self, acc: Any, u8: Any, s8: Any) -> Any:
        """acc[i] += sum over j < 4 of u8[4i+j] * s8[4i+j]; int32 lanes, 4*lanes bytes each.

        Without VNNI the pair sums pass through int16 and saturate: exact only while |u8 * s8 * 2| <= 32767, as for
        4-bit weights. Use `dot_s8s8` for full-range bytes.
        """
        n = self.lanes
        if self.target.dot == "vnni":
            name = "llvm.x86.avx512.vpdpbusd.512" if n == 16 else "llvm.x86.avx512.vpdpbusd.256"
            return pure(name, acc, u8, s8, dtype=f"int32x{n}")
        pairs = pure("llvm.x86.avx2.pmadd.ub.sw", u8, s8, dtype=f"int16x{2 * n}")
        ones = T.broadcast(T.int16(1), 2 * n)
        return acc + pure("llvm.x86.avx2.pmadd.wd", pairs, ones, dtype=f"int32x{n}")

    def broadcast_quad(self, buffer: Any, *index: Any) -> Any:
        """Four consecutive int8 (the last index is where they start) repeated in every lane: one vpbroadcastd."""
        quad = T.reinterpret("int32", buffer[(*index[:-1], T.ramp(index[-1], 1, 4))])
        return T.reinterpret(f"int8x{4 * self.lanes}", T.broadcast(quad, self.lanes))

    # -- tables -------------------------------------------------------------------------------------------------
    def look_up(self, table: Sequence[int], codes: Any) -> Any:
        """table[code] for a register of uint8 codes below 16; the table's 16 values are bytes."""
        n = 4 * self.lanes
        values = T.bind(T.reinterpret(f"int8x{n}", self._repeated(table)))
        name = "llvm.x86.avx512.pshuf.b.512" if self.lanes == 16 else "llvm.x86.avx2.pshuf.b"
        return T.reinterpret(f"uint8x{n}", pure(name, values, T.reinterpret(f"int8x{n}", codes), dtype=f"int8x{n}"))

    def _repeated(self, table: Sequence[int]) -> Any:
        """16 bytes in every 128 bits of a register: as constants of 32 bits, of which TVM can make a vector."""
        words = [int.from_bytes(bytes(v & 255 for v in table[i : i + 4]), "little", signed=True) for i in (0, 4, 8, 12)]
        return T.Shuffle([T.int32(words[i % 4]) for i in range(self.lanes)], list(range(self.lanes)))

    def look_up_floats(self, table: Sequence[float], codes: Any) -> Any:
        """table[code] for a register of int32 codes below 16; the table holds 16 float32."""
        n = self.lanes
        if n == 16:
            values = T.Shuffle([T.float32(v) for v in table], list(range(16)))
            return pure("llvm.x86.avx512.permvar.sf.512", values, codes, dtype="float32x16")
        low, high = (T.Shuffle([T.float32(v) for v in table[i : i + 8]], list(range(8))) for i in (0, 8))
        parts = [pure("llvm.x86.avx2.permps", half, codes, dtype="float32x8") for half in (low, high)]
        return T.Select(codes > self.i32(7), parts[1], parts[0])

    def prefetch(self, address_of: Any) -> None:
        """Ask for the cache line of `address_of` (a buffer element), for reading, into all levels."""
        effect("llvm.prefetch", T.address_of(address_of), T.int32(0), T.int32(3), T.int32(1))
