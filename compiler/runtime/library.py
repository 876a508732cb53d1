"""Finding and loading the runtime library that an artifact was built for, and sizing its thread pool."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import tvm_ffi

from llmc.errors import ArtifactError, OptionError
from llmc.package.layout import DEVICE_KERNELS, LIBRARY, RUNTIME
from llmc.package.reader import Artifact
from llmc.runtime.cuda import cuda
from llmc.runtime.device import import_kernels
from llmc.runtime.gpu import CUDA
from llmc.runtime.installed import installed_library, installed_version, unpacked

_CPU, _DEVICE, _POOLED = 1, 0, 2  # DLPack's device type, its index, the VM's pooled allocator
# How often an idle thread of the pool looks for work before it sleeps: 2 to 3 ms, which spans the time between two
# tokens. TVM's own 300,000 keep a core busy for 80 ms after every call, and whatever else wants to run there waits.
_SPINS = "10000"
_ALL_SIZES = 1  # the thread pool's mode that takes cores of every kind
# Linux lets a process use AMX tiles, whose 8 KiB it must keep for each thread, only once it has asked.
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18

_runtime_library = RUNTIME[1]
_loaded_version: str | None = None  # of the runtime library that this module loaded into the process


def cpu_flags() -> frozenset[str]:
    """Features of this machine's CPU, as Linux spells them."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    lines = (line.partition(":") for line in text.splitlines())
    return frozenset(flag for key, _, value in lines if key.strip() in ("flags", "Features") for flag in value.split())


def check_cpu(artifact: Artifact) -> None:
    """Raises ArtifactError if the artifact's code uses instructions that this CPU lacks, or the system withholds."""
    target = artifact.manifest.target
    missing = sorted(set(target.requires) - cpu_flags())
    if missing:
        raise ArtifactError(
            f"was compiled for {target.name} and needs {', '.join(missing)}, which this CPU lacks",
            where=str(artifact.path),
            hint="compile the model for this machine: llmc compile --target native",
        )
    if "amx_tile" in target.requires:
        try:
            permit_tiles()
        except OSError as error:
            raise ArtifactError(
                f"was compiled for {target.name}, and the system does not let this process use AMX tiles: "
                f"{error.strerror}",
                where=str(artifact.path),
                hint="Linux can since 5.16; without tiles: llmc compile --target x86-avx512",
            ) from error


def permit_tiles() -> None:
    """Asks the system that all threads of this process may use AMX tiles, now and later. Raises OSError if refused."""
    arguments = (ctypes.c_long(n) for n in (_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA))
    if ctypes.CDLL(None, use_errno=True).syscall(*arguments):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def available_cores() -> int:
    """Cores that this process may use: its affinity mask, and the control group's quota if that is lower."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(cores, max(1, -(-int(quota) // int(period))))
    except (OSError, ValueError):  # no such file, or "max": no limit
        return cores


def load_library(artifact: Artifact, threads: int | None) -> Any:
    """The artifact's code, ready to run: a virtual machine whose functions are its items.

    `threads` is the size of the thread pool (None: TVM_NUM_THREADS, or all available cores). Raises ArtifactError,
    and OptionError if the pool of this process exists already and is smaller.
    """
    cores = len(os.sched_getaffinity(0))
    if threads is not None and not 1 <= threads <= cores:
        raise OptionError(f"threads is {threads}; this process may use from 1 to {cores}")
    # Read by the pool when it starts. The pool pins its threads, and the caller's with them, unless told not to:
    # a library must not decide where its user's other threads run.
    if threads is not None or "TVM_NUM_THREADS" not in os.environ:
        os.environ["TVM_NUM_THREADS"] = str(threads or available_cores())
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", _SPINS)
    _load_runtime(artifact)
    _size_pool(threads)
    with unpacked(artifact, LIBRARY) as library:
        try:
            module = tvm_ffi.load_module(library)
            places: tuple[int, ...] = (_CPU, _DEVICE, _POOLED)
            if DEVICE_KERNELS in artifact.entries:
                import_kernels(module, artifact)
                places = (CUDA, _DEVICE, _POOLED, *places)
            machine = module["vm_load_executable"]()
            machine["vm_initialization"](*places)
            if DEVICE_KERNELS in artifact.entries:  # constants go by the default stream, which ours does not wait for
                cuda().call("cudaDeviceSynchronize")
        except ArtifactError:
            raise
        except Exception as error:
            raise ArtifactError(
                f"its library cannot be loaded: {_first_line(error)}",
                where=str(artifact.path),
                hint="if the temporary folder forbids programs (noexec), set TMPDIR to one that does not",
            ) from error
    return machine


def pool_size() -> int:
    """Threads that run kernels called from this thread."""
    return int(tvm_ffi.get_global_func("runtime.NumThreads")())


def _size_pool(threads: int | None) -> None:
    if threads is None:
        return
    tvm_ffi.get_global_func("runtime.config_threadpool")(_ALL_SIZES, threads)
    if pool_size() != threads:
        raise OptionError(
            f"threads is {threads}, but this process has started its pool of {pool_size()} already",
            hint="set TVM_NUM_THREADS before the first model is compiled or loaded",
        )


def _load_runtime(artifact: Artifact) -> None:
    """Loads libtvm_runtime of the artifact's version: the installed one, or the artifact's own."""
    global _loaded_version
    manifest, where = artifact.manifest, str(artifact.path)
    installed = installed_version()
    install = f"pip install apache-tvm=={manifest.tvm} apache-tvm-ffi=={manifest.tvm_ffi}"
    if tvm_ffi.__version__ != manifest.tvm_ffi:
        raise ArtifactError(
            f"was built with apache-tvm-ffi {manifest.tvm_ffi}; this environment has {tvm_ffi.__version__}",
            where=where,
            hint=install,
        )
    present = tvm_ffi.get_global_func("vm.builtin.match_shape", allow_missing=True) is not None
    version = (_loaded_version or installed) if present else None
    if version is not None and version != manifest.tvm:
        raise ArtifactError(
            f"was built with TVM {manifest.tvm}; this process runs TVM {version}", where=where, hint=install
        )
    if present:
        return
    if (library := installed_library(_runtime_library, manifest.tvm)) is not None:
        _open_shared(library)
    elif _runtime_library in artifact.entries:
        with unpacked(artifact, _runtime_library) as own:
            _open_shared(own)
    else:
        found = f"this environment has {installed}" if installed else "it is not installed"
        raise ArtifactError(
            f"needs TVM's runtime library {manifest.tvm}, and {found}",
            where=where,
            hint=f"{install}, or compile the model with its runtime included",
        )
    _loaded_version = manifest.tvm


def _open_shared(library: Path) -> None:
    try:
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise ArtifactError(f"TVM's runtime library cannot be loaded: {error}", where=str(library)) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
