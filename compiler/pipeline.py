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
from typing import TypeVar

from llmc.artifact import Artifact, describe
from llmc.build import build
from llmc.fuse import decoder_of, fuse
from llmc.graph import Graph
from llmc.importer import import_model
from llmc.lower import lower
from llmc.options import resolve_target
from llmc.quantize import quantize as quantize_weights
from llmc.quantize.formats import resolve_format
from llmc.schedules.base import Kernel
from llmc.select import select
from llmc.tune import Choice, choose_configs

Dims = Mapping[str, int | tuple[int, int]]


@dataclass(frozen=True)
class StageEvent:
    """A stage ended: its name, wall-clock seconds, and one line about what it made."""

    name: str
    seconds: float
    detail: str


def compile(
    model: str | Path,
    target: str = "native",
    quantize: str = "none",
    dims: Dims | None = None,
    dump_ir: str | Path | None = None,
    progress: Callable[[StageEvent], None] | None = None,
) -> Artifact:
    """Compile an ONNX model. Nothing is written until the artifact's `save`.

    `target` is a name of `llmc targets`; `quantize` a name of the table of formats; `dims` fixes (int) or bounds
    ((least, most)) symbolic dimensions by name. Raises LlmcError's subclasses.
    """
    stage = _Stages(progress, Path(dump_ir) if dump_ir else None)
    machine, format = resolve_target(target), resolve_format(quantize)

    graph = stage("import", lambda: import_model(Path(model), dims), _nodes)
    graph = stage("quantize", lambda: quantize_weights(graph, format), _nodes)
    graph = stage("fuse", lambda: fuse(graph), _nodes)
    decoder = stage("kv-cache", lambda: decoder_of(graph), lambda d: f"{len(d.caches)} layers" if d else "no decoder")
    functions = {"main": graph, **(decoder.functions if decoder else {})}
    plan = stage("select", lambda: select(functions, machine), lambda p: f"{len(p.calls())} kernels")
    choices = stage("tune", lambda: choose_configs(plan.calls(), machine), _provenance)
    configs = {kernel: choice.config for kernel, choice in choices.items()}
    lowered = stage("lower", lambda: lower(plan, configs, machine), lambda module: f"{len(module.params)} weights")
    folder = tempfile.TemporaryDirectory(prefix="llmc-")
    workspaces = stage("build", lambda: build(lowered.module, machine, Path(folder.name) / "lib.so"))
    return describe(Path(model), machine, format, plan, choices, lowered, decoder, workspaces, folder)


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
