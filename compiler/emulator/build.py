"""Compiles the emulator's runtime, its driver and translated kernels with g++, each once: cached by content."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parent
_RUNTIME = ("threads.cpp", "faults.cpp", "memory.cpp", "trace.cpp", "warp.cpp", "mbarrier.cpp", "wgmma.cpp")
CUDA, CUDART = "libcuda.so.1", "libcudart.so.13"  # the driver's two libraries, named as NVIDIA's
_COMMON = ("-std=c++17", "-fPIC", "-g1", "-fno-strict-aliasing", "-fwrapv", "-ffp-contract=off", "-w")
# Every access to memory is reported, every index into an array and every alignment is checked, and variables begin with
# rubbish instead of what the last block left in them.
_KERNEL = (
    "-O1",
    "-fsanitize=thread,bounds-strict,alignment,integer-divide-by-zero",
    "--param=tsan-instrument-func-entry-exit=0",
    "-ftrivial-auto-var-init=pattern",
    "-fno-exceptions",
)


class BuildError(Exception):
    """g++ refused a translated kernel: it uses what the shim does not have."""


@functools.cache
def compiler() -> str | None:
    """g++, or None where there is none that can: of version 12 or later, for x86-64."""
    path = shutil.which("g++")
    if path is None or platform.machine() != "x86_64":
        return None
    version = subprocess.run([path, "-dumpversion"], capture_output=True, text=True).stdout.strip()
    return path if version.partition(".")[0].isdigit() and int(version.partition(".")[0]) >= 12 else None


def build(code: str) -> Path:
    """Translated kernels as a library that is linked with the runtime. Raises BuildError."""
    parts = _sources() + "\0".join(_KERNEL).encode()
    library = _cache() / f"{hashlib.sha256(parts + code.encode()).hexdigest()[:32]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=_cache()) as scratch:
            source, made = Path(scratch) / "kernel.cpp", Path(scratch) / "kernel.o"
            source.write_text(code, encoding="utf-8")
            _run(
                [
                    *_KERNEL,
                    "-c",
                    str(source),
                    "-include",
                    str(_prefix()),
                    "-I",
                    str(FOLDER / "include"),
                    "-o",
                    str(made),
                ]
            )
            # Without the sanitizers' libraries: the runtime has their functions.
            linked = Path(scratch) / "kernel.so"
            _run(["-shared", str(made), str(runtime()), f"-Wl,-rpath,{runtime().parent}", "-o", str(linked)])
            os.replace(linked, library)
    return library


@functools.cache
def runtime() -> Path:
    """The library of threads, memory and collective instructions."""
    library = _cache() / f"libemulator-{hashlib.sha256(_sources()).hexdigest()[:16]}.so"
    with _missing(library) as scratch:
        if scratch:
            made = scratch / "runtime.so"
            # Some systems' compilers check by default that no jump goes to another stack, as every one here does.
            flags = ("-O2", "-shared", "-U_FORTIFY_SOURCE")
            _run([*flags, *(str(FOLDER / "runtime" / name) for name in _RUNTIME), "-o", str(made)])
            os.replace(made, library)
    return library


@functools.cache
def driver() -> Path:
    """The folder with the two libraries that take the place of NVIDIA's driver and runtime. Raises BuildError."""
    folder = _cache() / f"driver-{hashlib.sha256(_sources() + _driver_sources()).hexdigest()[:16]}"
    with _missing(folder / CUDART) as scratch:
        if scratch:
            parts = sorted((FOLDER / "runtime").glob("driver_*.cpp"))
            entry = FOLDER / "runtime" / "driver_cudart.cpp"
            flags = ("-O1", "-shared", "-fvisibility=default", "-Wl,-z,defs")
            folder.mkdir(exist_ok=True)
            for name, sources, needed in (
                (CUDA, [part for part in parts if part != entry], runtime()),
                (CUDART, [entry], folder / CUDA),
            ):
                script = [f"-Wl,--version-script={entry.with_suffix('.map')}"] if name == CUDART else []
                linked = [str(needed), f"-Wl,-rpath,{needed.parent}", f"-Wl,-soname,{name}", *script]
                _run([*flags, *map(str, sources), *linked, "-o", str(scratch / name)])
                os.replace(scratch / name, folder / name)
    return folder


@functools.cache
def _prefix() -> Path:
    """The shim, compiled ahead for this compiler and these options: half of a kernel's compile time."""
    folder = _cache() / f"shim-{hashlib.sha256(_sources() + repr(_KERNEL).encode()).hexdigest()[:16]}"
    header = folder / "shim.h"
    compiled = folder / "shim.h.gch"
    with _missing(compiled) as scratch:
        if scratch:
            made, text = scratch / "shim.h", f'#include "{FOLDER / "include" / "shim.h"}"\n'
            made.write_text(text, encoding="utf-8")
            _run([*_KERNEL, "-x", "c++-header", str(made), "-o", f"{made}.gch"])
            folder.mkdir(exist_ok=True)
            os.replace(made, header)
            os.replace(f"{made}.gch", compiled)
    return header


@contextlib.contextmanager
def _missing(made: Path) -> Iterator[Path | None]:
    """A folder to make it in, or None where it is there. Processes that want the same one wait for each other."""
    if made.exists():
        yield None
        return
    with (_cache() / f"{made.name}.lock").open("w") as lock, tempfile.TemporaryDirectory(dir=_cache()) as scratch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield None if made.exists() else Path(scratch)


def _run(arguments: list[str]) -> None:
    done = subprocess.run([str(compiler()), *_COMMON, *_half(), *arguments], capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line or "undefined" in line]
        raise BuildError("\n".join(lines[:8] or done.stderr.splitlines()[:8]))


@functools.cache
def _half() -> tuple[str, ...]:
    """Conversions of two-byte numbers in hardware where there are such instructions."""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    return ("-mf16c",) if " f16c" in flags else ()


@functools.cache
def _sources() -> bytes:
    runtime = [file for file in (FOLDER / "runtime").iterdir() if not file.name.startswith("driver")]
    files = sorted([*(FOLDER / "include").iterdir(), *runtime])
    return b"\0".join(file.read_bytes() for file in files) + "\0".join((*_COMMON, *_half(), str(compiler()))).encode()


def _driver_sources() -> bytes:
    return b"\0".join(file.read_bytes() for file in sorted((FOLDER / "runtime").glob("driver*")))


def _cache() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmc" / "cuda-emulator"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
