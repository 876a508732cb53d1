"""From what was written down back to kernels and tasks: records, what artifacts say of themselves, what users type."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from llmc.errors import KernelError, OptionError
from llmc.schedules.base import Kernel, Workload
from llmc.schedules.families import FAMILIES
from llmc.targets.base import Target
from llmc.tune.record import Record, parse_points
from llmc.tune.task import Measurement, Task

_READ: dict[Any, Callable[[str], Any]] = {bool: {"True": True, "False": False}.__getitem__, int: int, float: float}
_DTYPES = ("float32", "float16")  # of weights and their planes
_SCALES = (*_DTYPES, "bfloat16")
_EXAMPLE = "'lowbit LowBitLinearWorkload(N=960,K=576,bits=4,group_size=32)'"


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
    try:
        workload = _workload(kind, _fields(kind, match[1])) if match else None
    except ValueError:
        return None
    return workload if workload is not None and workload.key() == text else None


def parse_kernel(text: str) -> Kernel:
    """The kernel of a template's name and a workload's key, as `llmc logs list` prints them.

    Fields may come in any order, and those that have a default may be left out. Raises OptionError.
    """
    match = re.fullmatch(r"\s*(\w+)\s+(\w+)\((.*)\)\s*", text)
    if match is None or match[1] not in FAMILIES:
        what = f"there is no template '{match[1]}'" if match else f"'{text}' is not a template and its workload"
        known = ", ".join(f"{name} {kind.__name__}" for name, (_, kind) in FAMILIES.items())
        raise OptionError(what, where="--workload", hint=f"known: {known}; an example: {_EXAMPLE}")
    template, kind = FAMILIES[match[1]]
    try:
        if match[2] != kind.__name__:
            raise ValueError(f"{template.name} has no workload {match[2]}")
        return Kernel(template, _workload(kind, _fields(kind, match[3])))
    except ValueError as error:
        hint = f"write it as '{template.name} {_pattern(kind)}'; an example: {_EXAMPLE}"
        raise OptionError(f"'{text}': {error}", where="--workload", hint=hint) from None


def kernel_of(template: str, version: int, fields: Any) -> Kernel:
    """The kernel that an artifact describes. Raises ValueError, with a message for people, if this llmc has none."""
    if template not in FAMILIES:
        raise ValueError("this llmc has no such template")
    known, kind = FAMILIES[template]
    if known.version != version:
        raise ValueError(f"the template's version is {version}, this llmc has {known.version}")
    if not isinstance(fields, dict):
        raise ValueError("its workload has no fields")
    return Kernel(known, _workload(kind, fields))


def _task(record: Record, targets: Mapping[str, Target]) -> Task | None:
    key = record.key
    (template, kind), target = FAMILIES.get(key.template, (None, Workload)), targets.get(key.target_name)
    if template is None or template.version != key.version or target is None:
        return None
    workload = parse_workload(kind, key.workload)
    return Task(Kernel(template, workload), target, parse_points(key.points)) if workload else None


def _workload(kind: type[Workload], fields: Mapping[str, Any]) -> Workload:
    """A workload from its fields, none of which is trusted. Raises ValueError, with a message for people."""
    hints, sizes = get_type_hints(kind), _required(kind)
    if missing := [name for name in sizes if name not in fields]:
        raise ValueError(f"{kind.__name__} needs {', '.join(missing)}")
    for name, value in fields.items():
        if name not in hints:
            raise ValueError(f"{kind.__name__} has no {name}")
        if get_origin(hints[name]) is Literal:
            if value not in get_args(hints[name]):
                raise ValueError(f"{name} is {value}, not one of {', '.join(get_args(hints[name]))}")
        elif type(value) is not hints[name]:
            raise ValueError(f"{name} is {value!r}, which is no {hints[name].__name__}")
        elif name.endswith("dtype") and value not in (allowed := _SCALES if name == "scale_dtype" else _DTYPES):
            raise ValueError(f"{name} is {value}, not one of {', '.join(allowed)}")
        if (name in sizes and not value > 0) or (hints[name] is int and value < 0):
            raise ValueError(f"{name} is {value}, which is no size")
    try:
        return kind(**fields)
    except KernelError as error:
        raise ValueError(f"{error.what} ({error.hint})" if error.hint else error.what) from None


def _fields(kind: type[Workload], text: str) -> dict[str, Any]:
    """`name=value,...` with values as their fields' types. Raises ValueError, with a message for people."""
    hints, fields = get_type_hints(kind), dict[str, Any]()
    for pair in filter(None, map(str.strip, text.split(","))):
        name, equals, value = pair.partition("=")
        if not equals or name in fields:
            raise ValueError(f"{name} is given twice" if equals else f"'{pair}' is not NAME=VALUE")
        try:
            fields[name] = _READ.get(hints.get(name), str)(value)
        except (ValueError, KeyError):
            raise ValueError(f"{name} is '{value}', which is no {hints[name].__name__}") from None
    return fields


def _required(kind: type[Workload]) -> list[str]:
    """Fields without a default: every workload's sizes."""
    return [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING]


def _pattern(kind: type[Workload]) -> str:
    """A workload as one types it, with the defaults of the fields that have one."""
    defaults = {f.name: "…" if f.default is dataclasses.MISSING else f.default for f in dataclasses.fields(kind)}
    return f"{kind.__name__}({','.join(f'{name}={value}' for name, value in defaults.items())})"
