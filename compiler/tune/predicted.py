"""Judges GPU kernels where no GPU is: candidates are compiled, examined and ranked by an analytic model.

What comes out are predictions, marked as such wherever they go. They say which of two configurations should be faster,
not how fast a GPU is; nothing that was measured is ever compared with them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from llmc.emulator.emulator import available
from llmc.errors import KernelError
from llmc.schedules.base import Config
from llmc.targets.cuda import CudaTarget
from llmc.tune import emulated
from llmc.tune.builders import LocalPool
from llmc.tune.closing import Closing
from llmc.tune.gpu_code import compiled
from llmc.tune.subject import Rejected
from llmc.tune.task import Measurement, Predicted, Status, Task, Timing
from llmc.tune.worker import one_line, out_of_memory

SPREAD = 0.05  # differences below this are not the model's to tell
_LIMIT_S = 300.0  # for one candidate, emulation included: NVIDIA's compiler takes seconds for a kernel


@dataclass(frozen=True)
class Examined:
    """One candidate, compiled: predicted seconds by point (its text form), why it must not be used (if so), what its
    code shows (`features.BUILT`), and how far it was looked at."""

    seconds: Mapping[str, float]
    failed: str
    build_seconds: float
    code: Mapping[str, float]
    predicted: Predicted


class Predictor(Closing):
    """Takes the place of `measure.Measurer` where there is no GPU. Use it as a context manager, from one thread.

    `workers` processes compile, as many as there are cores, unless told.
    """

    def __init__(self, target: CudaTarget, *, workers: int | None = None) -> None:
        self.target = target
        self._pool: LocalPool[Examined] = LocalPool(examine, workers, _LIMIT_S)
        self._defaults: dict[tuple[str, str], Examined] = {}

    def close(self) -> None:
        """End all compilations."""
        self._pool.close()

    def measure(self, task: Task, configs: Iterable[Config], *, careful: bool = False) -> Iterator[Measurement]:
        """Yield one prediction for every configuration, as they complete.

        With `careful` a candidate's results are checked, too, where the emulator can run. Raises KernelError if the
        task's default configuration does not compile.
        """
        default = self._default(task)
        for config, found in self._pool.build(task, configs, careful):
            if isinstance(found, Measurement):  # perhaps its process was lost: that is no measurement, either
                yield replace(found, predicted="ranked")
            else:
                yield _judged(config, found, default, careful)

    def _default(self, task: Task) -> Examined:
        name = task.key, str(task.points)
        if name not in self._defaults:
            config = task.kernel.template.default(task.kernel.workload, task.target)
            ((_, found),) = self._pool.build(task, [config], False)
            if isinstance(found, Measurement):
                what = f"its default configuration cannot be predicted: {found.detail}"
                raise KernelError(what, where=task.key)
            self._defaults[name] = found
        return self._defaults[name]


def examine(task: Task, config: Config, careful: bool) -> Examined | Measurement:
    """Compile one candidate, as models use it, and predict its times; in a process of its own."""
    assert isinstance(task.target, CudaTarget)
    start = time.process_time()

    def failed(status: Status, error: Exception) -> Measurement:
        spent = time.process_time() - start
        return Measurement(config, status, {}, one_line(error), spent, careful, {}, "ranked")

    try:
        made = compiled(task, config, careful)
        spent = time.process_time() - start
        mark: Predicted = "ranked"
        if careful and not made.failed and available():
            emulated.check(task.kernel, config, task.target)
            mark = "emulated"
        return Examined(made.seconds, made.failed, spent, made.code, mark)
    except Rejected as rejected:
        return failed(rejected.status, rejected)
    except Exception as error:
        return failed("memory" if isinstance(error, MemoryError) or out_of_memory(str(error)) else "build", error)


def _judged(config: Config, found: Examined, default: Examined, careful: bool) -> Measurement:
    """A candidate against the default."""
    if found.failed:
        return Measurement(config, "gate", {}, found.failed, found.build_seconds, careful, found.code, "ranked")
    timings = {point: Timing(s, default.seconds[point], SPREAD) for point, s in found.seconds.items()}
    return Measurement(config, "ok", timings, "", found.build_seconds, careful, found.code, found.predicted)
