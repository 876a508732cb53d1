"""Before anything runs on an NVIDIA GPU: the driver is found, and kernels are loaded. Not run on hardware yet."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path
from typing import Any

import tvm_ffi

from llmc.errors import ArtifactError
from llmc.package.device import device_kernels
from llmc.package.layout import DEVICE, DEVICE_KERNELS, RUNTIME_CUDA
from llmc.package.reader import Artifact
from llmc.runtime.caches import FIRST_CAPACITY
from llmc.runtime.cuda import LIBRARY as CUDART
from llmc.runtime.cuda import cuda
from llmc.runtime.gpu import gpu_memory
from llmc.runtime.installed import installed_library, unpacked
from llmc.runtime.memory import HOST, Memory

_MAJOR, _MINOR = 75, 76  # the driver's names of the two halves of a compute capability
_DRIVER = "libcuda.so.1"
_CUDA_VERSION = 13000  # 13.0, which the binaries, and the libraries that load them, were made for
_FIRST_DRIVER = "580"  # that knows it
_OLDEST = 80  # sm_80: the first GPUs that llmc compiles for
_INSTALL = "pip install nvidia-cuda-runtime"


def memory_of(artifact: Artifact) -> Memory:
    """Where the arrays of an artifact's functions lie."""
    return gpu_memory() if DEVICE_KERNELS in artifact.entries else HOST


def check_gpu(artifact: Artifact) -> None:
    """Raises ArtifactError if the artifact was compiled for a GPU, and this machine has none that runs it."""
    if DEVICE_KERNELS not in artifact.entries:
        return
    target, where = artifact.manifest.target, str(artifact.path)
    exact = target.mcpu.endswith("a")  # NVIDIA's mark of instructions that no later GPU has
    needs = f"was compiled for {target.name} and needs an NVIDIA GPU of {target.mcpu}{'' if exact else ' or later'}"
    hint = "load it on a machine with such a GPU; here `llmc inspect --kernels` shows what is in it, and `llmc compile "
    hint += "--target native` makes code for this CPU"
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        raise ArtifactError(f"{needs}; this machine has no NVIDIA driver ({_DRIVER})", where=where, hint=hint) from None
    version, major, minor, device = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    if version.value < _CUDA_VERSION:
        found = f"the NVIDIA driver of this machine knows CUDA {version.value // 1000}.{version.value % 1000 // 10}"
        what = f"was compiled for {target.name} with CUDA {_CUDA_VERSION // 1000}; {found} and nothing later"
        raise ArtifactError(what, where=where, hint=f"install a driver of version {_FIRST_DRIVER} or later")
    if code := driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        raise ArtifactError(f"{needs}; the driver finds none (its error {code})", where=where, hint=hint)
    driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    has, wanted = 10 * major.value + minor.value, int(target.mcpu.removeprefix("sm_").removesuffix("a"))
    if has < wanted or (exact and has != wanted):
        hint = "compile the model for it: llmc compile --target cuda" if has >= _OLDEST else hint
        raise ArtifactError(f"{needs}; this machine's is sm_{major.value}{minor.value}", where=where, hint=hint)


def import_kernels(library: Any, artifact: Artifact) -> None:
    """Makes the artifact's kernels part of its library, whose host code calls them by name.

    Raises ArtifactError where CUDA's runtime library is not installed.
    """
    if tvm_ffi.get_global_func("device_api.cuda", allow_missing=True) is None:
        _load_cuda_runtime(artifact)
    load = tvm_ffi.get_global_func("ffi.Module.load_from_bytes.cuda")
    host = next(module for module in library.imports if module.kind == "library")
    for name in device_kernels(artifact):
        host.import_module(load(artifact.read(f"{DEVICE}/{name}.bin")))


def check_room(artifact: Artifact) -> None:
    """Raises ArtifactError if the GPU has no room for the weights and the caches of a first session."""
    manifest = artifact.manifest
    weights = sum(tensor.size for tensor in artifact.tensors.values())
    parts = [f"{weights / 1e6:.0f} MB for its weights"]
    caches = 0
    if manifest.decoder is not None:
        tokens = min(FIRST_CAPACITY, manifest.decoder.max_length or FIRST_CAPACITY)
        caches = manifest.decoder.cache_bytes(tokens)
        parts.append(f"{caches / 1e6:.0f} MB for caches of {tokens} tokens")
    free = cuda().free_memory()
    if weights + caches > free:
        raise ArtifactError(
            f"needs {' and '.join(parts)}, and the GPU has {free / 1e6:.0f} MB left",
            where=str(artifact.path),
            hint="end other programs that use it, or compile the model in fewer bits: --quantize, --kv-cache",
        )


def _load_cuda_runtime(artifact: Artifact) -> None:
    """TVM's runtime for CUDA: the installed one, or the artifact's own; and before it NVIDIA's, which it needs."""
    where, manifest = str(artifact.path), artifact.manifest
    load_cudart(where)
    hint = f"pip install apache-tvm=={manifest.tvm}, or compile the model anew: its artifact then holds the library"
    try:
        if (library := installed_library(RUNTIME_CUDA, manifest.tvm)) is not None:
            ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
        elif RUNTIME_CUDA in artifact.entries:
            with unpacked(artifact, RUNTIME_CUDA) as own:
                ctypes.CDLL(str(own), ctypes.RTLD_GLOBAL)
        else:
            raise ArtifactError("needs TVM's runtime library for CUDA, which is not installed", where=where, hint=hint)
    except OSError as error:
        what = f"TVM's runtime library for CUDA cannot be loaded: {error}"
        raise ArtifactError(what, where=where, hint=hint) from error


def load_cudart(where: str) -> None:
    """The system's, or that of NVIDIA's wheel: TVM's library finds the one that is loaded already."""
    nvidia = importlib.util.find_spec("nvidia")
    folders = nvidia.submodule_search_locations if nvidia and nvidia.submodule_search_locations else []
    places = [str(file) for folder in folders for file in Path(folder).glob(f"cu*/lib/{CUDART}")]
    for place in (CUDART, *places):
        try:
            ctypes.CDLL(place, ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return
    what = f"needs NVIDIA's CUDA runtime library ({CUDART}), which is neither installed by pip nor the system's"
    raise ArtifactError(what, where=where, hint=_INSTALL)
