"""What a database holds, task by task."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from llmc.tune.record import Best, Key, Record, best_of, parse_points


@dataclass(frozen=True)
class KeySummary:
    """The records under one key: how many of each status, and the best verified configuration, if one helps."""

    key: Key
    statuses: dict[str, int]
    best: Best | None


def preferred(summaries: Iterable[KeySummary]) -> list[KeySummary]:
    """Without predictions of kernels that were measured, wherever that was."""
    summaries = list(summaries)

    def kernel(key: Key) -> tuple[str, int, str, str]:
        return key.template, key.version, key.workload, key.target_name

    measured = {kernel(s.key) for s in summaries if not s.key.predicted}
    return [s for s in summaries if not (s.key.predicted and kernel(s.key) in measured)]


def overview(records: Iterable[Record]) -> list[KeySummary]:
    """A summary of every key, in the order of keys."""
    by_key: defaultdict[Key, list[Record]] = defaultdict(list)
    for record in records:
        by_key[record.key].append(record)
    return [
        KeySummary(key, dict(Counter(r.measurement.status for r in group)), best_of(group, parse_points(key.points)))
        for key, group in sorted(by_key.items())
    ]
