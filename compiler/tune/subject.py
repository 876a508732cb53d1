"""One task inside a worker: its random data, what must come out, and its default kernel, ready to be raced."""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.schedules.base import Arrays, Config, Kernel
from llmc.tune.machine_code import build_and_count
from llmc.tune.task import Status, Task, Timing
from llmc.tvm_shim import PrimFunc, TvmTarget, for_sizes, tvm

_ROWS = 33  # distinct rows of a workload whose rows are independent: longer inputs repeat them
_SEEDS = 3  # sets of inputs on which a candidate must be right before it is kept
_COPIES = 1024  # most copies of a weight
# Copies of a weight fill the last-level cache so many times over; but no more bytes than this: a cache of hundreds of
# MiB belongs to many cores, whose other work evicts what one model left there.
_COLD, _COLD_BYTES = 2, 192 << 20
_BUDGET, _CAREFUL_BUDGET = 0.12, 0.5  # seconds at one point
_NARROW, _CAREFUL_NARROW = 0.01, 0.004  # half-width of the ratio's interval that is tight enough
_HOPELESS = 1.2  # a candidate that is surely slower than this times the default need not be known better
_WARM = 2  # calls before any is timed
_ROUNDS, _FEW = 7, 3  # calls that are timed at least; of slow kernels
_QUARTILE = 0.25
_DISTURBED = 2.5  # a default that takes so much longer than it once did says that threads wait for a core,
_USEFUL = 0.05  # and so does a wider interval:
_PATIENCE = 4  # the measurement then goes on for up to so many budgets


class Rejected(Exception):
    """A candidate computes something else than the reference, or not the same thing twice."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Case:
    """One call: inputs, and what must come out. `expected` may hold fewer rows than the output: they repeat."""

    dims: Mapping[str, int]
    inputs: Arrays
    expected: Arrays
    outputs: Mapping[str, tuple[tuple[int, ...], str]]  # shape and dtype of what the kernel writes

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in self.dims.items())


@dataclass(frozen=True)
class Candidate:
    """A built kernel, the copies of its packed weights, which are taken in turn, and what its machine code shows."""

    call: Callable[..., Any]
    packed: Sequence[tuple[Any, ...]]
    turns: Iterator[tuple[Any, ...]]
    code: Mapping[str, float]
    config: Config


class Subject:
    """A task's data. With `careful`, kernels are built as models use them and checked at all corners; without, they are
    built for the task's points, and checked there.

    Raises whatever building the default raises, and `Rejected` if it is wrong.
    """

    def __init__(self, task: Task, careful: bool, seed: int) -> None:
        self.task, self.careful, self.kernel = task, careful, task.kernel
        template, workload = task.kernel.template, task.kernel.workload
        rng = np.random.default_rng([seed, *task.key.encode()])
        self.weights = template.example_weights(workload, rng)
        self.packs: dict[str, tuple[Sequence[tuple[Any, ...]], Iterator[tuple[Any, ...]]]] = {}
        self.inputs: dict[str, Iterator[list[Any]]] = {}  # by case, as `_inputs` has them
        self.otherwise: dict[tuple[int, str], Arrays] = {}  # what is expected of a case by those who round otherwise
        self.usual: dict[str, float] = {}  # seconds of the default by case, in the calmest measurement so far
        self.default = self._build_default()
        points = [p.sizes() for p in task.points]
        sizes = [*points, *template.corners(workload)] if careful else points
        self.checked = [
            case for _ in range(_SEEDS if careful else 1) for case in _cases(task.kernel, self.weights, sizes, rng)
        ]
        self.timed = self.checked[: len(points)]
        self.check(self.default)

    def _build_default(self) -> Candidate:
        return self.build(self.kernel.template.default(self.kernel.workload, self.task.target))

    def build(self, config: Config) -> Candidate:
        """Compile a configuration and pack the weights for it."""
        func = function_of(self.task, config, self.careful)
        module, code = build_and_count({"kernel": func}, TvmTarget(self.task.target.tvm()))
        return Candidate(module["kernel"], *self._packed(config), code, config)

    def _packed(self, config: Config) -> tuple[Sequence[tuple[Any, ...]], Iterator[tuple[Any, ...]]]:
        """The packed weights for a configuration; those of two layouts are kept."""
        layout = self.kernel.template.layout(self.kernel.workload, config, self.task.target)
        if layout not in self.packs:
            while len(self.packs) > 1:  # the default's comes first and stays
                self.packs.popitem()
            self.packs[layout] = self._pack(config)
        return self.packs[layout]

    def _pack(self, config: Config) -> tuple[Sequence[tuple[Any, ...]], Iterator[tuple[Any, ...]]]:
        """So many copies of the packed weights that each has left the cache when its turn comes again."""
        template, workload, target = self.kernel.template, self.kernel.workload, self.task.target
        arrays = list(template.prepack(self.weights, workload, config, target).values())
        copies = self._copies(sum(a.nbytes for a in arrays))
        packed = [tuple(self._there(np.ascontiguousarray(a)) for a in arrays) for _ in range(copies)]
        return packed, itertools.cycle(packed)

    def _copies(self, size: int) -> int:
        """How many copies of so many bytes keep any of them out of the cache until its turn comes again."""
        cold = min(_COLD * self.task.target.l3_bytes, _COLD_BYTES)
        return min(_COPIES, max(1, math.ceil(cold / size))) if size else 1

    def check(self, candidate: Candidate) -> None:
        """Raises Rejected if two equal calls differ, or one differs from the reference."""
        tolerance = self.kernel.template.tolerance(self.kernel.workload)
        for case in self.checked:
            first, second = (self._call(candidate, case) for _ in range(2))
            for name, got in first.items():
                if got.tobytes() != second[name].tobytes():
                    raise Rejected("unstable", f"{name} differs between two equal calls at {case}")
            for name, want in self._expected(candidate, case).items():
                error, bound = _error(first[name], want), tolerance * max(1e-30, float(np.abs(want).max()))
                if not error <= bound:
                    raise Rejected("wrong", f"{name} is off by {error:.2g} at {case}, where {bound:.2g} is allowed")

    def _expected(self, candidate: Candidate, case: Case) -> Arrays:
        """What this candidate must compute: the reference, unless its configuration rounds otherwise."""
        template, workload = self.kernel.template, self.kernel.workload
        rounding = template.arithmetic(workload, candidate.config)
        if not rounding:
            return case.expected
        key = id(case), rounding
        if key not in self.otherwise:
            self.otherwise[key] = template.expected(workload, candidate.config, case.inputs, self.weights)
        return self.otherwise[key]

    def _call(self, candidate: Candidate, case: Case) -> Arrays:
        """Everything that the reference speaks of, after one call. Outputs start as NaN: what stays unwritten shows."""
        buffers = {name: self._there(a) for name, a in case.inputs.items()}
        outputs = self._outputs(case)
        candidate.call(*buffers.values(), *candidate.packed[0], *outputs.values())
        return {name: (buffers | outputs)[name].numpy() for name in case.expected}

    def _there(self, array: np.ndarray) -> Any:
        """An array where kernels run."""
        return tvm.runtime.tensor(array)

    def _outputs(self, case: Case) -> dict[str, Any]:
        """NaN, and -1 for integers: what stays unwritten shows."""
        blanks = {n: np.full(s, np.nan if t.startswith("float") else -1, t) for n, (s, t) in case.outputs.items()}
        return {name: self._there(blank) for name, blank in blanks.items()}

    def time(self, candidate: Candidate) -> dict[str, Timing]:
        """The candidate against the default at every point."""
        return {
            str(point): self._race(candidate, case) for point, case in zip(self.task.points, self.timed, strict=True)
        }

    def _inputs(self, case: Case) -> Iterator[list[Any]]:
        """The inputs again and again, those that are cold in so many copies that none is still in the cache."""
        if str(case) not in self.inputs:
            cold = {arg.name for arg in self.kernel.workload.inputs() if arg.cold}
            warm = {name: tvm.runtime.tensor(a) for name, a in case.inputs.items() if name not in cold}
            copies = range(self._copies(sum(case.inputs[name].nbytes for name in cold)))
            sets = [warm | {name: tvm.runtime.tensor(case.inputs[name]) for name in cold} for _ in copies]
            self.inputs[str(case)] = itertools.cycle([[each[name] for name in case.inputs] for each in sets])
        return self.inputs[str(case)]

    def _race(self, candidate: Candidate, case: Case) -> Timing:
        """Calls of both in turns: what slows the machine meets both, and leaves their ratio alone."""
        turns = self._inputs(case)
        outputs = self._outputs(case).values()

        def timed(racer: Candidate) -> float:
            call, arguments = racer.call, (*next(turns), *next(racer.turns), *outputs)
            start = time.perf_counter()
            call(*arguments)
            return time.perf_counter() - start

        for _ in range(_WARM):
            timed(candidate), timed(self.default)
        narrow, budget = (_CAREFUL_NARROW, _CAREFUL_BUDGET) if self.careful else (_NARROW, _BUDGET)
        ours: list[float] = []
        theirs: list[float] = []
        gc.disable()
        start = time.perf_counter()
        while True:
            for _ in range(max(_FEW, len(ours) // 2)):
                if len(ours) % 2:
                    ours.append(timed(candidate))
                    theirs.append(timed(self.default))
                else:
                    theirs.append(timed(self.default))
                    ours.append(timed(candidate))
            (seconds, width), (default, default_width) = undisturbed(ours), undisturbed(theirs)
            ratio, spread = seconds / default, math.hypot(width, default_width)
            usual = self.usual[str(case)] = min(default, self.usual.get(str(case), default))
            calm, spent = default < _DISTURBED * usual, time.perf_counter() - start
            known = len(ours) >= _ROUNDS and (spread < narrow or ratio * (1 - spread) > _HOPELESS)
            enough = known or (spent > budget and spread < _USEFUL)
            if calm and enough:
                break
            if spent > _PATIENCE * budget:
                spread = max(spread, default / usual - 1)
                break
        gc.enable()
        return Timing(seconds, default, spread)


def function_of(task: Task, config: Config, careful: bool) -> PrimFunc:
    """What is built of a configuration: with `careful` the kernel as models use it; without, what the task's points
    need of it, which compiles two to ten times as fast."""
    func = task.kernel.template.build(task.kernel.workload, task.target, config)
    if careful:
        return func
    shapes = [arg.shape for arg in task.kernel.workload.inputs()]
    return for_sizes(func, shapes, [point.sizes() for point in task.points])


def undisturbed(seconds: Sequence[float]) -> tuple[float, float]:
    """The lower quartile, which is what a call takes when nothing comes between, and the relative half-width of its
    95 % interval, by order statistics. A mean or a median would measure the neighbours on a busy machine."""
    values, n = np.sort(seconds), len(seconds)
    reach = 1.96 * math.sqrt(n * _QUARTILE * (1 - _QUARTILE))
    low, high = (values[int(np.clip(n * _QUARTILE + side, 0, n - 1))] for side in (-reach, reach))
    middle = float(np.quantile(values, _QUARTILE))
    return middle, float(high - low) / 2 / middle


def _cases(
    kernel: Kernel, weights: Mapping[str, Any], sizes: Sequence[Mapping[str, int]], rng: np.random.Generator
) -> list[Case]:
    """Calls of these sizes. Where rows are independent one short reference serves them all."""
    template, workload = kernel.template, kernel.workload
    args = (*workload.inputs(), *workload.outputs())
    by_row = all(a.shape[0] == "M" and all(isinstance(d, int) for d in a.shape[1:]) for a in args)
    if not by_row:
        cases = []
        for dims in sizes:
            inputs = template.example_inputs(workload, dims, rng)
            expected = template.reference(workload, inputs, weights)
            specs = {a.name: (expected[a.name].shape, a.dtype) for a in workload.outputs()}
            cases.append(Case(dims, inputs, expected, specs))
        return cases
    if not sizes:
        return []
    rows = min(_ROWS, max(dims["M"] for dims in sizes))
    inputs = template.example_inputs(workload, {"M": rows}, rng)
    expected = template.reference(workload, inputs, weights)

    def case(dims: Mapping[str, int]) -> Case:
        M = dims["M"]
        taken = np.arange(M) % rows
        specs = {a.name: ((M, *expected[a.name].shape[1:]), a.dtype) for a in workload.outputs()}
        return Case(
            dims,
            {name: np.ascontiguousarray(a[taken]) for name, a in inputs.items()},
            {name: a[:M] for name, a in expected.items()},
            specs,
        )

    return [case(dims) for dims in sizes]


def _error(got: np.ndarray, want: np.ndarray) -> float:
    """Largest difference; NaN counts. `want` repeats along the first axis."""
    period = len(want)
    worst = [np.abs(got[i : i + period] - want[: len(got) - i]).max() for i in range(0, len(got), period)]
    return float(np.max(worst)) if worst else 0.0
