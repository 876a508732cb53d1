"""Tuning records as text: one a line, sorted, so that diffs of tuning_logs/*.jsonl read well and merges are trivial."""

from __future__ import annotations

import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

from llmc.errors import LlmcError
from llmc.targets.base import Target
from llmc.tune.database import Database
from llmc.tune.record import Key, Record, parse_points


class LogError(LlmcError):
    """A tuning log holds a line that is no record."""


def export(database: Database, path: Path, target: Target | None = None) -> int:
    """Write the database's records (of one target) as a log; returns how many lines it has."""
    return _write(path, database.records(target=target))


def import_(database: Database, path: Path) -> int:
    """Add a log's records that the database does not hold yet, all or, if a line is malformed, none; returns how many.

    Raises LogError and DatabaseError.
    """
    known = {record.to_json() for record in database.records()}
    return database.insert(r for r in read(path) if r.to_json() not in known)


def merge(paths: Sequence[Path], out: Path) -> int:
    """Write the union of some logs; returns how many lines it has. `out` may be one of them. Raises LogError."""
    return _write(out, [record for path in paths for record in read(path)])


def prune(path: Path, keep: int) -> int:
    """Leave at most `keep` records of each key in a log; returns how many lines are left. Raises LogError.

    Half of them are the best. The others are spread evenly over the rest, failures included: a cost model learns
    from bad candidates too.
    """
    groups: defaultdict[Key, list[Record]] = defaultdict(list)
    for record in read(path):
        groups[record.key].append(record)
    kept = []
    for key, records in groups.items():
        points = parse_points(key.points)
        # What was verified is what compilations use: it goes first.
        records.sort(key=lambda r: (not r.measurement.verified, r.measurement.cost(points), r.to_json()))
        best, rest = records[: -(-keep // 2)], records[-(-keep // 2) :]
        left = min(keep - len(best), len(rest))
        kept += best + [rest[(2 * i + 1) * len(rest) // (2 * left)] for i in range(left)]
    return _write(path, kept)


def read(path: Path) -> list[Record]:
    """A log's records. Raises LogError with file and line where a line is no record."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LogError(f"the tuning log cannot be read: {error}", where=str(path)) from error
    return _parse(text, str(path))


@cache
def shipped(target: Target) -> tuple[Record, ...]:
    """The records for a target that llmc ships. Raises LogError."""
    file = files("llmc.tuning_logs") / f"{target.name}.jsonl"
    return tuple(_parse(file.read_text(encoding="utf-8"), str(file))) if file.is_file() else ()


def _parse(text: str, name: str) -> list[Record]:
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            records.append(Record.from_json(line))
        except (ValueError, json.JSONDecodeError) as error:
            raise LogError(
                f"this line is no tuning record: {error}",
                where=f"{name}:{number}",
                hint="the file was cut off or edited by hand; delete the line, or fetch the file again",
            ) from error
    return records


def _write(path: Path, records: Iterable[Record]) -> int:
    """Write distinct records, sorted: whole or not at all."""
    lines = sorted({record.to_json() for record in records})
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write("".join(f"{line}\n" for line in lines))
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return len(lines)
