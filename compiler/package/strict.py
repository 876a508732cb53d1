"""Strict JSON: text to frozen dataclasses by their type hints; every surprise is an error that names its place."""

from __future__ import annotations

import dataclasses
import json
import math
import types
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from llmc.errors import UNPRINTABLE

T = TypeVar("T")

MAX_CONTAINERS = 1 << 18
MAX_DEPTH = 32
MAX_TEXT = 1 << 16  # characters of a string


class Mismatch(ValueError):
    """A value is not what its field must hold; the message begins with the path to it."""


def parse(text: bytes) -> Any:
    """JSON without duplicate keys, NaN, Infinity, or more of anything than can be meant. Raises Mismatch."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise Mismatch("an object holds the same key twice")
        return found

    def refuse(constant: str) -> Any:
        raise Mismatch(f"{constant} is not a JSON number")

    # A loose upper bound, before anything is built: brackets inside of strings count too.
    if text.count(b"{") + text.count(b"[") > MAX_CONTAINERS:
        raise Mismatch(f"holds more than {MAX_CONTAINERS} objects and arrays")
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
        _check_plain(value, 0)
        return value
    except Mismatch:
        raise
    except RecursionError:
        raise Mismatch("nested too deeply") from None
    except ValueError as error:
        raise Mismatch(f"not JSON: {error}") from None


def _check_plain(value: Any, depth: int) -> None:
    """What can be copied, shown and written again: no deep nesting, no infinite number, no unprintable text."""
    if depth > MAX_DEPTH:
        raise Mismatch("nested too deeply")
    if isinstance(value, dict):
        for key in value:
            _check_plain(key, depth)
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            _check_plain(item, depth + 1)
    elif isinstance(value, str):
        if len(value) > MAX_TEXT or (not value.isprintable() and UNPRINTABLE.search(value)):
            raise Mismatch(f"the text {value[:60]!a} is too long or holds control characters")
    elif isinstance(value, float) and not math.isfinite(value):
        raise Mismatch(f"{value} is not a JSON number")
    elif isinstance(value, int) and value.bit_length() > 64:
        raise Mismatch("a number has more than 64 bits")


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _name(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_name(h) for h in get_args(hint))
    if hint is type(None):
        return "null"
    if get_origin(hint) is tuple:
        return "array"
    if get_origin(hint) is dict or dataclasses.is_dataclass(hint):
        return "object"
    return {int: "integer", str: "string", float: "number", bool: "true or false"}.get(hint, str(hint))


def decode(hint: type[T], value: Any, where: str = "") -> T:
    """`value` (parsed JSON) as an instance of `hint`: a dataclass, scalar, `tuple[X, ...]`, `dict[str, X]` or union.

    Fields may be neither missing (unless they have a default) nor unknown. Raises Mismatch.
    """
    result = _decode(hint, value, where)
    return result  # type: ignore[no-any-return]


def _decode(hint: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        for option in args:
            if _shaped(option, value):
                return _decode(option, value, where)
    elif dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return _decode_fields(hint, value, where)
    elif origin is tuple and isinstance(value, list):
        if args[-1] is Ellipsis:
            return tuple(_decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
        if len(value) == len(args):
            return tuple(
                _decode(arg, item, f"{where}[{i}]") for i, (arg, item) in enumerate(zip(args, value, strict=True))
            )
        raise Mismatch(f"{where} must hold {len(args)} items, not {len(value)}")
    elif origin is dict and isinstance(value, dict):
        return {key: _decode(args[1], item, f"{where}.{key}") for key, item in value.items()}
    elif _shaped(hint, value):
        return value
    raise Mismatch(f"{where or 'the document'} must be {_name(hint)}, not {json.dumps(value)[:40]}")


def _shaped(hint: Any, value: Any) -> bool:
    """Does the JSON type of `value` fit? Enough to choose between the members of a union."""
    if hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if get_origin(hint) is tuple:
        return isinstance(value, list)
    if get_origin(hint) is dict or dataclasses.is_dataclass(hint):
        return isinstance(value, dict)
    return type(value) is hint


def _decode_fields(cls: type, value: dict[str, Any], where: str) -> Any:
    prefix = f"{where}." if where else ""
    hints = _hints(cls)
    fields = dataclasses.fields(cls)
    unknown = sorted(value.keys() - {field.name for field in fields})
    if unknown:
        raise Mismatch(f"{prefix}{unknown[0]} is not a known field")
    found = {}
    for field in fields:
        if field.name in value:
            found[field.name] = _decode(hints[field.name], value[field.name], prefix + field.name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise Mismatch(f"{prefix}{field.name} is missing")
    return cls(**found)


def encode(value: Any) -> bytes:
    """A dataclass (or plain JSON value) as indented UTF-8 JSON with sorted keys: equal values give equal bytes.

    Raises Mismatch for what `parse` would refuse.
    """
    plain = dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
    _check_plain(plain, 0)
    return json.dumps(plain, sort_keys=True, indent=1, allow_nan=False).encode() + b"\n"
