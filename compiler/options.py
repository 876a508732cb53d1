"""From what a user types to what the compiler works with: targets, dimensions, durations. Never imports TVM.

Formats of weights are resolved by `llmc.quantize.formats`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from llmc.errors import OptionError

if TYPE_CHECKING:
    from llmc.targets.base import Target

# A dimension's size: fixed, or the least and the most.
Size = int | tuple[int, int]


def resolve_target(name: str) -> Target:
    """The description of a target; `native` is the best one that this machine's CPU runs, with its caches; `cuda` that
    of this machine's GPU, or the oldest where it has none.

    Raises OptionError for an unknown name, and for `native` on a machine that runs none of them.
    """
    from llmc.targets import cuda, x86
    from llmc.targets.detect import compute_capability, native

    if name == "native":
        return native()
    if name == "cuda":
        return cuda.newest(compute_capability())
    known = {**x86.TARGETS, **cuda.TARGETS}
    _known(name, ["native", "cuda", *known], "target")
    return known[name]


def parse_dims(items: Iterable[str]) -> dict[str, Size]:
    """`batch=1` fixes a dimension, `seq=1..4096` bounds it. Raises OptionError for anything else."""
    dims: dict[str, Size] = {}
    for item in items:
        name, _, value = item.partition("=")
        numbers = value.split("..")
        if not name or len(numbers) > 2 or not all(n.isdecimal() for n in numbers):
            raise OptionError(
                f"'{item}' is not a dimension", where="--dim", hint="write NAME=SIZE or NAME=LOW..HIGH, as seq=1..4096"
            )
        low, high = int(numbers[0]), int(numbers[-1])
        if high < max(low, 1):
            raise OptionError(f"'{item}' leaves no possible size", where="--dim", hint="sizes are 1 or more, LOW..HIGH")
        if name in dims:
            raise OptionError(f"dimension '{name}' is given twice", where="--dim", hint="give it once")
        dims[name] = low if len(numbers) == 1 else (low, high)
    return dims


def fixed_dims(items: Iterable[str]) -> dict[str, int]:
    """Dimensions that must be one size each. Raises OptionError."""
    dims = parse_dims(items)
    ranges = [name for name, size in dims.items() if not isinstance(size, int)]
    if ranges:
        raise OptionError(
            f"dimension '{ranges[0]}' must be one size here", where="--dim", hint=f"write {ranges[0]}=SIZE"
        )
    return {name: size for name, size in dims.items() if isinstance(size, int)}


def show_dims(dims: Mapping[str, Size]) -> str:
    """`dims` as a user would type them."""
    sizes = {name: size if isinstance(size, int) else f"{size[0]}..{size[1]}" for name, size in dims.items()}
    return ", ".join(f"{name}={size}" for name, size in sizes.items())


def parse_counts(text: str, option: str) -> tuple[int, ...]:
    """`128,512` as positive integers. Raises OptionError for anything else."""
    parts = [p.strip() for p in text.split(",")]
    if not all(p.isdecimal() and int(p) for p in parts):
        raise OptionError(f"'{text}' is not a list of positive numbers", where=option, hint="write it as 128,512")
    return tuple(int(p) for p in parts)


def parse_duration(text: str, option: str) -> float:
    """`90s`, `10m` or `1h` in seconds, more than 0. Raises OptionError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    seconds = float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    if seconds <= 0:
        raise OptionError(f"'{text}' is not a duration", where=option, hint="write it as 90s, 10m or 1h")
    return seconds


def _known(name: str, names: Iterable[str], what: str) -> None:
    names = list(names)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise OptionError(f"no {what} '{name}'", hint=f"{hint}known: {', '.join(names)}")
