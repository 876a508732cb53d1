"""The cells of recurrent networks: what a phase of a step multiplies, and what becomes of the sums."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmc.targets.intrinsics import Simd
from llmc.tvm_shim import T

# Planes of a kernel's states: two take turns as the hidden state before and after a step; two a gru keeps in between.
RESET, UPDATE = 2, 3


@dataclass(frozen=True)
class Units:
    """A register of hidden units, `n` from `start`, of one row of the batch, once a phase's products are ready."""

    simd: Simd
    buffers: Mapping[str, Any]
    hidden: int
    gates: int  # of the whole cell
    sums: Sequence[Any]  # a register for each of the phase's gates
    step: Any
    time: Any
    direction: Any
    row: Any
    start: Any
    n: int

    def input(self, gate: int) -> Any:
        column = (self.direction * self.gates + gate) * self.hidden + self.start
        return self._load("projected", self.time, self.row, column)

    def bias(self) -> Any:
        """What gru_after adds to the product of its hidden gate."""
        return self._load("bias", self.direction, self.start)

    def old(self) -> Any:
        """The hidden state before the step."""
        return self.read(T.floormod(self.step, T.int64(2)))

    def new(self, h: Any) -> None:
        """Write the hidden state after the step."""
        h = T.bind(h)
        self.keep(T.floormod(self.step + 1, T.int64(2)), h)
        self._store("y", h, self.time, self.direction, self.row, self.start)

    def read(self, plane: Any) -> Any:
        return self._load("states", plane, self.direction, self.row, self.start)

    def keep(self, plane: Any, value: Any) -> None:
        self._store("states", value, plane, self.direction, self.row, self.start)

    def cell(self) -> Any:
        return self._load("y_c", self.direction, self.row, self.start)

    def new_cell(self, value: Any) -> None:
        self._store("y_c", value, self.direction, self.row, self.start)

    def held(self, value: Any) -> Any:
        """The value from a register. TVM takes bound expressions apart: a function of a function would be written out
        once for every time that the outer one uses its argument."""
        register = self.simd.reg()
        register.v = value
        return T.bind(register.v)

    def _load(self, name: str, *at: Any) -> Any:
        value = self.buffers[name][(*at[:-1], self.simd.span(at[-1], self.n))]
        if self.n == self.simd.lanes:
            return T.bind(value)
        register = self.simd.reg()
        register.v = self.simd.f32(0)
        T.buffer_store(register.buffer, value, [self.simd.span(0, self.n)])
        return T.bind(register.v)

    def _store(self, name: str, value: Any, *at: Any) -> None:
        if self.n < self.simd.lanes:
            register = self.simd.reg()
            register.v = value
            value = register.buffer[self.simd.span(0, self.n)]
        T.buffer_store(self.buffers[name], value, [*at[:-1], self.simd.span(at[-1], self.n)])


@dataclass(frozen=True)
class Phase:
    """`gates` matrices from the `first` on, multiplied with the hidden state, or with a plane that was kept of it."""

    first: int
    gates: int
    finish: Callable[[Units], None]
    source: int | None = None


def _rnn(u: Units) -> None:
    u.new(u.simd.tanh(u.input(0) + u.sums[0]))


def _lstm(u: Units) -> None:
    i, o, f = (u.simd.sigmoid(u.input(g) + u.sums[g]) for g in range(3))
    c = u.held(u.simd.fma(f, u.cell(), i * u.simd.tanh(u.input(3) + u.sums[3])))
    u.new_cell(c)
    u.new(o * u.simd.tanh(c))


def _gru_after(u: Units) -> None:
    z, r = (u.simd.sigmoid(u.input(g) + u.sums[g]) for g in range(2))
    _blend(u, z, u.simd.tanh(u.simd.fma(u.held(r), u.sums[2] + u.bias(), u.input(2))))


def _gru_gates(u: Units) -> None:
    z, r = (u.simd.sigmoid(u.input(g) + u.sums[g]) for g in range(2))
    u.keep(UPDATE, z)
    u.keep(RESET, r * u.old())


def _gru_hidden(u: Units) -> None:
    _blend(u, u.read(UPDATE), u.simd.tanh(u.input(2) + u.sums[0]))


def _blend(u: Units, z: Any, candidate: Any) -> None:
    """The new state is (1 - z) candidate + z old."""
    u.new(u.simd.fma(z, u.old() - candidate, candidate))


PHASES: dict[str, tuple[Phase, ...]] = {
    "lstm": (Phase(0, 4, _lstm),),
    "gru": (Phase(0, 2, _gru_gates), Phase(2, 1, _gru_hidden, source=RESET)),
    "gru_after": (Phase(0, 3, _gru_after),),
    "rnn": (Phase(0, 1, _rnn),),
}
