"""What `llmc tune` and `llmc compile --tune` share: their options, and a live view of the search."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Annotated

import typer

from llmc.cli.common import stderr

if TYPE_CHECKING:
    from rich.table import Table

    from llmc.tune.task import Task
    from llmc.tune.tuner import TuneEvent

BudgetOption = Annotated[
    str | None, typer.Option("--time-budget", help="How long tuning may take: 90s, 10m, 1h; default: the effort's.")
]
TrialsOption = Annotated[
    int | None, typer.Option("--trials", min=1, help="Candidates a kernel, on average; default: the effort's.")
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Of the search and of the data to measure with.")]
DatabaseOption = Annotated[
    Path | None, typer.Option("--db", help="The tuning database; default: tuning.db in your data folder.")
]


class TuneView:
    """A table on standard error, a row a kernel, renewed by every measurement; call it with events.

    It is drawn between measurements only: a thread that draws on its own would disturb what is being timed.
    """

    def __init__(self) -> None:
        from rich.live import Live

        self._live = Live(console=stderr(), auto_refresh=False, transient=True)
        self._rows: dict[Task, tuple[int, str]] = {}  # candidates, and the best time relative to the default's

    def __enter__(self) -> TuneView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __call__(self, event: TuneEvent) -> None:
        self._live.start()
        count, _ = self._rows.get(event.task, (0, ""))
        self._rows[event.task] = (count + 1, show_ratio(event.best, event.predicted))
        self._live.update(self._draw(event), refresh=self._live.console.is_terminal)

    def stop(self) -> None:
        """Take the table away; the next event brings it back."""
        self._live.stop()

    def _draw(self, event: TuneEvent) -> Table:
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=escape(_headline(event)), title_justify="left", box=None, pad_edge=False)
        for name in ("", "kernel", "tried", "best against default"):
            table.add_column(name, no_wrap=True, justify="left" if name in ("", "kernel") else "right")
        for task, (count, best) in self._rows.items():
            mark = "›" if task is event.task else ""
            name = f"{task.kernel.template.name} {task.kernel.workload.key()}"
            table.add_row(mark, escape(name[:100]), str(count), best)
        return table


def show_ratio(ratio: float, predicted: bool) -> str:
    """A time relative to the default's; one that nobody measured says so."""
    return f"{ratio:.3f}" + (" predicted" if predicted else "")


def _headline(event: TuneEvent) -> str:
    """One line: where the run stands."""
    how = " by prediction" if event.predicted else ""
    parts = [f"{event.phase}{how}: {event.done} of {event.total} trials, {event.trials_per_second:.1f}/s"]
    if event.seconds_left is not None:
        parts.append(f"{event.seconds_left:.0f} s left")
    if event.failures:
        parts.append("failed: " + ", ".join(f"{count} {status}" for status, count in sorted(event.failures.items())))
    return "; ".join(parts)


@contextmanager
def noticing_interrupts() -> Iterator[list[int]]:
    """The list holds an entry for every Ctrl-C, also those that the tuner takes as the end of its search."""
    seen: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def notice(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, notice)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)
