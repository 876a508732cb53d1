"""Where a model's time goes: each kernel's share, and how near it comes to what the machine can do (its roofline).

The model is loaded twice, and both take turns: one runs undisturbed and gives the total, the other tells of every call
that its virtual machine makes. The least time of each single call counts, less what watching costs. What the total
holds beyond their sum are waits: between one call and the next, and for cores that others use.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llmc import ceilings
from llmc.bench import Task
from llmc.errors import OptionError
from llmc.options import resolve_target
from llmc.package.manifest import KernelSpec
from llmc.runtime import Model, load
from llmc.schedules.attention.layout import BLOCK
from llmc.schedules.base import Kernel, Work, Workload, bind_dims
from llmc.schedules.families import FAMILIES

SECONDS = 2.0  # of measuring, for each task
_BUILTIN = "vm.builtin."
_SHAPES = "shape_func"  # the machine's own arithmetic on lengths


@dataclass(frozen=True)
class Ceilings:
    """What the machine can do with all threads: operations a second by unit (`Work.unit`), and bytes read a second."""

    peaks: Mapping[str, float]
    bandwidth: float


@dataclass(frozen=True)
class Operator:
    """All calls of one kernel in one run. `ops` and `bytes` are those of all calls.

    `roofline` is the least time that the ceilings allow over the time it took; more than 1 where caches held what
    would otherwise come from memory. A kernel that no template wrote is judged by the size of its arguments alone.
    """

    name: str
    workload: Mapping[str, Any]
    calls: int
    seconds: float
    ops: float
    bytes: float
    roofline: float


@dataclass(frozen=True)
class Profile:
    """One task: `seconds` in all, its kernels by falling time, and the rest.

    `machine` is the virtual machine's own calls (shapes, allocation), `python` what comes before the first call and
    after the last one.
    """

    seconds: float
    operators: tuple[Operator, ...]
    machine: float
    python: float

    @property
    def kernels(self) -> float:
        return sum(o.seconds for o in self.operators)

    @property
    def waits(self) -> float:
        return max(0.0, self.seconds - self.kernels - self.machine - self.python)

    def as_json(self) -> dict[str, Any]:
        """{"seconds", "kernels", "machine", "python", "waits", "operators": [{"name", "calls", …}]}, in s."""
        return asdict(self) | {"kernels": self.kernels, "waits": self.waits}


def profile(
    artifact: Path,
    tasks: Sequence[Task],
    *,
    threads: int | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> tuple[Ceilings, dict[str, Profile]]:
    """Each task's profile by its name. Raises what loading the artifact raises, and OptionError for one for a GPU."""
    progress(f"loading {artifact}")
    plain, watched = load(artifact, threads), load(artifact, threads)
    if plain.memory.on_device:
        hint = "NVIDIA's Nsight Systems shows it: nsys profile llmc bench model.llmc"
        raise OptionError("of a GPU's kernels only the launches are seen, not their time", where="--profile", hint=hint)
    watch = _Watch({spec.name: spec for spec in plain.manifest.kernels})
    watched.observe(watch)
    progress("measuring the machine")
    target = resolve_target(plain.manifest.target.name)
    limits = Ceilings({u: ceilings.peak(target, u) for u in ("fma", "dot")}, ceilings.read_bandwidth(target))
    profiles = {}
    for task in tasks:
        progress(f"profiling {task.name}")
        profiles[task.name] = _profile(_calls(plain, task), _calls(watched, task), watch, limits)
    return limits, profiles


def _profile(bare: Callable[[], None], observed: Callable[[], None], watch: _Watch, limits: Ceilings) -> Profile:
    works = watch.record(observed)
    total, python, times = float("inf"), float("inf"), np.full(len(works), np.inf)
    end, rounds = time.perf_counter() + SECONDS, 0
    while rounds < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        bare()
        total = min(total, time.perf_counter() - start)
        seconds, around = watch.time(observed)
        times, python = np.minimum(times, seconds), min(python, around)
        rounds += 1
    own = np.array([call.work is None for call in works])
    times -= times[own].min(initial=times.min())  # the machine's simplest call does next to nothing: that is watching
    grouped: dict[str, list[tuple[Work, float]]] = {}
    for call, t in zip(works, times, strict=True):
        if call.work is not None:
            grouped.setdefault(call.name, []).append((call.work, float(t)))
    operators = [_operator(name, calls, limits, watch.kernels.get(name)) for name, calls in grouped.items()]
    by_time = sorted(operators, key=lambda o: -o.seconds)
    return Profile(total, tuple(by_time), float(times[own].sum()), python)


@dataclass(frozen=True)
class _Call:
    """One call of the virtual machine; no work where it is one of its own."""

    name: str
    work: Work | None


def _operator(name: str, calls: Sequence[tuple[Work, float]], limits: Ceilings, spec: KernelSpec | None) -> Operator:
    works, seconds = [work for work, _ in calls], max(sum(t for _, t in calls), 1e-9)
    least = sum(w.seconds(limits.peaks, limits.bandwidth) for w in works)
    ops, moved = sum(w.ops for w in works), sum(w.bytes for w in works)
    return Operator(name, spec.workload if spec else {}, len(calls), seconds, ops, moved, least / seconds)


class _Watch:
    """What the virtual machine calls: first with its arguments, to know the work; then fast, with the time alone."""

    def __init__(self, kernels: Mapping[str, KernelSpec]) -> None:
        self.kernels = kernels
        self._members = {name: kernel for name, spec in kernels.items() if (kernel := _kernel(spec)) is not None}
        self._seen: list[_Call] | None = None
        self._starts: list[int] = []
        self._ends: list[int] = []

    def __call__(self, function: Any, symbol: str, before: bool, result: Any, *arguments: Any) -> None:
        if not before:
            self._ends.append(time.perf_counter_ns())
            return
        if self._seen is not None:
            self._seen.append(_Call(symbol, self._work(symbol, arguments)))
        self._starts.append(time.perf_counter_ns())

    def record(self, run: Callable[[], None]) -> list[_Call]:
        """Every call of one run, in order."""
        seen: list[_Call] = []
        self._seen = seen
        run()
        self._seen = None
        return seen

    def time(self, run: Callable[[], None]) -> tuple[np.ndarray, float]:
        """Seconds of every call of one run, in order, and of what came before the first and after the last."""
        self._starts.clear()
        self._ends.clear()
        start = time.perf_counter_ns()
        run()
        end = time.perf_counter_ns()
        around = self._starts[0] - start + end - self._ends[-1]
        return np.subtract(self._ends, self._starts) * 1e-9, around * 1e-9

    def _work(self, symbol: str, arguments: Sequence[Any]) -> Work | None:
        if symbol.startswith((_BUILTIN, _SHAPES)):
            return None
        if symbol not in self._members:
            return Work(ops=0, bytes=sum(_size(a) for a in arguments if hasattr(a, "shape")))
        template, w = self._members[symbol].template, self._members[symbol].workload
        inputs, outputs = w.inputs(), w.outputs()
        tensors = [*arguments[: len(inputs)], *arguments[len(arguments) - len(outputs) :]]
        arrays = {arg.name: t for arg, t in zip((*inputs, *outputs), tensors, strict=True)}
        dims = bind_dims((*inputs, *outputs), arrays)
        if "kv_len" in arrays and "CB" in dims:  # a cache has room for more than it holds
            dims["C"] = min(dims.get("C", dims["CB"] * BLOCK), int(np.from_dlpack(arrays["kv_len"]).max()))
            dims["CB"] = -(-dims["C"] // BLOCK)
        return template.work(w, dims)


def _kernel(spec: KernelSpec) -> Kernel | None:
    """The kernel that `spec` describes; None where another version of llmc wrote it."""
    template, workload = FAMILIES.get(spec.template, (None, Workload))
    if template is None or template.version != spec.version:
        return None
    return Kernel(template, workload(**spec.workload))


def _size(tensor: Any) -> float:
    return float(np.prod(tensor.shape)) * tensor.dtype.itemsize


def _calls(model: Model, task: Task) -> Callable[[], None]:
    """What is timed: the task, once. A decoder's is its prompts, or one token after each of them."""
    if task.inputs is not None:
        return partial(_discard, model.functions["main"], task.inputs)
    assert model.manifest.decoder is not None
    sizes = (task.batch, task.prefill)
    ids = np.random.default_rng(0).integers(0, model.manifest.decoder.vocab_size, sizes)
    session = model.session(task.batch)
    length = 0
    if task.decode:
        session.append(ids)
        ids, length = ids[:, :1], task.prefill

    def run() -> None:
        session.truncate(length)
        session.append(ids, all=True)

    return run


def _discard(function: Callable[[Any], Any], inputs: Any) -> None:
    function(inputs)
