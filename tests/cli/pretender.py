"""Tuning for the tests of the command line: measurements that are none, artifacts that say what a test wants."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmc.package.archive import write_artifact
from llmc.package.manifest import KernelSpec, TargetSpec
from llmc.schedules.base import Kernel
from llmc.schedules.norm.norm import NORM, NormWorkload
from llmc.targets.detect import native
from llmc.tune.database import Database
from llmc.tune.record import Record
from llmc.tune.task import Measurement, Task, Timing

from ..package.files import LIB, manifest, tensors

NORM_64 = Kernel(NORM, NormWorkload(64))


class Pretender:
    """Stands for `Measurer`: every candidate takes `RATIO` of the default's time, and nothing is built."""

    RATIO = 0.9
    asked: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012

    def __init__(self, *_: Any, **__: Any) -> None:
        type(self).asked = []

    def __enter__(self) -> Pretender:
        return self

    def __exit__(self, *_: object) -> None: ...

    def measure(self, task: Task, configs: Any, *, careful: bool = False) -> Iterator[Measurement]:
        for config in configs:
            if not careful:
                self.asked.append((task.key, dict(config)))
            timings = {str(p): Timing(self.RATIO * 1e-3, 1e-3, 0.001) for p in task.points}
            yield Measurement(config, "ok", timings, verified=careful)


def records(path: Path) -> list[Record]:
    with Database(path) as database:
        return database.records()


def spec(kernel: Kernel, calls: int, **changes: Any) -> KernelSpec:
    """What an artifact says of a kernel."""
    template = kernel.template
    said = KernelSpec("k", template.name, template.version, dict(vars(kernel.workload)), {}, "default", calls)
    return dataclasses.replace(said, **changes)


def artifact(path: Path, *specs: KernelSpec, target: str | None = None) -> Path:
    """An artifact that says of itself what matters here; its code and weights are others."""
    known = TargetSpec(target or native().name, native().mcpu, native().requires)
    write_artifact(path, manifest(kernels=specs, target=known), lib=LIB, tensors=tensors())
    return path
