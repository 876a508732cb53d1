"""Records as tasks again: what the cost model and the search learn from, whoever measured it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_type_hints

from llmc.schedules.attention.attention import ATTENTION
from llmc.schedules.attention.kv_append import KV_APPEND
from llmc.schedules.attention.workloads import AttentionWorkload, KVAppendWorkload
from llmc.schedules.base import Kernel, Template, Workload
from llmc.schedules.embedding.dense import EMBEDDING_DENSE, EmbeddingDenseWorkload
from llmc.schedules.gemm.dense import DENSE, DenseLinearWorkload
from llmc.schedules.gemm.lowbit import LOWBIT, LowBitLinearWorkload
from llmc.schedules.norm.norm import NORM, NormWorkload
from llmc.targets.base import Target
from llmc.tune.record import Record, parse_points
from llmc.tune.task import Measurement, Task

_FAMILIES: list[tuple[Template, type[Workload]]] = [
    (ATTENTION, AttentionWorkload),
    (KV_APPEND, KVAppendWorkload),
    (EMBEDDING_DENSE, EmbeddingDenseWorkload),
    (DENSE, DenseLinearWorkload),
    (LOWBIT, LowBitLinearWorkload),
    (NORM, NormWorkload),
]
_READ: dict[Any, Callable[[str], Any]] = {bool: "True".__eq__, int: int, float: float}
_BY_NAME = {(template.name, template.version): (template, workload) for template, workload in _FAMILIES}


def history_of(records: Iterable[Record], targets: Iterable[Target]) -> list[tuple[Task, Measurement]]:
    """The records that this llmc understands, each with the task it was made for.

    Left out: other versions of templates, other targets than `targets` (told apart by name), workloads with fields
    that are gone.
    """
    by_name, tasks = {t.name: t for t in targets}, dict[Any, Task | None]()
    history = []
    for record in records:
        k = record.key
        what = (k.template, k.version, k.workload, k.points, k.target_name)
        if what not in tasks:
            tasks[what] = _task(record, by_name)
        task = tasks[what]
        if task is not None:
            history.append((task, record.measurement))
    return history


def parse_workload(kind: type[Workload], text: str) -> Workload | None:
    """The workload whose key is `text`; None if there is none of this class."""
    match = re.fullmatch(rf"{kind.__name__}\((.*)\)", text)
    hints = get_type_hints(kind)
    pairs = [pair.partition("=") for pair in match[1].split(",")] if match else []
    try:
        workload = kind(**{name: _READ.get(hints.get(name), str)(value) for name, _, value in pairs})
    except (TypeError, ValueError):
        return None
    return workload if workload.key() == text else None


def _task(record: Record, targets: Mapping[str, Target]) -> Task | None:
    key = record.key
    family, target = _BY_NAME.get((key.template, key.version)), targets.get(key.target_name)
    if family is None or target is None:
        return None
    workload = parse_workload(family[1], key.workload)
    return Task(Kernel(family[0], workload), target, parse_points(key.points)) if workload else None
