"""Recurrent layers on GPUs: a block of threads keeps some rows of the batch, in one direction, through all steps.

The states lie in shared memory, so that steps need no launches; the recurrent weight comes from the caches in every
step. A thread makes all gates of a hidden unit, for all rows of its block: four weights that follow each other are one
load, of neighbouring units from neighbouring places.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmc.schedules.base import Arrays, Config, Space, Workload
from llmc.schedules.recurrent.cells import PHASES, Phase, Units
from llmc.schedules.recurrent.recurrent import Recurrent
from llmc.schedules.recurrent.workload import RecurrentWorkload
from llmc.targets.base import Target
from llmc.targets.cuda import CudaTarget
from llmc.targets.threads import Cell, Scalar, barrier, launch, strided
from llmc.tvm_shim import IRBuilder, T

_QUAD = 4  # weights of one load


class CudaRecurrent(Recurrent):
    """Template "recurrent_cuda". Packed: for each phase of a step [D, ceil(hidden/4), gates, hidden, 4], of which the
    last dimension is the old state's, missing ones zero. Knobs: `threads` of a block, `rows` of the batch in it."""

    name = "recurrent_cuda"

    def accepts(self, workload: Workload, target: Target) -> bool:
        return isinstance(workload, RecurrentWorkload) and isinstance(target, CudaTarget) and _fits(workload, 1, target)

    def space(self, workload: RecurrentWorkload, target: Target) -> Space:
        knobs = {"threads": (32, 64, 128, 256, 512), "rows": (1, 2, 4, 8)}
        return Space(knobs, lambda config: _fits(workload, int(config["rows"]), target))

    def default(self, workload: RecurrentWorkload, target: Target) -> dict[str, int | str]:
        units = 1 << max(workload.hidden - 1, 0).bit_length()
        rows = next(rows for rows in (4, 2, 1) if _fits(workload, rows, target))
        return {"threads": max(32, min(512, units)), "rows": rows}

    def prepack(
        self, weights: Mapping[str, Any], workload: RecurrentWorkload, config: Config, target: Target
    ) -> Arrays:
        H = workload.hidden
        packed = {}
        for i, phase in enumerate(PHASES[workload.cell]):
            rows = np.asarray(weights["recurrent"])[:, phase.first * H : (phase.first + phase.gates) * H]
            padded = np.pad(rows, ((0, 0), (0, 0), (0, -H % _QUAD)))
            quads = padded.reshape(len(rows), phase.gates, H, -1, _QUAD)
            packed[f"recurrent{i}"] = np.ascontiguousarray(quads.transpose(0, 3, 1, 2, 4))
        return packed | ({"bias": weights["bias"]} if workload.cell == "gru_after" else {})

    def layout(self, workload: RecurrentWorkload, config: Config, target: Target) -> str:
        return f"recurrent_cuda.{workload.cell}"

    def build(self, workload: RecurrentWorkload, target: Target, config: Config) -> Any:
        w, H, D, threads, rows = workload, workload.hidden, workload.directions, *map(int, _knobs(config))
        with IRBuilder() as ib, T.prim_func(s_tir=True):
            T.func_name("recurrent")
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            handles = {arg.name: T.arg(arg.name, T.handle()) for arg in w.inputs()}
            weights = [
                T.arg(f"recurrent{i}", T.Buffer((D, -(-H // _QUAD), phase.gates, H, _QUAD), "float32"))
                for i, phase in enumerate(PHASES[w.cell])
            ]
            buffers = {"bias": T.arg("bias", T.Buffer((D, H), "float32"))} if w.cell == "gru_after" else {}
            handles |= {arg.name: T.arg(arg.name, T.handle()) for arg in w.outputs()}
            symbols = {"steps": T.int64(), "B": T.int64()}
            for arg in (*w.inputs(), *w.outputs()):
                shape = [symbols[d] if isinstance(d, str) else d for d in arg.shape]
                buffers[arg.name] = T.match_buffer(handles[arg.name], shape, "float32")
            blocks = T.floordiv(symbols["B"] + (rows - 1), T.int64(rows))
            with launch(threads, blocks, D) as (thread, block, direction):
                _Block(w, target, buffers, weights, symbols, thread, threads, rows, block * rows, direction).run()
        return ib.get()


def _knobs(config: Config) -> tuple[int | str, int | str]:
    return config["threads"], config["rows"]


def _planes(w: RecurrentWorkload) -> int:
    return 4 if w.cell == "gru" else 2


def _width(w: RecurrentWorkload) -> int:
    """Of a state's row: whole loads."""
    return -(-w.hidden // _QUAD) * _QUAD


def _fits(w: RecurrentWorkload, rows: int, target: Target) -> bool:
    assert isinstance(target, CudaTarget)
    return 4 * _planes(w) * rows * _width(w) <= target.block_shared_bytes


@dataclass(frozen=True)
class _Unit(Units):
    """One hidden unit of one row: states are the block's own."""

    states: Any = None
    own: int = field(default=0)  # the row's number in the block

    def new(self, h: Any) -> None:
        super().new(self.held(h))

    def held(self, value: Any) -> Any:
        return Cell(value).v

    def _load(self, name: str, *at: Any) -> Any:
        if name == "states":
            return Cell(self.states[at[0], self.own, at[-1]]).v
        return Cell(self.buffers[name][at]).v

    def _store(self, name: str, value: Any, *at: Any) -> None:
        if name == "states":
            T.buffer_store(self.states, value, [at[0], self.own, at[-1]])
        else:
            T.buffer_store(self.buffers[name], value, list(at))


class _Block:
    """The work of one block of threads: `rows` rows of the batch from `first` on, some of which may not exist."""

    def __init__(
        self,
        w: RecurrentWorkload,
        target: Target,
        buffers: dict[str, Any],
        weights: list[Any],
        symbols: dict[str, Any],
        thread: Any,
        threads: int,
        rows: int,
        first: Any,
        direction: Any,
    ) -> None:
        self.w, self.target, self.buffers, self.weights, self.symbols = w, target, buffers, weights, symbols
        self.thread, self.threads, self.rows, self.direction = thread, threads, rows, direction
        self.first = T.bind(first)
        self.states = T.alloc_buffer((_planes(w), rows, _width(w)), "float32", scope="shared.dyn")

    def run(self) -> None:
        w, steps = self.w, self.symbols["steps"]
        self._begin()
        with T.serial(0, steps) as i:
            step = T.bind(T.Cast("int64", i))
            back = T.bind(steps - 1 - step)
            time = {"forward": step, "reverse": back}.get(w.way)
            time = T.bind(T.Select(self.direction == 0, step, back)) if time is None else time
            for phase, weight in zip(PHASES[w.cell], self.weights, strict=True):
                self._phase(phase, weight, step, time)
                barrier()
        for m in range(self.rows):
            with T.If(self.first + m < self.symbols["B"]), T.Then(), strided(w.hidden, self.thread, self.threads) as u:
                last = self.states[T.floormod(steps, T.int64(2)), m, u]
                T.buffer_store(self.buffers["y_h"], last, [self.direction, self.first + m, u])

    def _begin(self) -> None:
        """States as they are before the first step, zeros behind them and in rows that do not exist."""
        zero = T.float32(0)
        with strided(_planes(self.w) * self.rows * _width(self.w), self.thread, self.threads) as i:
            row, u = T.bind(T.floordiv(i, T.int64(_width(self.w)))), T.floormod(i, T.int64(_width(self.w)))
            T.buffer_store(self.states, zero, [T.floordiv(row, T.int64(self.rows)), T.floormod(row, self.rows), u])
        barrier()
        for m in range(self.rows):
            with T.If(self.first + m < self.symbols["B"]), T.Then():
                at = (self.direction, self.first + m)
                with strided(self.w.hidden, self.thread, self.threads) as u:
                    if self.w.initial:
                        T.buffer_store(self.states, self.buffers["h0"][(*at, u)], [0, m, u])
                    if self.w.cell == "lstm":
                        cell = self.buffers["c0"][(*at, u)] if self.w.initial else zero
                        T.buffer_store(self.buffers["y_c"], cell, [*at, u])
        barrier()

    def _phase(self, phase: Phase, weight: Any, step: Any, time: Any) -> None:
        plane = T.bind(T.floormod(step, T.int64(2))) if phase.source is None else T.int64(phase.source)
        with strided(self.w.hidden, self.thread, self.threads) as u:
            sums = [[Cell(T.float32(0)) for _ in range(phase.gates)] for _ in range(self.rows)]
            with T.serial(0, _width(self.w) // _QUAD) as i:
                k = T.bind(T.Cast("int64", i))
                found = [self._quad(weight, [self.direction, k, gate, u], 0) for gate in range(phase.gates)]
                for m in range(self.rows):
                    state = self._quad(self.states, [plane, m], k * _QUAD)
                    for cell, row in zip(sums[m], found, strict=True):
                        for j in range(_QUAD):
                            cell.v = cell.v + row[j] * state[j]
            for m in range(self.rows):
                with T.If(self.first + m < self.symbols["B"]), T.Then():
                    values = [cell.v for cell in sums[m]]
                    scalar: Any = Scalar(self.target)
                    unit = _Unit(
                        simd=scalar,
                        buffers=self.buffers,
                        hidden=self.w.hidden,
                        gates=self.w.gates,
                        sums=values,
                        step=step,
                        time=time,
                        direction=self.direction,
                        row=self.first + m,
                        start=u,
                        n=1,
                        states=self.states,
                        own=m,
                    )
                    phase.finish(unit)

    @staticmethod
    def _quad(buffer: Any, at: list[Any], start: Any) -> Any:
        few = T.alloc_buffer((_QUAD,), "float32", scope="local")
        T.buffer_store(few, buffer[(*at, T.ramp(start, 1, _QUAD))], [T.ramp(0, 1, _QUAD)])
        return few


CUDA_RECURRENT = CudaRecurrent()
