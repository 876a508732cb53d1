"""Programs through llmc with all its rewrites, through llmc without any, and through onnxruntime.

Without rewrites every node is compiled by its own rule and has the plain schedule: nothing becomes a linear layer, a
norm or an attention, and no template is asked for. onnxruntime runs with its own rewrites off. What llmc computes with
its rewrites is compared with the float model: it does not round activations where a Q/DQ model says so
(`llmc.quantize.activations`), and rounds them at run time where a kernel multiplies integers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnxruntime

from benchmarks.conformance import build_functions
from llmc.fuse import fuse
from llmc.graph import Graph
from llmc.importer import import_model
from llmc.options import resolve_target
from llmc.quantize import quantize
from llmc.targets.base import Target
from tests.fuzz.program import RUNS, Program, feeds, to_model

T = TypeVar("T")
Arrays = list[np.ndarray]
Call = Callable[..., Arrays]
SLACK = 1e-30  # so that a bound of 0 is met by subnormal numbers, which kernels may flush


class Quick(Target):
    """A target whose code LLVM does not optimise: twice as many graphs in the same time."""

    def tvm(self) -> dict[str, Any]:
        return {**super().tvm(), "opt-level": 0}

    @staticmethod
    def native() -> Quick:
        return Quick(**vars(resolve_target("native")))


@dataclass(frozen=True)
class Failure:
    """`kind` is where it went wrong: "reference" and "bounds" blame the generator, all others llmc."""

    kind: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"


class Wrong(Exception):
    """Raised where a program fails."""

    def __init__(self, kind: str, detail: object) -> None:
        lines = [line.strip() for line in str(detail).splitlines() if line.strip()]
        self.failure = Failure(kind, " | ".join(lines[:4])[:600])
        super().__init__(str(self.failure))


def check(programs: Sequence[Program], target: Target | None = None) -> list[Failure | None]:
    """What is wrong with each program, None for those that are fine. Compiling them together is far cheaper."""
    found: list[Failure | None] = [None] * len(programs)
    subjects: dict[int, _Subject] = {}
    for i, program in enumerate(programs):
        try:
            subjects[i] = _Subject(program)
        except Wrong as wrong:
            found[i] = wrong.failure
    for i, calls in _build(subjects, target or resolve_target("native")).items():
        try:
            if isinstance(calls, Exception):
                raise Wrong("build", calls)
            subjects[i].compare(*calls)
        except Wrong as wrong:
            found[i] = wrong.failure
    return found


class _Subject:
    """One program with its references and its two graphs."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.feeds = [feeds(program, run) for run in range(RUNS)]
        self.exact = _reference(program, self.feeds)
        self.float = _reference(program.float_model(), self.feeds) if program.floats else self.exact
        _check_bounds(program, self.exact, 0)
        _check_bounds(program, self.float, 1)
        self.plain = _step("import", lambda: _imported(program))
        self.fast = _step("rewrites", lambda: fuse(quantize(self.plain, None)))
        self.graphs = [self.plain] if str(self.plain) == str(self.fast) else [self.plain, self.fast]

    def compare(self, plain: Call, fast: Call) -> None:
        for run, fed in enumerate(self.feeds):
            results = []
            for kind, graph, call, wanted, which in (
                ("plain", self.plain, plain, self.exact[run], 0),
                ("fast", self.fast, fast, self.float[run], 1),
            ):
                got = _step(f"run {kind}", lambda c=call, g=graph, f=fed: c(*(f[n] for n in g.inputs)))
                results.append(got)
                compare(self.program, got, wanted, which, kind)
            if not self.program.floats:
                compare(self.program, results[1], results[0], 1, "fast against plain")


def _step(kind: str, run: Callable[[], T]) -> T:
    try:
        return run()
    except Exception as error:
        raise Wrong(kind, f"{type(error).__name__}: {error}") from error


def _imported(program: Program) -> Graph:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(to_model(program).SerializeToString())
        return import_model(path)


def _build(subjects: Mapping[int, _Subject], target: Target) -> dict[int, tuple[Call, Call] | Exception]:
    """Both functions of each program; where building fails together, each half alone, down to the one at fault."""
    if not subjects:
        return {}
    graphs = [graph for s in subjects.values() for graph in s.graphs]
    try:
        calls = iter(build_functions(graphs, target))
    except Exception as error:
        if len(subjects) == 1:
            return dict.fromkeys(subjects, error)
        items = list(subjects.items())
        half = len(items) // 2
        return _build(dict(items[:half]), target) | _build(dict(items[half:]), target)
    made = {i: [next(calls) for _ in s.graphs] for i, s in subjects.items()}
    return {i: (of[0], of[-1]) for i, of in made.items()}


def _reference(program: Program, fed: Sequence[Mapping[str, np.ndarray]]) -> list[Arrays]:
    """What onnxruntime computes, node by node as the graph says, for each of the feeds."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1

    def run() -> list[Arrays]:
        model = to_model(program).SerializeToString()
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return [session.run(None, feed) for feed in fed]

    return _step("reference", run)


def _check_bounds(program: Program, results: Sequence[Arrays], which: int) -> None:
    """The generator knows what it does: results are within the bounds that it states, and numbers."""
    for arrays in results:
        for name, array in zip(program.outputs, arrays, strict=True):
            value = program.values[name]
            wide = array.astype(np.float64)
            room = value.error[which] + 1e-6 * max(abs(value.low), abs(value.high))
            if array.dtype.name != value.dtype:
                raise Wrong("bounds", f"{name} is {array.dtype}, not {value.dtype}")
            if wide.size and not (value.low - room <= wide.min() and wide.max() <= value.high + room):
                raise Wrong("bounds", f"{name}: {wide.min()} to {wide.max()}, not {value.low} to {value.high}")


def compare(program: Program, got: Arrays, wanted: Arrays, which: int, kind: str) -> None:
    """Raises Wrong where types or shapes differ, or values by more than two roundings of them may: each has its own."""
    for name, g, w in zip(program.outputs, got, wanted, strict=True):
        value = program.values[name]
        if (g.dtype, g.shape) != (w.dtype, w.shape):
            raise Wrong(kind, f"{name} is {g.dtype}{list(g.shape)}, not {w.dtype}{list(w.shape)}")
        apart = np.abs(g.astype(np.float64) - w.astype(np.float64))
        allowed = 2 * value.error[which] + SLACK
        if g.size and not apart.max() <= allowed:
            place = np.unravel_index(np.nanargmax(np.where(np.isnan(apart), np.inf, apart)), apart.shape)
            at = [int(p) for p in place]
            raise Wrong(kind, f"{name}{at} is {g[place]}, not {w[place]} within {allowed:.3g}")
