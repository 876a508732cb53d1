"""The tune stage: which configuration each kernel is built with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from llmc.schedules.base import Config, Kernel
from llmc.schedules.embedding.dense import EmbeddingDenseWorkload
from llmc.schedules.gemm.dense import DenseLinearWorkload
from llmc.targets.base import Target
from llmc.targets.detect import machine
from llmc.tune.database import Database, default_path
from llmc.tune.logs import shipped
from llmc.tune.record import Key, Record, best_of, parse_points
from llmc.tune.task import Task

Provenance = Literal["default", "shipped", "tuned"]


@dataclass(frozen=True)
class Choice:
    """A kernel's configuration, and where it comes from: the template, llmc's own logs, or this user's tuning.

    `ratio`: its time relative to the default's, as measured where it comes from.
    """

    config: Config
    provenance: Provenance
    ratio: float = 1.0


def choose_configs(kernels: Iterable[Kernel], target: Target, database: Path | None = None) -> dict[Kernel, Choice]:
    """The best known configuration of every kernel.

    What `database` (None: the user's own) holds goes first, then what llmc ships for the target, then the template's
    default. Of either, what was measured on a machine like this one decides alone, where there is any. Raises
    DatabaseError and LogError.
    """
    kernels = list(kernels)
    path = database or default_path()
    stored = Database(path) if path.exists() else None
    can_build = buildable(kernels, target)
    choices = {}
    for kernel in kernels:
        allowed = partial(can_build, kernel)
        mine = stored.of_workload(kernel.template.name, kernel.workload.key()) if stored else []
        choices[kernel] = (
            _tuned(kernel, mine, target, allowed)
            or _shipped(kernel, target, allowed)
            or Choice(kernel.template.default(kernel.workload, target), "default")
        )
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


def _tuned(kernel: Kernel, records: list[Record], target: Target, allowed: Callable[[Config], bool]) -> Choice | None:
    """From records of this TVM and this version of the template, made here, by a device, or elsewhere and imported."""
    here = Key.of(Task(kernel, target, ()))
    same = [r for r in records if set(r.key.differences(here)) <= {"points", "cpu", "cores"}]
    return _best(same, allowed, "tuned")


def _shipped(kernel: Kernel, target: Target, allowed: Callable[[Config], bool]) -> Choice | None:
    """From llmc's logs: measured with the same code on some machine of the target's kind."""
    template, workload = kernel.template, kernel.workload.key()
    wanted = (template.name, template.version, workload)
    same = [r for r in shipped(target) if (r.key.template, r.key.version, r.key.workload) == wanted]
    return _best(same, allowed, "shipped")


def _best(records: list[Record], allowed: Callable[[Config], bool], provenance: Provenance) -> Choice | None:
    """The best configuration under one key, those with more points first. What this CPU's records say is not outvoted
    by others'; otherwise keys like this machine's go first."""
    here = machine()
    own = [record for record in records if record.key.cpu == here.cpu]
    groups: defaultdict[Key, list[Record]] = defaultdict(list)
    for record in own or records:
        groups[record.key].append(record)

    def likeness(key: Key) -> tuple[bool, bool, int]:
        return key.cpu == here.cpu, key.cores == here.cores, len(parse_points(key.points))

    for key in sorted(groups, key=likeness, reverse=True):
        if best := best_of(groups[key], parse_points(key.points), allowed):
            return Choice(best.config, provenance, best.cost)
    return None
