"""Runs AMX code where the CPU has no AMX: loads `emulator.c` into this process, and proves what ran by counting."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from llmc.targets import detect
from llmc.targets.detect import machine

FOLDER = Path(__file__).parent
FLAGS = frozenset({"amx_tile", "amx_int8", "amx_bf16"})
NATIVE = machine().flags >= FLAGS


class Emulator:
    """The shim, loaded: from now on every tile instruction of this process is trapped and executed by it."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.amx_name.restype = ctypes.c_char_p
        self._library.amx_count.restype = ctypes.c_uint64

    def reset(self) -> None:
        """All counts to zero."""
        self._library.amx_reset()

    def counts(self) -> dict[str, int]:
        """How many of each instruction all threads have executed; those of which there were none are left out."""
        found = {name: int(self._library.amx_count(kind)) for kind, name in enumerate(self._names())}
        return {name: count for name, count in found.items() if count}

    def names(self) -> set[str]:
        """All instructions that it executes; the two kinds of tile loads are one."""
        return {*self._names(), "tileloaddt1"}

    def _names(self) -> list[str]:
        return [self._library.amx_name(kind).decode() for kind in range(self._library.amx_kinds())]


def c_compiler() -> list[str] | None:
    """The command of a C compiler, or None."""
    for name in ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            return [path]
    return [sys.executable, "-m", "ziglang", "cc"] if find_spec("ziglang") else None


@functools.cache
def build(source: str) -> Path:
    """A file of this folder as a shared library, in a temporary folder of the process. Skips the test without a C
    compiler."""
    compiler = c_compiler()
    if compiler is None:
        pytest.skip("needs a C compiler: cc, gcc, clang or the package ziglang")
    library = Path(_folder().name) / f"{source}.so"
    flags = ["-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*compiler, *flags, str(FOLDER / source), "-o", str(library), "-lm"], check=True)
    return library


def enable() -> None:
    """Lets this process execute tiles: the CPU where it has them, else the emulator."""
    if NATIVE:
        from llmc.runtime.library import permit_tiles

        permit_tiles()
    else:
        emulator()


@functools.cache
def emulator() -> Emulator:
    """The one emulator of this process. Skips the test where it would not be the emulator that executes tiles."""
    if NATIVE:
        pytest.skip("this CPU executes tiles itself")
    return Emulator(build("emulator.c"))


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="llmc-amx-")


def pretend(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on this machine has tiles, and so have the Python processes that it starts. Its CPU has a name of its
    own: whatever is measured stays apart from what real ones take. The caller clears `machine`'s cache when it is over.
    """
    build("emulator.c")  # skips where it cannot
    cpuinfo = folder / "cpuinfo"
    here = machine()
    cpuinfo.write_text(f"model name : emulated tiles on {here.cpu}\nflags : {' '.join(here.flags | FLAGS)}\n")
    (folder / "sitecustomize.py").write_text(
        "from llmc.runtime import library\n"
        "from tests import amx_emulator\n"
        "library.permit_tiles = lambda: None\n"
        "amx_emulator.enable()\n"
    )
    monkeypatch.setattr(detect, "CPUINFO", cpuinfo)
    monkeypatch.syspath_prepend(str(folder))
    machine.cache_clear()
