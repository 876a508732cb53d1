"""llmc, from an ONNX file to an artifact, in one function.

Every stage is one function from a frozen value to the next. Each is timed, and with `dump_ir` writes what it made into
one readable file.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from llmc.artifact import Artifact, describe
from llmc.build import build
from llmc.calibrate import calibrate as run_calibration
from llmc.calibrate import resolve_calibration
from llmc.errors import OptionError
from llmc.fuse import Decoder, decoder_of, fuse, sampler_of
from llmc.graph import Graph
from llmc.importer import import_model
from llmc.lower import lower
from llmc.options import resolve_target
from llmc.quantize import quantize as quantize_weights
from llmc.quantize.formats import Format, require_kernels, resolve_format
from llmc.schedules.attention.kv_format import KVCache, resolve_cache
from llmc.schedules.base import Kernel
from llmc.select import Plan, select
from llmc.targets.base import Target
from llmc.tune import Choice, choose_configs
from llmc.tune.effort import Elsewhere, Tuning, resolve_tuning

if TYPE_CHECKING:  # the search loads XGBoost, 90 MB that a compilation without tuning does not need
    from llmc.tune.stage import KernelReport
    from llmc.tune.tuner import TaskResult, TuneEvent

Dims = Mapping[str, int | tuple[int, int]]


@dataclass(frozen=True)
class StageEvent:
    """A stage ended: its name, wall-clock seconds, and one line about what it made."""

    name: str
    seconds: float
    detail: str


@dataclass(frozen=True)
class Tuned:
    """What tuning a model brought: the search of every task that has a choice, and what every kernel ends with."""

    results: list[TaskResult]
    kernels: list[KernelReport]


def compile(
    model: str | Path,
    target: str = "native",
    quantize: str = "none",
    dims: Dims | None = None,
    dump_ir: str | Path | None = None,
    progress: Callable[[StageEvent], None] | None = None,
    *,
    calibrate: str | Path | None = None,
    kv_cache: str = "float32",
    draft_trees: bool = False,
    tune: str = "none",
    tune_seconds: float | None = None,
    trials: int | None = None,
    seed: int = 0,
    database: str | Path | None = None,
    tune_progress: Callable[[TuneEvent], None] | None = None,
) -> Artifact:
    """Compile an ONNX model. Nothing is written until the artifact's `save`, but measurements into the database.

    `target` is a name of `llmc targets`; `quantize` a name of the table of formats; `dims` fixes (int) or bounds
    ((least, most)) symbolic dimensions by name. `calibrate` is a file of samples for formats that need them: a text, or
    an .npz with the model's inputs. `kv_cache` is what a decoder's sessions keep keys and values in:
    float32, int8, fp8 or int4; only float32 leaves the model its plain signature, with past and present as arrays. With
    `paged` after a comma, or alone, they lie in pages that forks and rows share (`int8,paged`). `draft_trees` adds what
    `Session.verify` runs: trees of draft tokens, read in one pass. `tune` is
    none, quick or full; `tune_seconds` and `trials` (candidates a kernel, on average) replace the effort's own limits.
    With "none" kernels still get the best configuration that `database` (None: the user's own) or llmc's logs know.
    Ctrl-C while kernels are tuned ends the tuning alone.
    Raises LlmcError's subclasses.
    """
    stage = _Stages(progress, Path(dump_ir) if dump_ir else None)
    machine, format = resolve_target(target), resolve_format(quantize)
    require_kernels(format, machine)
    cache, paged = resolve_cache(kv_cache)
    data = resolve_calibration(calibrate, format)
    known = Path(database) if database else None
    tuning = resolve_tuning(tune, machine, tune_seconds, trials, seed, known)

    plan, decoder = _plan(stage, Path(model), machine, format, dims, cache, paged, data, draft_trees)
    calls = plan.calls()

    def choose() -> dict[Kernel, Choice]:
        if tuning:
            _search(calls, machine, tuning, tune_progress)
        return choose_configs(calls, machine, known)

    choices = stage("tune", choose, _provenance)
    configs = {kernel: choice.config for kernel, choice in choices.items()}
    lowered = stage("lower", lambda: lower(plan, configs, machine), lambda module: f"{len(module.params)} weights")
    folder = tempfile.TemporaryDirectory(prefix="llmc-")
    workspaces = stage("build", lambda: build(lowered.module, machine, Path(folder.name) / "lib.so"))
    return describe(Path(model), machine, format, plan, choices, lowered, decoder, workspaces, folder)


def tune_model(
    model: str | Path,
    target: str = "native",
    quantize: str = "none",
    dims: Dims | None = None,
    progress: Callable[[StageEvent], None] | None = None,
    *,
    tune: str = "quick",
    tune_seconds: float | None = None,
    trials: int | None = None,
    seed: int = 0,
    database: str | Path | None = None,
    tune_progress: Callable[[TuneEvent], None] | None = None,
    elsewhere: Elsewhere | None = None,
) -> Tuned:
    """Tune a model's kernels as `compile` does, here or `elsewhere`, and build nothing: what is found waits in the
    database."""
    stage = _Stages(progress, None)
    machine, format = resolve_target(target), resolve_format(quantize)
    require_kernels(format, machine)
    resolve_calibration(None, format)
    known = Path(database) if database else None
    tuning = resolve_tuning(tune, machine, tune_seconds, trials, seed, known, elsewhere)
    plan, _ = _plan(stage, Path(model), machine, format, dims)
    calls = plan.calls()
    search = lambda: _search(calls, machine, tuning, tune_progress) if tuning else []  # noqa: E731
    results = stage("tune", search, lambda found: f"{sum(len(r.trials) for r in found)} trials")

    from llmc.tune.stage import report

    return Tuned(results, report(calls, choose_configs(calls, machine, known), results))


def _search(
    calls: Mapping[Kernel, int], machine: Target, tuning: Tuning, progress: Callable[[TuneEvent], None] | None
) -> list[TaskResult]:
    from llmc.tune.stage import tune_kernels

    return tune_kernels(calls, machine, tuning, progress)


def _plan(
    stage: _Stages,
    model: Path,
    target: Target,
    format: Format | None,
    dims: Dims | None,
    kv_cache: KVCache = "float32",
    paged: bool = False,
    data: Path | None = None,
    draft_trees: bool = False,
) -> tuple[Plan, Decoder | None]:
    """The stages from the file to its kernels. Raises OptionError where a model without a cache is to round it, or to
    read trees."""
    graph = stage("import", lambda: import_model(model, dims), _nodes)
    statistics = None
    if data is not None:
        measure = lambda: run_calibration(quantize_weights(graph, None), model, data)  # noqa: E731
        statistics = stage("calibrate", measure, lambda s: f"{len(s.largest)} inputs of layers")
    graph = stage("quantize", lambda: quantize_weights(graph, format, statistics), _nodes)
    graph = stage("fuse", lambda: fuse(graph, channels_last=target.kind != "cuda"), _nodes)
    layers = lambda d: f"{len(d.caches)} layers" if d else "no decoder"  # noqa: E731
    decoder = stage("kv-cache", lambda: decoder_of(graph, kv_cache, paged, draft_trees), layers)
    functions = dict(decoder.functions) if decoder else {}
    if decoder and target.kind == "cuda":
        functions["sample"] = sampler_of(decoder.vocab_size)
    if kv_cache == "float32":
        functions = {"main": graph, **functions}
    if decoder is None and (paged or kv_cache != "float32"):
        kept = "in pages" if paged else f"in {kv_cache}"
        what = f"this model is no decoder with a cache that a session could keep {kept}"
        raise OptionError(what, where="--kv-cache", hint="leave the option out")
    if decoder is None and draft_trees:
        what = "this model is no decoder with a cache, whose sessions could read trees"
        raise OptionError(what, where="--draft-trees", hint="leave the option out")
    return stage("select", lambda: select(functions, target), lambda p: f"{len(p.calls())} kernels"), decoder


Value = TypeVar("Value")


class _Stages:
    """Runs stages, times them, and dumps what they return."""

    def __init__(self, progress: Callable[[StageEvent], None] | None, dump: Path | None) -> None:
        self.progress, self.dump, self.count = progress, dump, 0
        if dump is not None:
            dump.mkdir(parents=True, exist_ok=True)

    def __call__(self, name: str, run: Callable[[], Value], detail: Callable[[Value], str] = lambda _: "") -> Value:
        start = time.perf_counter()
        value = run()
        if self.dump is not None:
            (self.dump / f"{self.count}-{name}.txt").write_text(f"{value}\n", encoding="utf-8")
        self.count += 1
        if self.progress is not None:
            self.progress(StageEvent(name, time.perf_counter() - start, detail(value)))
        return value


def _nodes(graph: Graph) -> str:
    return f"{len(graph.nodes)} nodes"


def _provenance(choices: Mapping[Kernel, Choice]) -> str:
    """How many configurations come from where."""
    counts = Counter(choice.provenance for choice in choices.values())
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
