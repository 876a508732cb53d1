"""The tune stage: which configuration each kernel is built with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from llmc.schedules.base import Config, Kernel
from llmc.schedules.embedding.dense import EmbeddingDenseWorkload
from llmc.schedules.gemm.dense import DenseLinearWorkload
from llmc.targets.base import Target
from llmc.tune.database import Database, default_path
from llmc.tune.logs import shipped
from llmc.tune.record import Best, Key, Record, best_of, parse_points
from llmc.tune.task import Predicted, Task

Provenance = Literal["default", "shipped", "tuned", "predicted", "predicted+emulated"]
_PREDICTED: dict[Predicted, Provenance | None] = {"": None, "ranked": "predicted", "emulated": "predicted+emulated"}


@dataclass(frozen=True)
class Choice:
    """A kernel's configuration, and where it comes from: the template, llmc's own logs, or this user's tuning.

    What nobody measured is "predicted", in either of the latter; "predicted+emulated" if its results were seen to be
    right at least. `ratio`: its time relative to the default's, as measured, or predicted, where it comes from.
    """

    config: Config
    provenance: Provenance
    ratio: float = 1.0


def choose_configs(kernels: Iterable[Kernel], target: Target, database: Path | None = None) -> dict[Kernel, Choice]:
    """The best known configuration of every kernel.

    What `database` (None: the user's own) holds goes first, then what llmc ships for the target, then the template's
    default. Of either, what was measured on a machine like this one decides alone, where there is any. Predictions
    decide where nobody measured the kernel at all. Raises DatabaseError and LogError.
    """
    kernels = list(kernels)
    path = database or default_path()
    stored = Database(path) if path.exists() else None
    can_build = buildable(kernels, target)
    choices = {}
    for kernel in kernels:
        allowed = partial(can_build, kernel)
        mine = stored.of_workload(kernel.template.name, kernel.workload.key()) if stored else []
        known: list[tuple[list[Record], Provenance]] = [
            (_usable(kernel, mine, target), "tuned"),
            (_shipped(kernel, target), "shipped"),
        ]
        chosen = _chosen(kernel, target, known, allowed)
        choices[kernel] = chosen or Choice(kernel.template.default(kernel.workload, target), "default")
    if stored:
        stored.close()
    return choices


def buildable(kernels: Iterable[Kernel], target: Target) -> Callable[[Kernel, Config], bool]:
    """Which configurations a model of these kernels can be built with.

    A weight that an embedding reads where an output layer packed it stays packed as the default does.
    """
    tables = [k.workload for k in kernels if isinstance(k.workload, EmbeddingDenseWorkload)]
    shared = {(w.V, w.E) for w in tables if w.panel}

    def can_build(kernel: Kernel, config: Config) -> bool:
        template, workload = kernel.template, kernel.workload
        if config not in template.space(workload, target):
            return False
        if not (isinstance(workload, DenseLinearWorkload) and (workload.N, workload.K) in shared):
            return True
        default = template.default(workload, target)
        return template.layout(workload, config, target) == template.layout(workload, default, target)

    return can_build


def _usable(kernel: Kernel, records: list[Record], target: Target) -> list[Record]:
    """Records of this TVM and this version of the template, made here, by a device, or elsewhere and imported."""
    here = Key.of(Task(kernel, target, ()))
    return [r for r in records if set(r.key.differences(here)) <= {"points", "cpu", "cores"}]


def _shipped(kernel: Kernel, target: Target) -> list[Record]:
    """Of llmc's logs: made with the same code for some machine of the target's kind."""
    template, workload = kernel.template, kernel.workload.key()
    wanted = (template.name, template.version, workload)
    return [r for r in shipped(target) if (r.key.template, r.key.version, r.key.workload) == wanted]


def _chosen(
    kernel: Kernel,
    target: Target,
    known: Sequence[tuple[list[Record], Provenance]],
    allowed: Callable[[Config], bool],
) -> Choice | None:
    """The best of the first that have one: of what was measured, if anything was, else of what was predicted."""
    measured = any(not record.key.predicted for records, _ in known for record in records)
    here = Key.of(Task(kernel, target, ()), predicted=not measured)
    for records, source in known:
        if best := _best([r for r in records if r.key.predicted != measured], here, allowed):
            return Choice(best.config, _PREDICTED[best.predicted] or source, best.cost)
    return None


def _best(records: list[Record], here: Key, allowed: Callable[[Config], bool]) -> Best | None:
    """The best configuration under one key, those with more points first. What this machine's records say is not
    outvoted by others'; otherwise keys like this machine's go first."""
    own = [record for record in records if record.key.cpu == here.cpu]
    groups: defaultdict[Key, list[Record]] = defaultdict(list)
    for record in own or records:
        groups[record.key].append(record)

    def likeness(key: Key) -> tuple[bool, bool, int]:
        return key.cpu == here.cpu, key.cores == here.cores, len(parse_points(key.points))

    found = (
        best_of(groups[key], parse_points(key.points), allowed) for key in sorted(groups, key=likeness, reverse=True)
    )
    return next(filter(None, found), None)
