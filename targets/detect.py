"""What this machine is: its CPU flags, caches and cores as Linux reports them, and which targets it can run."""

from __future__ import annotations

import ctypes
import dataclasses
import os
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from llmc.errors import OptionError
from llmc.targets.base import Target
from llmc.targets.x86 import TARGETS

CPUINFO = Path("/proc/cpuinfo")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
# CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, _COMPUTE_CAPABILITY_MAJOR, _MINOR
_MULTIPROCESSORS, _CAPABILITY = 16, (75, 76)
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Machine:
    """One computer. Sizes are bytes, 0 where the system does not tell; `cores` are those this process may use."""

    cpu: str
    flags: frozenset[str]
    cores: int
    l1_bytes: int
    l2_bytes: int
    l3_bytes: int

    def missing(self, target: Target) -> list[str]:
        """The CPU flags that `target` needs and this machine lacks: empty means that its code runs here."""
        return sorted(set(target.requires) - self.flags)


@cache
def machine() -> Machine:
    """This machine."""
    info = _cpuinfo(CPUINFO.read_text() if CPUINFO.exists() else "")
    sizes = _caches(CACHES)
    return Machine(
        cpu=info.get("model name", "unknown"),
        flags=frozenset(info.get("flags", "").split()),
        cores=len(os.sched_getaffinity(0)),
        l1_bytes=sizes.get(1, 0),
        l2_bytes=sizes.get(2, 0),
        l3_bytes=sizes.get(3, 0),
    )


@cache
def compute_capability() -> tuple[int, int] | None:
    """Of this machine's first NVIDIA GPU, as its driver says; None without a GPU, or a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, numbers = ctypes.c_int(), (ctypes.c_int(), ctypes.c_int())
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    for number, attribute in zip(numbers, _CAPABILITY, strict=True):
        if driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device):
            return None
    return numbers[0].value, numbers[1].value


@cache
def gpu() -> tuple[str, int] | None:
    """Name and multiprocessors of this machine's first NVIDIA GPU; None without a GPU, or a driver."""
    if compute_capability() is None:
        return None
    driver, device, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGet(ctypes.byref(device), 0)
    driver.cuDeviceGetAttribute(ctypes.byref(count), _MULTIPROCESSORS, device)
    driver.cuDeviceGetName(name, len(name), device)
    return name.value.decode(errors="replace"), count.value


def native(here: Machine | None = None, targets: Collection[Target] = tuple(TARGETS.values())) -> Target:
    """The widest of `targets` that `here` (default: this machine) runs, with the caches of `here`. Never the one for
    AMX: nothing says yet that it is faster.

    It keeps the name and the instruction set of the general target, so its artifacts run wherever that one's do.
    Raises OptionError if there is none.
    """
    here = here or machine()
    runnable = [t for t in targets if not t.tiles and not here.missing(t)]
    if not runnable:
        raise OptionError(
            f"no target runs on this machine ({here.cpu})",
            where="target native",
            hint=f"name one of {', '.join(t.name for t in targets)} to compile for another machine",
        )
    best = max(runnable, key=lambda t: (t.lanes, t.dot == "vnni"))
    caches = {level: getattr(here, level) or getattr(best, level) for level in ("l1_bytes", "l2_bytes", "l3_bytes")}
    return dataclasses.replace(best, **caches)


def _cpuinfo(text: str) -> dict[str, str]:
    """The first processor's entries."""
    pairs = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _caches(folder: Path) -> dict[int, int]:
    """Level to bytes, of the data and unified caches."""
    sizes = {}
    for index in sorted(folder.glob("index*")):
        kind, level, size = ((index / name).read_text().strip() for name in ("type", "level", "size"))
        if kind in ("Data", "Unified"):
            sizes[int(level)] = int(size[:-1]) * _UNITS[size[-1]] if size[-1] in _UNITS else int(size)
    return sizes
