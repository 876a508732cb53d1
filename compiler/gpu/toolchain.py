"""NVIDIA's tools, wherever they are installed, and the cache of what they made.

The extra `llmc[cuda]` brings them from PyPI: the runtime compiler, headers, the disassembler. Where it is not installed
a CUDA toolkit's nvcc serves. Neither needs a GPU or a driver.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from llmc.errors import KernelError, LlmcError, OptionError
from llmc.gpu import nvrtc
from llmc.package.replace import replacing

INSTALL = "pip install 'llmc[cuda]'"
# No --use_fast_math: its sines and divisions are not those of the models' own numerics. Kernels that may round more say
# so themselves. -v writes down registers and spills, which `binary` reads.
_OPTIONS = ("--std=c++17", "--diag-suppress=177,550")
_PTXAS = "-v"


@dataclass(frozen=True)
class Binary:
    """A source, compiled: machine code for one architecture, PTX for later ones, and what ptxas says of it."""

    cubin: bytes
    ptx: bytes
    log: str


@dataclass(frozen=True)
class Toolchain:
    """Where the tools are: `nvrtc` with its headers in `include`, or `nvcc`."""

    nvrtc: Path | None
    include: Path | None
    nvcc: Path | None

    @property
    def identity(self) -> str:
        """What decides the binaries: compiler and version."""
        return f"nvrtc {nvrtc.version(self.nvrtc)}" if self.nvrtc else _nvcc_version(self.nvcc)

    def compile(self, source: str, arch: str) -> Binary:
        """CUDA C for `arch` (sm_80), from the cache where it was compiled before.

        Raises KernelError where the compiler refuses the source.
        """
        key = hashlib.sha256("\0".join((source, arch, self.identity, *_OPTIONS, _PTXAS)).encode()).hexdigest()
        stored = cache_folder() / f"{key}.zip"
        if (binary := _stored(stored)) is not None:
            return binary
        try:
            binary = self._with_nvrtc(source, arch) if self.nvrtc else self._with_nvcc(source, arch)
        except nvrtc.CompileError as error:
            names = re.findall(r"__global__ void (?:__launch_bounds__\(\w+\) )?(\w+)\(", source)
            what = f"the CUDA compiler ({self.identity}) refuses this kernel: {_first_error(str(error))}"
            raise KernelError(
                what,
                where=f"{names[0] if names else 'kernel'} for {arch}",
                hint="this is a fault of llmc's, or of a compiler that it was not tested with; --debug shows all",
            ) from error
        _store(stored, binary)
        return binary

    def _with_nvrtc(self, source: str, arch: str) -> Binary:
        assert self.nvrtc is not None
        options = [f"--gpu-architecture={arch}", *_OPTIONS, "--device-int128", f"--ptxas-options={_PTXAS}"]
        return Binary(*nvrtc.compile(self.nvrtc, source, [*options, f"-I{self.include}"]))

    def _with_nvcc(self, source: str, arch: str) -> Binary:
        with tempfile.TemporaryDirectory(prefix="llmc-") as folder:
            code, ptx, cubin = (Path(folder) / f"kernel.{kind}" for kind in ("cu", "ptx", "cubin"))
            code.write_text(source, encoding="utf-8")
            self._nvcc("-ptx", f"-arch=compute_{arch.removeprefix('sm_')}", *_OPTIONS, "-o", str(ptx), str(code))
            log = self._nvcc("-cubin", f"-arch={arch}", "-Xptxas", _PTXAS, "-o", str(cubin), str(ptx))
            return Binary(cubin.read_bytes(), ptx.read_bytes(), log)

    def _nvcc(self, *arguments: str) -> str:
        done = subprocess.run([str(self.nvcc), *arguments], capture_output=True, text=True)
        if done.returncode:
            raise nvrtc.CompileError(done.stderr or done.stdout)
        return done.stdout + done.stderr


def find_toolchain() -> Toolchain:
    """The tools of this machine. Raises OptionError, with the command that installs them, where there are none."""
    for folder in _wheels():
        libraries = sorted((folder / "lib").glob("libnvrtc.so.*"))
        if libraries and (folder / "include" / "cuda_fp16.h").is_file():
            return Toolchain(libraries[-1], folder / "include", None)
    if nvcc := shutil.which("nvcc"):
        return Toolchain(None, None, Path(nvcc))
    raise OptionError(
        "NVIDIA's compiler is not installed", where="target cuda", hint=f"{INSTALL}; no GPU or driver is needed"
    )


def available() -> bool:
    """Can this machine compile CUDA C?"""
    try:
        find_toolchain()
    except LlmcError:
        return False
    return True


def disassemble(cubin: bytes) -> str:
    """The machine code of a cubin, as nvdisasm writes it: from the cache where it was asked for before.

    Raises OptionError where nvdisasm is not installed.
    """
    stored = cache_folder() / f"{hashlib.sha256(cubin).hexdigest()}.sass.gz"
    try:
        return gzip.decompress(stored.read_bytes()).decode()
    except (OSError, EOFError, zlib.error):  # not there, or cut off
        code = _disassemble(cubin)
    with contextlib.suppress(OSError, LlmcError):  # a full or read-only disk only costs doing it again
        stored.parent.mkdir(parents=True, exist_ok=True)
        with replacing(stored) as file:
            file.write(gzip.compress(code.encode(), 1))
    return code


def _disassemble(cubin: bytes) -> str:
    tool = next((f / "bin" / "nvdisasm" for f in _wheels() if (f / "bin" / "nvdisasm").is_file()), None)
    found = str(tool) if tool else shutil.which("nvdisasm")
    if found is None:
        raise OptionError("NVIDIA's disassembler is not installed", where="target cuda", hint=INSTALL)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([found, "-c", "-ndf", file.name], capture_output=True, text=True)
    if done.returncode:
        raise KernelError(f"nvdisasm cannot read a cubin: {done.stderr.strip()}", hint=INSTALL)
    return done.stdout


def cache_folder() -> Path:
    """Where binaries are kept: llmc/cuda in the user's cache folder (XDG Base Directory Specification)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmc" / "cuda"


def _wheels() -> list[Path]:
    """Folders into which NVIDIA's wheels install, the newest CUDA first."""
    spec = importlib.util.find_spec("nvidia")
    roots = spec.submodule_search_locations if spec and spec.submodule_search_locations else []
    return sorted((folder for root in roots for folder in Path(root).glob("cu[0-9]*")), reverse=True)


def _nvcc_version(nvcc: Path | None) -> str:
    text = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True).stdout
    release = re.search(r"V(\d+\.\d+\.\d+)", text)
    return f"nvcc {release[1] if release else 'of unknown version'}"


def _first_error(message: str) -> str:
    lines = [line for line in message.splitlines() if "error" in line.lower()]
    return (lines or message.splitlines() or ["without a word"])[0].strip()


def _stored(path: Path) -> Binary | None:
    try:
        with zipfile.ZipFile(path) as file:
            return Binary(file.read("cubin"), file.read("ptx"), file.read("log").decode())
    except (OSError, KeyError, zipfile.BadZipFile):  # not there, or cut off: it is made again
        return None


def _store(path: Path, binary: Binary) -> None:
    """A full or read-only disk only costs compiling again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in (("cubin", binary.cubin), ("ptx", binary.ptx), ("log", binary.log.encode())):
                archive.writestr(name, content)
    except (OSError, LlmcError):
        return
