"""The loops of a recurrent kernel: over steps, phases of a step, panels of hidden units, and blocks of rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

from llmc.schedules.base import Config
from llmc.schedules.recurrent.cells import PHASES, Units
from llmc.schedules.recurrent.workload import RecurrentWorkload
from llmc.targets.base import Target
from llmc.targets.intrinsics import Reg, Simd
from llmc.tvm_shim import IRBuilder, T

_CHAINS = 8  # independent sums that keep both FMA units busy: 2 a cycle, latency 4


def build(workload: RecurrentWorkload, target: Target, config: Config) -> Any:
    """The PrimFunc of template "recurrent"."""
    return _Kernel(workload, target, config).build()


@dataclass(frozen=True)
class _Place:
    """Where a body works: step, direction, panel of units, and the first of its rows."""

    step: Any
    direction: Any
    panel: Any
    first: Any


class _Kernel:
    """One kernel under construction: what the pieces of its body share."""

    def __init__(self, workload: RecurrentWorkload, target: Target, config: Config) -> None:
        self.workload, self.simd, self.phases = workload, Simd(target), PHASES[workload.cell]
        self.MR, self.NV, self.KU = int(config["MR"]), int(config["NV"]), int(config["KU"])
        self.share, self.grain = config["share"], int(config["grain"])
        self.NR = self.NV * self.simd.lanes
        self.panels = -(-workload.hidden // self.NR)

    def build(self) -> Any:
        w, H, D = self.workload, self.workload.hidden, self.workload.directions
        with IRBuilder() as ib, T.prim_func(s_tir=True):
            T.func_name("recurrent")
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            handles = {arg.name: T.arg(arg.name, T.handle()) for arg in w.inputs()}
            self.weights = [
                T.arg(f"recurrent{i}", T.Buffer((D, self.panels, H, phase.gates * self.NR), "float32"))
                for i, phase in enumerate(self.phases)
            ]
            bias = {"bias": T.arg("bias", T.Buffer((D, H), "float32"))} if w.cell == "gru_after" else {}
            handles |= {arg.name: T.arg(arg.name, T.handle()) for arg in w.outputs()}
            self.steps, self.B = T.int64(), T.int64()
            symbols = {"steps": self.steps, "B": self.B}
            self.buffers: dict[str, Any] = bias
            for arg in (*w.inputs(), *w.outputs()):
                shape = [symbols[d] if isinstance(d, str) else d for d in arg.shape]
                self.buffers[arg.name] = T.match_buffer(handles[arg.name], shape, "float32")
            planes = 4 if w.cell == "gru" else 2
            self.buffers["states"] = T.alloc_buffer((planes, D, self.B, H), "float32")
            self._begin()
            self.blocks = T.bind(T.max(T.ceildiv(self.B, T.int64(self.MR)), T.int64(1)))
            # Of a block: as many in each as can be. TVM would write B / B, rounded up, with a negative dividend.
            self.rows = T.bind(T.ceildiv(self.B, self.blocks)) if self.MR > 1 else T.int64(1)
            self._steps()
            self._end()
        return ib.get()

    def _states(self, body: Callable[[Any, Any, Any], None]) -> None:
        w = self.workload
        with T.serial(0, w.directions) as d, T.serial(0, self.B) as b, T.serial(0, w.hidden) as j:
            body(d, b, j)

    def _begin(self) -> None:
        """The states before the first step."""
        buffers, initial = self.buffers, self.workload.initial

        def body(d: Any, b: Any, j: Any) -> None:
            T.buffer_store(buffers["states"], buffers["h0"][d, b, j] if initial else T.float32(0), [0, d, b, j])
            if "y_c" in buffers:
                T.buffer_store(buffers["y_c"], buffers["c0"][d, b, j] if initial else T.float32(0), [d, b, j])

        self._states(body)

    def _end(self) -> None:
        """The hidden state after the last step."""
        plane = T.bind(T.floormod(self.steps, T.int64(2)))

        def body(d: Any, b: Any, j: Any) -> None:
            T.buffer_store(self.buffers["y_h"], self.buffers["states"][plane, d, b, j], [d, b, j])

        self._states(body)

    # -- threads ------------------------------------------------------------------------------------------------
    def _steps(self) -> None:
        """All steps, shared among threads where that pays."""
        w = self.workload
        work = T.bind(self.B * T.int64(w.directions * w.gates * w.hidden**2))  # multiplications of a step
        pays = work >= T.int64(self.grain)
        if self.share == "sequences":
            pays = T.And(self.blocks * w.directions > 1, work * self.steps >= T.int64(self.grain))
        with T.If(pays):
            with T.Then():
                if self.share == "units":
                    self._by_units()
                else:
                    self._by_sequences(T.parallel)
            with T.Else():
                self._by_sequences(T.serial)

    def _by_units(self) -> None:
        """Every phase of every step by all threads; one direction after the other, so that each thread's part of one
        weight stays in its cache."""
        with T.serial(0, self.workload.directions) as direction, T.serial(0, self.steps) as step:
            for i in range(len(self.phases)):
                with T.parallel(0, self.panels) as panel:
                    with T.serial(0, self.blocks) as block:
                        self._body(i, _Place(step, direction, panel, T.bind(block * self.rows)))

    def _by_sequences(self, loop: Callable[..., Any]) -> None:
        """All steps of a direction of a block of rows, by one thread."""
        with loop(0, self.blocks * self.workload.directions) as task:
            direction, block = T.bind(T.floordiv(task, self.blocks)), T.bind(T.floormod(task, self.blocks))
            with T.serial(0, self.steps) as step:
                for i in range(len(self.phases)):
                    with T.serial(0, self.panels) as panel:
                        self._body(i, _Place(step, direction, panel, T.bind(block * self.rows)))

    # -- a panel of units of a block of rows --------------------------------------------------------------------
    def _body(self, i: int, place: _Place) -> None:
        """Phase i. Its sums pass through the stack, so that their functions are written once, not for each count of
        rows; buffers of under 1,024 bytes stay there."""
        phase, w, lanes = self.phases[i], self.workload, self.simd.lanes
        sums = [T.alloc_buffer((self.MR, lanes), "float32") for _ in range(phase.gates * self.NV)]
        count = T.bind(T.max(T.min(self.B - place.first, self.rows), T.int64(0)))
        self._dispatch(i, place, sums, count, self.MR)
        start = T.bind(place.panel * self.NR)
        backwards = {"forward": 0, "reverse": 1, "bidirectional": place.direction}[w.way]
        time = T.bind(place.step + backwards * (self.steps - 1 - place.step * 2))
        left = w.hidden - (self.panels - 1) * self.NR  # units of the last panel

        def finish(width: int) -> None:
            with T.serial(0, count) as m:
                for v in range(-(-width // lanes)):
                    registers = [T.bind(sums[g * self.NV + v][m, self.simd.span(0)]) for g in range(phase.gates)]
                    row, n = place.first + m, min(lanes, width - v * lanes)
                    units = Units(
                        self.simd,
                        self.buffers,
                        w.hidden,
                        w.gates,
                        registers,
                        place.step,
                        time,
                        place.direction,
                        row,
                        start + v * lanes,
                        n,
                    )
                    phase.finish(units)

        if left == self.NR:
            finish(left)
            return
        with T.If(place.panel < self.panels - 1):
            with T.Then():
                finish(self.NR)
            with T.Else():
                finish(left)

    def _dispatch(self, i: int, place: _Place, sums: list[Any], count: Any, rows: int) -> None:
        """The product of exactly `count` rows, count <= rows."""
        with T.If(count == rows):
            with T.Then():
                self._product(i, place, sums, rows)
            if rows > 1:
                with T.Else():
                    self._dispatch(i, place, sums, count, rows - 1)

    def _product(self, i: int, place: _Place, sums: list[Any], rows: int) -> None:
        simd, phase, H, weight = self.simd, self.phases[i], self.workload.hidden, self.weights[i]
        vectors, states = phase.gates * self.NV, self.buffers["states"]
        plane = T.bind(T.floormod(place.step, T.int64(2))) if phase.source is None else phase.source
        chains = 1
        while chains * rows * vectors < _CHAINS and chains < self.KU:
            chains *= 2
        acc = [[[simd.reg() for _ in range(vectors)] for _ in range(rows)] for _ in range(chains)]
        for register in (r for chain in acc for row in chain for r in row):
            register.v = simd.f32(0)

        def step(k: Any, chain: list[list[Reg]]) -> None:
            b = [T.bind(weight[place.direction, place.panel, k, simd.span(v * simd.lanes)]) for v in range(vectors)]
            for m in range(rows):
                a = T.bind(simd.splat(states[plane, place.direction, place.first + m, k]))
                for v in range(vectors):
                    chain[m][v].v = simd.fma(b[v], a, chain[m][v].v)

        whole = T.int64(H // self.KU)
        if not self.workload.initial:  # the first step multiplies zeros
            whole = T.Select(place.step > 0, whole, T.int64(0))
        with T.serial(0, whole) as ko:
            for ku in range(self.KU):
                step(ko * self.KU + ku, acc[ku % chains])
        for k in range(H // self.KU * self.KU, H):
            step(k, acc[k % chains])
        for chain, m, v in product(acc[1:], range(rows), range(vectors)):
            acc[0][m][v].v = acc[0][m][v].v + chain[m][v].v
        for m, v in product(range(rows), range(vectors)):
            T.buffer_store(sums[v], acc[0][m][v].v, [m, simd.span(0)])
