"""Tunes tasks within a budget, and keeps of what was found only what proves faster once more.

Every measurement goes to the database at once: an interrupted run loses nothing, and the next one goes on from there.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, Protocol

from llmc.errors import KernelError
from llmc.schedules.base import Config, Space
from llmc.tune.budget import Standing, next_task
from llmc.tune.cost_model import CostModel, Samples
from llmc.tune.neighbours import starts
from llmc.tune.search import Search, key, upper_cost
from llmc.tune.task import LEAST_GAIN, Measurement, Task

Record = tuple[Task, Measurement]

_VERIFIED_PER_TASK = 3  # candidates that get a second measurement
_RESERVE = 0.15  # share of the time that is kept for verifying
_FIRST_BATCH = 3  # candidates of a task in its first batch, when time is short: nobody knows yet what one takes


class Measures(Protocol):
    """What the tuner needs of `measure.Measurer`."""

    def measure(self, task: Task, configs: Iterable[Config], *, careful: bool = False) -> Iterator[Measurement]: ...


class Keeps(Protocol):
    """What the tuner needs of `database.Database`."""

    def add(self, task: Task, measurement: Measurement) -> object: ...


@dataclass(frozen=True)
class TuneEvent:
    """After every measurement: where the run stands. `best` is the task's cost relative to the default, before it is
    verified; `seconds_left` of the time budget, None without one; `failures` of all tasks by status. With `predicted`
    nothing is measured: costs are those of a model."""

    phase: Literal["search", "verify"]
    task: Task
    done: int
    total: int
    trials_per_second: float
    best: float
    seconds_left: float | None
    failures: Mapping[str, int]
    predicted: bool = False


@dataclass(frozen=True)
class Trial:
    """One candidate: what the cost model expected (log2 of the time relative to the default), and what it was."""

    predicted: float
    measurement: Measurement


@dataclass(frozen=True)
class TaskResult:
    """What a task ends with. `config` is the default unless `verified`, the second measurement of a faster one.

    `error` says why the task could not be tuned at all: its default did not build, or gave wrong results.
    """

    task: Task
    config: Config
    verified: Measurement | None
    trials: tuple[Trial, ...]
    error: str = ""

    @property
    def ratio(self) -> float:
        """Time relative to the default's, as verified."""
        return self.verified.cost(self.task.points) if self.verified else 1.0

    @property
    def curve(self) -> list[float]:
        """The best cost so far, by trial; the default, 1, is where it starts."""
        best, costs = 1.0, []
        for trial in self.trials:
            best = min(best, upper_cost(self.task, trial.measurement))
            costs.append(best)
        return costs


def tune(
    tasks: Sequence[Task],
    measurer: Measures,
    database: Keeps,
    *,
    trials: int,
    time_budget_s: float | None = None,
    seed: int = 0,
    batch: int = 4,
    history: Iterable[Record] = (),
    model: CostModel | None = None,
    allowed: Callable[[Task, Config], bool] = lambda task, config: True,
    progress: Callable[[TuneEvent], None] | None = None,
) -> list[TaskResult]:
    """Search for `trials` candidates a task on average, then verify the winners; a result for each task, in order.

    `history` is what is known from earlier runs: of these tasks it counts as measured, of others it is what the first
    proposals and, unless `model` is given, the cost model come from. What is not `allowed` is not proposed. Ctrl-C
    ends the search; the winners are still verified, unless it is pressed again. Each search follows from `seed` and
    what was measured; how trials are shared out among tasks depends on how long they take, too.
    """
    known = list(history)
    prior = model or (CostModel.fit(Samples.of(known, tasks[0].target), seed) if known and tasks else CostModel())
    lanes = [_Lane(task, prior, known, allowed, seed + i) for i, task in enumerate(tasks)]
    return _Run(lanes, measurer, database, trials, time_budget_s, batch, progress).finish()


class _Run:
    """One call of `tune`. The time budget begins here, when the cost model has learned what is known."""

    def __init__(
        self,
        lanes: Sequence[_Lane],
        measurer: Measures,
        database: Keeps,
        trials: int,
        time_budget_s: float | None,
        batch: int,
        progress: Callable[[TuneEvent], None] | None,
    ) -> None:
        self.measurer, self.database, self.batch = measurer, database, batch
        self.lanes, self.total, self.most = lanes, trials * len(lanes), 4 * trials
        self.start, self.budget, self.progress = time.monotonic(), time_budget_s, progress
        self.failures: Counter[str] = Counter()
        self.count = 0

    def finish(self) -> list[TaskResult]:
        verified: dict[int, Measurement] = {}
        for stage in (self._search, lambda: self._verify(verified)):
            with suppress(KeyboardInterrupt):
                stage()
        return [lane.result(verified.get(i)) for i, lane in enumerate(self.lanes)]

    def _search(self) -> None:
        while self.count < self.total and (left := self._left(1 - _RESERVE)) > 0:
            standings = [lane.standing(self.most) for lane in self.lanes]
            index = next_task(standings)
            if index is None:
                return
            lane = self.lanes[index]
            size = min(self.batch, self.total - self.count, self.most - len(lane.trials))
            if self.budget is not None and not standings[index].trials:
                size = min(size, _FIRST_BATCH)
            if standings[index].trials:
                size = max(1, int(min(size, left / max(standings[index].trial_seconds, 1e-9))))
            self._batch(lane, lane.search.propose(size))

    def _batch(self, lane: _Lane, configs: Sequence[Config]) -> None:
        """Measure candidates; what was measured counts even if the rest is interrupted."""
        predicted = dict(zip(map(key, configs), lane.search.predict(configs), strict=True))
        measured: list[Measurement] = []
        begin = time.monotonic()
        try:
            for m in self.measurer.measure(lane.task, configs):
                self.database.add(lane.task, m)
                measured.append(m)
                lane.trials.append(Trial(predicted[key(m.config)], m))
                self.count += 1
                if m.status != "ok":
                    self.failures[m.status] += 1
                self._tell("search", lane, measured)
                if self._left(1) <= 0:
                    break
        except KernelError as error:
            lane.error = str(error)
        finally:
            lane.learn(measured, time.monotonic() - begin)

    def _verify(self, verified: dict[int, Measurement]) -> None:
        """Time winners again, those first from which the model gains most."""
        for i in sorted(range(len(self.lanes)), key=lambda i: -self.lanes[i].promise):
            lane = self.lanes[i]
            faster = [m for m in lane.search.ranked if m.cost(lane.task.points) < 1 - LEAST_GAIN]
            candidates = [m for m in faster if not m.is_slower(lane.task.points)]
            for candidate in candidates[: 0 if lane.error else _VERIFIED_PER_TASK]:
                if self._left(1) <= 0:
                    break
                for again in self.measurer.measure(lane.task, [candidate.config], careful=True):
                    self.database.add(lane.task, again)
                    self._tell("verify", lane, [again])
                    if again.is_faster(lane.task.points):
                        verified[i] = again
                if i in verified:
                    break

    def _left(self, share: float) -> float:
        """Seconds of this share of the budget that are left."""
        return float("inf") if self.budget is None else share * self.budget - (time.monotonic() - self.start)

    def _tell(self, phase: Literal["search", "verify"], lane: _Lane, new: Sequence[Measurement]) -> None:
        if self.progress is None:
            return
        elapsed = time.monotonic() - self.start
        best = min([lane.search.best_cost, *(upper_cost(lane.task, m) for m in new)])
        left = None if self.budget is None else max(self._left(1), 0.0)
        rate = self.count / max(elapsed, 1e-9)
        failures, predicted = dict(self.failures), any(m.predicted for m in new)
        self.progress(TuneEvent(phase, lane.task, self.count, self.total, rate, best, left, failures, predicted))


class _Lane:
    """One task's search, and what it has cost and brought."""

    def __init__(
        self,
        task: Task,
        prior: CostModel,
        history: Sequence[Record],
        allowed: Callable[[Task, Config], bool],
        seed: int,
    ) -> None:
        self.task, self.trials, self.wall = task, list[Trial](), 0.0
        full = task.kernel.template.space(task.kernel.workload, task.target)
        space = Space(full.knobs, lambda config: full.valid(config) and allowed(task, config))
        self.search = Search(task, prior, starts=starts(task, history), seed=seed, space=space)
        self.gained, self.error = 0.0, ""
        known = [m for t, m in history if t.key == task.key and t.target == task.target]
        usable = [m for m in known if m.status != "ok" or all(str(p) in m.timings for p in task.points)]
        if usable:
            self.search.observe(usable)

    def learn(self, measured: Sequence[Measurement], wall: float) -> None:
        """Take in a batch, which may have been cut short."""
        if measured:
            before = self.search.best_cost
            self.search.observe(measured)
            self.gained = math.log2(before / self.search.best_cost) / len(measured)
            self.wall += wall

    def standing(self, most: int) -> Standing:
        count = len(self.trials)
        return Standing(
            seconds=self.task.calls * self._default_seconds() * self.search.best_cost,
            trials=count,
            trial_seconds=self.wall / max(count, 1),
            gained=self.gained,
            hoped=self.search.expected_gain,
            finished=bool(self.error) or self.search.finished or count >= most,
        )

    @property
    def promise(self) -> float:
        """Seconds of the model's time that the best candidate saves, if it proves true."""
        return self.task.calls * self._default_seconds() * (1 - self.search.best_cost)

    def _default_seconds(self) -> float:
        """Of one call, by the weights of the points; before anything was timed a guess, to put tasks in order."""
        points, work = self.task.points, self.task.kernel.template.work
        total = sum(p.weight for p in points)
        if timed := self.search.ranked:
            return sum(p.weight * timed[0].timings[str(p)].default_seconds for p in points) / total
        works = [(p.weight, work(self.task.kernel.workload, p.sizes())) for p in points]
        return sum(weight * max(w.ops / 1e11, w.bytes / 2e10) for weight, w in works) / total

    def result(self, verified: Measurement | None) -> TaskResult:
        config = verified.config if verified else self.search.default
        return TaskResult(self.task, config, verified, tuple(self.trials), self.error)
