"""The tune stage's search: a model's kernels, an effort and a database in; better records in the database out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llmc.errors import OptionError
from llmc.schedules.base import Config, Kernel
from llmc.targets.base import Target
from llmc.targets.detect import machine
from llmc.targets.x86 import TARGETS
from llmc.tune import Choice, Provenance, buildable
from llmc.tune.cost_model import CostModel, Samples
from llmc.tune.database import Database, default_path
from llmc.tune.effort import EFFORTS, Effort
from llmc.tune.known import history_of
from llmc.tune.logs import shipped
from llmc.tune.measure import Measurer
from llmc.tune.task import Measurement, Task
from llmc.tune.tasks import tasks_of
from llmc.tune.tuner import TaskResult, TuneEvent, tune


@dataclass(frozen=True)
class Tuning:
    """How a model is to be tuned: what `tune_kernels` needs besides the kernels."""

    effort: Effort
    seed: int
    database: Path


@dataclass(frozen=True)
class KernelReport:
    """What one kernel ends with.

    `config` is what a compilation now takes, `provenance` says from where, `ratio` its time relative to the default's.
    `trials` are this run's, `failures` those of them that failed, by status.
    """

    template: str
    workload: str
    calls: int
    ratio: float
    provenance: Provenance
    config: Config
    trials: int
    failures: Mapping[str, int]


def resolve_tuning(
    effort: str,
    target: Target,
    seconds: float | None = None,
    trials: int | None = None,
    seed: int = 0,
    database: Path | None = None,
) -> Tuning | None:
    """What a user asks for; None for "none". `seconds` and `trials` (a task) replace those of the effort.

    Everything that would stop the search is found here, before minutes of other work. Raises OptionError for an
    unknown effort, for limits without one, and for a target whose code this machine cannot run; DatabaseError.
    """
    if effort not in EFFORTS:
        raise OptionError(f"no tuning effort '{effort}'", hint=f"known: {', '.join(EFFORTS)}")
    if effort == "none":
        if seconds is not None or trials is not None:
            raise OptionError("a time budget or trials without tuning", hint="add --tune quick or --tune full")
        return None
    if missing := machine().missing(target):
        raise OptionError(
            f"this machine cannot tune for it: it lacks {', '.join(missing)}",
            where=f"target {target.name}",
            hint="tune on a machine that runs the target, and bring its records with `llmc logs export` and `import`",
        )
    path = database or default_path()
    Database(path).close()
    limits = EFFORTS[effort]
    limits = replace(limits, seconds=seconds or limits.seconds, trials=trials or limits.trials)
    return Tuning(limits, seed, path)


def tune_kernels(
    calls: Mapping[Kernel, int],
    target: Target,
    tuning: Tuning,
    progress: Callable[[TuneEvent], None] | None = None,
) -> list[TaskResult]:
    """Search for better configurations of a model's kernels; `calls` as `Plan.calls` counts them.

    It starts from what the database and llmc's own logs know, and every measurement is stored as soon as it is made:
    `choose_configs` finds the winners there. Ctrl-C ends the search, not the verification of what it found; a second
    one ends that too. Raises DatabaseError, LogError, and KernelError if a default cannot be measured.
    """
    can_build = buildable(calls, target)
    with Database(tuning.database) as database, Measurer(target, seed=tuning.seed) as measurer:
        return tune(
            tasks_of(calls, target),
            measurer,
            database,
            trials=tuning.effort.trials,
            time_budget_s=tuning.effort.seconds,
            seed=tuning.seed,
            batch=tuning.effort.batch,
            history=known(database, target),
            allowed=lambda task, config: can_build(task.kernel, config),
            progress=progress,
        )


def known(database: Database, target: Target) -> list[tuple[Task, Measurement]]:
    """All that the database and llmc's own logs say, of every target; `target` as it is described here."""
    targets = TARGETS | {target.name: target}
    records = [*database.records(), *(record for t in targets.values() for record in shipped(t))]
    return history_of(records, targets.values())


def learn(database: Database, target: Target, seed: int = 0) -> CostModel:
    """The cost model that a search for `target` would start with."""
    return CostModel.fit(Samples.of(known(database, target), target), seed)


def report(
    calls: Mapping[Kernel, int], choices: Mapping[Kernel, Choice], results: Sequence[TaskResult]
) -> list[KernelReport]:
    """What every kernel ends with, the most gained first."""
    trials = {r.task.kernel: r.trials for r in results}
    reports = []
    for kernel, choice in choices.items():
        statuses = Counter(t.measurement.status for t in trials.get(kernel, ()))
        failures: dict[str, int] = {status: count for status, count in statuses.items() if status != "ok"}
        reports.append(
            KernelReport(
                kernel.template.name,
                kernel.workload.key(),
                calls[kernel],
                choice.ratio,
                choice.provenance,
                choice.config,
                statuses.total(),
                failures,
            )
        )
    return sorted(reports, key=lambda r: (r.ratio, r.template, r.workload))
