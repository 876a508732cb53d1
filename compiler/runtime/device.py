"""Running on an NVIDIA GPU: the driver is found, kernels are loaded, arrays are moved. Not run on hardware yet.

Weights are copied to the device once. Every call copies its inputs there and its outputs back; what lies between stays.
All of it goes through the one default stream, whose order is that of the calls.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tvm_ffi

from llmc.errors import ArtifactError
from llmc.package.device import device_kernels
from llmc.package.layout import DEVICE, DEVICE_KERNELS
from llmc.package.reader import Artifact
from llmc.runtime.arrays import aligned, carrier, numpy_dtype, to_numpy, to_tensor

CUDA = 2  # DLPack's device type
_MAJOR, _MINOR = 75, 76  # the driver's names of the two halves of a compute capability
_DRIVER = "libcuda.so.1"
_RUNTIME = "libtvm_runtime_cuda.so"


class Memory(Protocol):
    """Where a model's arrays lie."""

    def put(self, array: np.ndarray) -> Any:
        """The runtime's tensor of an array."""

    def get(self, tensor: Any, dtype: str) -> np.ndarray:
        """The array of a tensor, whose elements are of `dtype`."""


class HostMemory:
    """Tensors share the arrays' memory."""

    def put(self, array: np.ndarray) -> Any:
        return to_tensor(aligned(array))

    def get(self, tensor: Any, dtype: str) -> np.ndarray:
        return to_numpy(tensor, dtype)


class GpuMemory:
    """Tensors are copies on the first GPU."""

    def put(self, array: np.ndarray) -> Any:
        allocate = tvm_ffi.get_global_func("runtime.TVMTensorAllocWithScope")
        device = tvm_ffi.device(CUDA, 0)
        tensor = allocate(tvm_ffi.Shape(array.shape), tvm_ffi.dtype(carrier(array.dtype)), device, None)
        if array.nbytes:
            whole = np.ascontiguousarray(array)
            copy = tvm_ffi.get_global_func("runtime.TVMTensorCopyFromBytes")
            copy(tensor, ctypes.c_void_p(whole.ctypes.data), whole.nbytes)
        return tensor

    def get(self, tensor: Any, dtype: str) -> np.ndarray:
        array = np.empty(tuple(tensor.shape), numpy_dtype(dtype))
        if array.nbytes:
            copy = tvm_ffi.get_global_func("runtime.TVMTensorCopyToBytes")
            copy(tensor, ctypes.c_void_p(array.ctypes.data), math.prod(array.shape) * array.itemsize)
        return array


HOST = HostMemory()


def memory_of(artifact: Artifact) -> Memory:
    """Where the arrays of an artifact's functions lie."""
    return GpuMemory() if DEVICE_KERNELS in artifact.entries else HOST


def check_gpu(artifact: Artifact) -> None:
    """Raises ArtifactError if the artifact was compiled for a GPU, and this machine has none that runs it."""
    if DEVICE_KERNELS not in artifact.entries:
        return
    target, where = artifact.manifest.target, str(artifact.path)
    needs = f"was compiled for {target.name} and needs an NVIDIA GPU of {target.mcpu} or later"
    hint = "load it on a machine with such a GPU; here `llmc inspect --kernels` shows what is in it, and `llmc compile "
    hint += "--target native` makes code for this CPU"
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        raise ArtifactError(f"{needs}; this machine has no NVIDIA driver ({_DRIVER})", where=where, hint=hint) from None
    major, minor, device = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if code := driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        raise ArtifactError(f"{needs}; the driver finds none (its error {code})", where=where, hint=hint)
    driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    if 10 * major.value + minor.value < int(target.mcpu.removeprefix("sm_")):
        raise ArtifactError(f"{needs}; this machine's is sm_{major.value}{minor.value}", where=where, hint=hint)


def import_kernels(library: Any, artifact: Artifact) -> None:
    """Makes the artifact's kernels part of its library, whose host code calls them by name.

    Raises ArtifactError where TVM's runtime for CUDA is not installed.
    """
    _load_cuda_runtime(str(artifact.path))
    load = tvm_ffi.get_global_func("ffi.Module.load_from_bytes.cuda")
    host = next(module for module in library.imports if module.kind == "library")
    for name in device_kernels(artifact):
        host.import_module(load(artifact.read(f"{DEVICE}/{name}.bin")))


@cache
def _load_cuda_runtime(where: str) -> None:
    hint = "pip install apache-tvm nvidia-cuda-runtime"
    tvm = importlib.util.find_spec("tvm")
    library = Path(tvm.origin).parent / "lib" / _RUNTIME if tvm and tvm.origin else None
    if library is None or not library.is_file():
        raise ArtifactError("needs TVM's runtime library for CUDA, which is not installed", where=where, hint=hint)
    nvidia = importlib.util.find_spec("nvidia")
    folders = nvidia.submodule_search_locations if nvidia and nvidia.submodule_search_locations else []
    for folder in folders:  # where the system has none, the library finds the one that is loaded already
        for file in sorted(Path(folder).glob("cu*/lib/libcudart.so.*")):
            ctypes.CDLL(str(file), ctypes.RTLD_GLOBAL)
    try:
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    except OSError as error:
        what = f"TVM's runtime library for CUDA cannot be loaded: {error}"
        raise ArtifactError(what, where=where, hint=hint) from error
