"""Tuning without an ONNX file: the kernels of an artifact, or kernels that a user names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmc.errors import ArtifactError, OptionError
from llmc.options import resolve_target
from llmc.package.reader import open_artifact
from llmc.schedules.base import Kernel
from llmc.targets import cuda, x86
from llmc.targets.base import Target
from llmc.targets.detect import machine, native
from llmc.tune import Provenance, choose_configs
from llmc.tune.database import Database
from llmc.tune.effort import Elsewhere, resolve_tuning
from llmc.tune.known import kernel_of, parse_kernel
from llmc.tune.record import Key
from llmc.tune.stage import KernelReport, report, tune_tasks
from llmc.tune.task import Task
from llmc.tune.tasks import has_choice, points_at, points_of, tasks_of
from llmc.tune.tuner import TuneEvent


@dataclass(frozen=True)
class Subject:
    """What is tuned: kernels for `target` and how often each is called; those that have a choice are tasks.

    `left_out` names what else there was, a line each, and says why this llmc cannot tune it.
    """

    target: Target
    calls: Mapping[Kernel, int]
    tasks: Sequence[Task]
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Lookup:
    """What a compilation would find for a kernel: `ratio` is the time relative to the default's. Unless the database
    has a measured answer ("tuned"), `miss` says why not."""

    template: str
    workload: str
    provenance: Provenance
    ratio: float
    miss: str


def of_artifact(path: Path) -> Subject:
    """The kernels of an artifact, tuned as its model's would be.

    Raises ArtifactError, also where this llmc has none of them or does not know the artifact's target.
    """
    manifest = open_artifact(path).manifest
    target = _target(manifest.target.name, path)
    calls, left_out = Counter[Kernel](), list[str]()
    for spec in manifest.kernels:
        try:
            kernel = kernel_of(spec.template, spec.version, spec.workload)
            _demand_served(kernel, target)
            calls[kernel] += spec.calls
        except ValueError as error:
            left_out.append(f"{spec.template} {spec.name}: {error}")
    if not calls:
        what = "\n  ".join(["holds no kernel that this llmc can tune", *left_out])
        raise ArtifactError(what, where=str(path), hint="compile the model again, or tune the model itself")
    return Subject(target, calls, tasks_of(calls, target), tuple(left_out))


def of_workloads(texts: Iterable[str], target: str = "native", rows: Sequence[int] = ()) -> Subject:
    """Kernels as `parse_kernel` reads them, each once; with `rows` compared at these numbers of rows.

    Raises OptionError for what is no kernel, or has nothing to tune.
    """
    chosen = resolve_target(target)
    kernels = {parse_kernel(text): text for text in texts}
    for kernel, text in kernels.items():
        try:
            _demand_served(kernel, chosen)
            if not has_choice(kernel, chosen):
                raise ValueError(f"{kernel.template.name} has one configuration: there is nothing to tune")
        except ValueError as error:
            raise OptionError(f"'{text}': {error}", where="--workload", hint="leave it out") from None
    tasks = [Task(kernel, chosen, points_at(kernel, rows) if rows else points_of(kernel)) for kernel in kernels]
    return Subject(chosen, dict.fromkeys(kernels, 1), tasks)


def tune(
    subject: Subject,
    effort: str = "quick",
    *,
    seconds: float | None = None,
    trials: int | None = None,
    seed: int = 0,
    database: Path | None = None,
    progress: Callable[[TuneEvent], None] | None = None,
    elsewhere: Elsewhere | None = None,
) -> list[KernelReport]:
    """Tune a subject as `pipeline.tune_model` tunes a model, here or `elsewhere`: what is found waits in the database.

    Raises OptionError where this machine neither runs nor predicts the target, and what `stage.tune_tasks` raises.
    """
    tuning = resolve_tuning(effort, subject.target, seconds, trials, seed, database, elsewhere)
    results = tune_tasks(subject.tasks, subject.target, tuning, progress) if tuning else []
    return report(subject.calls, choose_configs(subject.calls, subject.target, database), results)


def look_up(subject: Subject, database: Path) -> list[Lookup]:
    """What a compilation of these kernels would find in the database, or why it would not. Raises DatabaseError."""
    tasks = {task.kernel: task for task in subject.tasks}
    choices = choose_configs(subject.calls, subject.target, database)
    with Database(database) as stored:
        return [
            Lookup(
                kernel.template.name,
                kernel.workload.key(),
                choice.provenance,
                choice.ratio,
                "" if choice.provenance == "tuned" else _miss(stored, tasks.get(kernel)),
            )
            for kernel, choice in choices.items()
        ]


def _miss(database: Database, task: Task | None) -> str:
    """Why the database has no better configuration than the default."""
    if task is None:
        return "it has one configuration"
    here, kernel = Key.of(task), task.kernel
    of_workload = database.of_workload(kernel.template.name, kernel.workload.key())
    stored = [r for r in of_workload if not r.key.predicted]
    if of_workload and not stored:
        return "nobody measured it"
    if not stored:
        return "no record of this workload"
    # Records at other points than the model's own serve it, too.
    if any(set(r.key.differences(here)) <= {"points"} for r in stored):
        return "no record of it beats the default beyond the noise"
    return database.explain_miss(task)


def _target(name: str, artifact: Path) -> Target:
    """An artifact's target; with this machine's caches, as `native` has them, if it is what `native` means here."""
    targets: dict[str, Target] = {**x86.TARGETS, **cuda.TARGETS}
    if name not in targets:
        raise ArtifactError(
            f"is built for {name}, a target that this llmc does not know",
            where=str(artifact),
            hint=f"known: {', '.join(targets)}",
        )
    target = targets[name]
    if name not in x86.TARGETS or machine().missing(target):
        return target
    here = native()
    return here if here.name == name else target


def _demand_served(kernel: Kernel, target: Target) -> None:
    """Raises ValueError, with a message for people, if the template does not serve that workload on that target."""
    if not kernel.template.accepts(kernel.workload, target):
        raise ValueError(f"{kernel.template.name} does not serve it on {target.name}")
