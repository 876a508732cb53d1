"""The tune stage's search: a model's kernels, an effort and a database in; better records in the database out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llmc.schedules.base import Config, Kernel
from llmc.targets import cuda, x86
from llmc.targets.base import Target
from llmc.tune import Choice, Provenance, buildable
from llmc.tune.cost_model import CostModel, Samples
from llmc.tune.database import Database
from llmc.tune.effort import Tuning
from llmc.tune.known import history_of
from llmc.tune.logs import shipped
from llmc.tune.measure import Measurer
from llmc.tune.record import PREDICTOR, Key, Record
from llmc.tune.task import Measurement, Task
from llmc.tune.tasks import tasks_of
from llmc.tune.tuner import TaskResult, TuneEvent, tune

if TYPE_CHECKING:
    from llmc.tune.predicted import Predictor
    from llmc.tune.remote import RemoteMeasurer


@dataclass(frozen=True)
class KernelReport:
    """What one kernel ends with.

    `config` is what a compilation now takes, `provenance` says from where, `ratio` its time relative to the default's.
    `trials` are this run's, `failures` those of them that failed, by status; `error` says why it could not be tuned.
    """

    template: str
    workload: str
    calls: int
    ratio: float
    provenance: Provenance
    config: Config
    trials: int
    failures: Mapping[str, int]
    error: str


def tune_kernels(
    calls: Mapping[Kernel, int],
    target: Target,
    tuning: Tuning,
    progress: Callable[[TuneEvent], None] | None = None,
) -> list[TaskResult]:
    """Search for better configurations of a model's kernels; `calls` as `Plan.calls` counts them."""
    return tune_tasks(tasks_of(calls, target), target, tuning, progress)


def tune_tasks(
    tasks: Sequence[Task],
    target: Target,
    tuning: Tuning,
    progress: Callable[[TuneEvent], None] | None = None,
) -> list[TaskResult]:
    """Search for better configurations of tasks that one model runs, all for `target`.

    It starts from what the database and llmc's own logs know, and every measurement is stored as soon as it is made:
    `choose_configs` finds the winners there. Ctrl-C ends the search, not the verification of what it found; a second
    one ends that too. Raises DatabaseError, LogError, and KernelError if a default cannot be measured.
    """
    # Embeddings, which may forbid a configuration of others, all have a choice: they are among the tasks.
    can_build = buildable([task.kernel for task in tasks], target)
    with Database(tuning.database) as database, _measurer(target, tuning) as measurer:
        return tune(
            tasks,
            measurer,
            _Device(database, tuning.elsewhere.key) if tuning.elsewhere else database,
            trials=tuning.effort.trials,
            time_budget_s=tuning.effort.seconds,
            seed=tuning.seed,
            batch=tuning.effort.batch,
            history=known(database, target, tuning.predicted),
            allowed=lambda task, config: can_build(task.kernel, config),
            progress=progress,
        )


def _measurer(target: Target, tuning: Tuning) -> Measurer | RemoteMeasurer | Predictor:
    elsewhere = tuning.elsewhere
    if tuning.predicted:
        from llmc.tune.predicted import Predictor

        assert isinstance(target, cuda.CudaTarget)
        return Predictor(target)
    if elsewhere is None:
        return Measurer(target, seed=tuning.seed)

    from llmc.tune.remote import remote_measurer

    return remote_measurer(target, elsewhere.tracker, elsewhere.key, elsewhere.builders, seed=tuning.seed)


@dataclass(frozen=True)
class _Device:
    """The database, for what a device elsewhere measures: records say so in the place of this machine's CPU."""

    database: Database
    key: str

    def add(self, task: Task, measurement: Measurement) -> None:
        self.database.insert([Record(replace(Key.of(task), cpu=f"rpc:{self.key}", cores=0), measurement)])


def known(database: Database, target: Target, predicted: bool = False) -> list[tuple[Task, Measurement]]:
    """All that the database and llmc's own logs say, of every target of this one's kind; `target` as it is described
    here. What was `predicted`, or what was measured: neither teaches anything about the other."""
    kind: Mapping[str, Target] = cuda.TARGETS if target.kind == "cuda" else x86.TARGETS
    targets = {**kind, target.name: target}
    records = [*database.records(), *(record for t in targets.values() for record in shipped(t))]
    same = [r for r in records if (r.key.cpu == PREDICTOR if predicted else not r.key.predicted)]
    return history_of(same, targets.values())


def learn(database: Database, target: Target, seed: int = 0) -> CostModel:
    """The cost model that a search for `target` would start with, and what machine code would add to it."""
    samples = Samples.of(known(database, target), target)
    return CostModel.fit(samples, seed).compare_code(samples, seed)


def report(
    calls: Mapping[Kernel, int], choices: Mapping[Kernel, Choice], results: Sequence[TaskResult]
) -> list[KernelReport]:
    """What every kernel ends with, the most gained first."""
    by_kernel = {r.task.kernel: r for r in results}
    reports = []
    for kernel, choice in choices.items():
        result = by_kernel.get(kernel)
        statuses = Counter(t.measurement.status for t in result.trials) if result else Counter[str]()
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
                result.error if result else "",
            )
        )
    return sorted(reports, key=lambda r: (r.ratio, r.template, r.workload))
