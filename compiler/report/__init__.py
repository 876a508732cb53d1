"""A report about tuning: what was tried and found, how well the cost model guesses, what a model gained from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from llmc import __version__
from llmc.report.profiles import Profiles
from llmc.targets import cuda, x86
from llmc.targets.base import Target
from llmc.tune.database import Database
from llmc.tune.held_out import Quality, quality
from llmc.tune.known import history_of
from llmc.tune.report import TaskReport, task_reports


@dataclass(frozen=True)
class Report:
    """All that the page shows. `quality` is None where fewer than two tasks were timed, `profiles` where no artifact
    was given."""

    llmc: str
    database: str
    records: int
    tasks: tuple[TaskReport, ...]
    quality: Quality | None
    profiles: Profiles | None

    def as_json(self) -> dict[str, Any]:
        """The same as dictionaries and lists; of each profile also what follows from its figures."""
        data = asdict(self)
        if self.profiles:
            data["profiles"]["tasks"] = {
                name: {"after": t.after.as_json(), "before": t.before.as_json() if t.before else None}
                for name, t in self.profiles.tasks.items()
            }
        return data


def collect(database: Database, target: Target | None = None, profiles: Profiles | None = None) -> Report:
    """What the database's records (of one target) tell. Raises DatabaseError."""
    records = database.records(target=target)
    targets: list[Target] = [target] if target else [*x86.TARGETS.values(), *cuda.TARGETS.values()]
    understood = history_of([r for r in records if not r.key.predicted], targets)
    return Report(__version__, str(database.path), len(records), task_reports(records), quality(understood), profiles)
