"""Everything that was ever measured on this machine, or predicted: a SQLite file that is only ever added to."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, fields
from pathlib import Path

from llmc.errors import LlmcError
from llmc.schedules.base import Config
from llmc.targets.base import Target
from llmc.tune.closing import Closing
from llmc.tune.record import Best, Key, Record, best_of
from llmc.tune.task import Measurement, Task, Timing

SCHEMA = 3
_BUSY_S = 30.0  # how long a writer waits for another
_KEY = [f.name for f in fields(Key)]
_VALUES = ["config", "status", "timings", "detail", "build_seconds", "verified", "seed", "time", "code", "predicted"]
_CREATE = f"""
CREATE TABLE records (
    id INTEGER PRIMARY KEY,
    {", ".join(f"{name} NOT NULL" for name in [*_KEY, *_VALUES])}
);
CREATE INDEX by_workload ON records (template, workload);
PRAGMA user_version = {SCHEMA};
"""
_FROM_1 = """
ALTER TABLE records ADD COLUMN code NOT NULL DEFAULT '{}'
"""
_FROM_2 = f"""
ALTER TABLE records ADD COLUMN predicted NOT NULL DEFAULT '';
PRAGMA user_version = {SCHEMA};
"""


def default_path() -> Path:
    """tuning.db in the user's data folder (XDG Base Directory Specification)."""
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "llmc" / "tuning.db"


class DatabaseError(LlmcError):
    """The tuning database cannot be read or written: damaged, of another schema, locked, or the disk is full."""


class Database(Closing):
    """Measurements by key; a context manager. What `add` returned from survives kill -9 and a power cut.

    A file of an earlier schema is brought up to date, whole or not at all; an earlier llmc that has it open goes on.
    Several processes may write at once. Raises DatabaseError.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or default_path()
        with self._errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.path, timeout=_BUSY_S, isolation_level=None)
            self._enter_wal()
            self._db.execute("PRAGMA synchronous = FULL")  # NORMAL may lose the last commits when the power fails
            self._db.execute("BEGIN IMMEDIATE")  # two processes may create the file at once
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            updates = {0: _CREATE, 1: f"{_FROM_1}; {_FROM_2}", 2: _FROM_2}
            for statement in updates.get(version, "").split(";"):
                self._db.execute(statement)
            self._db.execute("COMMIT")
        if version not in range(SCHEMA + 1):
            self._db.close()
            raise DatabaseError(
                f"the tuning database has schema {version}, this llmc reads {SCHEMA}",
                where=str(self.path),
                hint="name another file, or export its records with the llmc that wrote it",
            )

    def _enter_wal(self) -> None:
        """Switch a new file to write-ahead logging. That takes the whole file for a moment, and SQLite's own waiting
        does not cover it: two processes that create the file at once must wait here."""
        end = time.monotonic() + _BUSY_S
        while True:
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > end:
                    raise
            time.sleep(0.01)

    def close(self) -> None:
        self._db.close()

    def add(self, task: Task, measurement: Measurement, seed: int = 0) -> None:
        """Store one measurement that this machine made, or predicted; it is on the disk when this returns."""
        self.insert([Record(Key.of(task, bool(measurement.predicted)), measurement)], seed)

    def insert(self, records: Iterable[Record], seed: int = 0) -> int:
        """Store records from anywhere, all or none of them; returns how many."""
        rows = [_row(record, seed) for record in records]
        names = ", ".join(_KEY + _VALUES)
        marks = ", ".join("?" * len(_KEY + _VALUES))
        with self._errors(), self._transaction():
            self._db.executemany(f"INSERT INTO records ({names}) VALUES ({marks})", rows)
        return len(rows)

    def records(self, task: Task | None = None, target: Target | None = None, predicted: bool = False) -> list[Record]:
        """What is known, oldest first: of one task (its exact key: what was measured, or what was `predicted`), of one
        target (by name), or all."""
        if task is not None:
            key = Key.of(task, predicted)
            return self._select(" AND ".join(f"{name} = ?" for name in _KEY), astuple(key))
        found = self._select("1", ())
        return found if target is None else [r for r in found if r.key.target_name == target.name]

    def of_workload(self, template: str, workload: str) -> list[Record]:
        """Records of one template's workload, whatever else their keys say."""
        return self._select("template = ? AND workload = ?", (template, workload))

    def best(self, task: Task, allowed: Callable[[Config], bool] = lambda config: True) -> tuple[Config, float] | None:
        """The configuration to build `task` with and its cost, if one beats the default beyond the noise."""
        best: Best | None = best_of(self.records(task), task.points, allowed)
        return None if best is None else (best.config, best.cost)

    def explain_miss(self, task: Task) -> str:
        """Why there is no record of `task`: in which parts of the key the nearest record differs."""
        wanted = Key.of(task)
        columns = ", ".join(_KEY)
        with self._errors():
            keys = [Key(*row) for row in self._db.execute(f"SELECT DISTINCT {columns} FROM records")]
        if not keys:
            return f"{self.path} holds no records"
        if wanted in keys:
            return f"{self.path} holds records of this task; none beats the default beyond the noise"
        asked = set(wanted.workload.split(","))

        def distance(key: Key) -> tuple[bool, int, int]:
            """A different workload is the farthest: nothing else can make up for it."""
            apart = len(asked.symmetric_difference(key.workload.split(",")))
            return key.template != wanted.template, apart, len(key.differences(wanted))

        near = min(keys, key=distance)
        parts = [f"{name} is {getattr(near, name)}, not {getattr(wanted, name)}" for name in near.differences(wanted)]
        return "the nearest record differs: " + "; ".join(parts)

    def _select(self, where: str, values: tuple[object, ...]) -> list[Record]:
        names = ", ".join(_KEY + _VALUES)
        with self._errors():
            rows = self._db.execute(f"SELECT {names} FROM records WHERE {where} ORDER BY id", values).fetchall()
            return [_record(row) for row in rows]

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """SQLite's and the system's errors as DatabaseError, which says what to do."""
        try:
            yield
        except (sqlite3.Error, OSError, ValueError) as error:
            text = str(error)
            hint = "name another file with --db"
            if "full" in text or "disk I/O" in text:
                hint = "free some space; what was committed before is safe"
            elif "locked" in text:
                hint = f"another process has held it for {_BUSY_S:g} s"
            raise DatabaseError(f"the tuning database failed: {text}", where=str(self.path), hint=hint) from error


def _row(record: Record, seed: int) -> tuple[object, ...]:
    m = record.measurement
    timings = {point: [t.seconds, t.default_seconds, t.spread] for point, t in m.timings.items()}
    config = json.dumps(dict(m.config), sort_keys=True)
    values = (config, m.status, json.dumps(timings), m.detail, m.build_seconds, int(m.verified), seed, time.time())
    return (*astuple(record.key), *values, json.dumps(dict(m.code)), m.predicted)


def _record(row: tuple) -> Record:
    key = Key(*row[: len(_KEY)])
    config, status, timings, detail, build_seconds, verified, _, _, code, predicted = row[len(_KEY) :]
    times = {point: Timing(*values) for point, values in json.loads(timings).items()}
    loaded = json.loads(config), status, times, detail, build_seconds, bool(verified), json.loads(code), predicted
    return Record(key, Measurement(*loaded))
