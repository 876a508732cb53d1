"""Between numpy arrays and the runtime's tensors: aligned memory, shared and never copied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import tvm_ffi

from llmc.package.manifest import WorkspaceSpec

ALIGN = 64  # kernels use aligned vector loads and stores on every buffer


def numpy_dtype(name: str) -> np.dtype:
    """The numpy dtype of a manifest's dtype; bfloat16 and the 8-bit floats need the ml_dtypes package."""
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))


def carrier(dtype: np.dtype) -> str:
    """The type that compiled code gives an array's elements: uint8 where it knows their bits alone, as of all types of
    a byte or less that numpy itself does not have."""
    return dtype.name if dtype.itemsize > 1 or dtype.type.__module__ == "numpy" else "uint8"


def aligned_zeros(shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
    """Zeros at a 64-byte boundary. Large ones come zeroed from the kernel and cost memory only where written."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + ALIGN, np.uint8)
    start = -_address(memory) % ALIGN
    return memory[start : start + size].view(dtype).reshape(shape)


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])  # an array's `ctypes` takes several times as long


def workspaces(specs: Sequence[WorkspaceSpec]) -> list[np.ndarray]:
    """Memory as a function wants it: arrays that overlap where they name the same storage."""
    sizes: dict[int, int] = {}
    for spec in specs:
        end = spec.offset + math.prod(spec.shape) * numpy_dtype(spec.dtype).itemsize
        sizes[spec.storage] = max(sizes.get(spec.storage, 0), end)
    storages = {number: aligned_zeros((size,), np.uint8) for number, size in sizes.items()}
    arrays = []
    for spec in specs:
        dtype = numpy_dtype(spec.dtype)
        bytes_ = storages[spec.storage][spec.offset : spec.offset + math.prod(spec.shape) * dtype.itemsize]
        arrays.append(bytes_.view(dtype).reshape(spec.shape))
    return arrays


def aligned(array: np.ndarray) -> np.ndarray:
    """`array` itself if a kernel can read it in place, otherwise a contiguous, aligned, writable copy."""
    if array.flags.c_contiguous and array.flags.writeable and _address(array) % ALIGN == 0:
        return array
    copy = aligned_zeros(array.shape, array.dtype)
    copy[...] = array
    return copy


def view(memory: Any, dtype: str, shape: tuple[int, ...]) -> Any:
    """The tensor `memory` seen with another dtype and shape; keeps it alive."""
    create = tvm_ffi.get_global_func("runtime.TVMTensorCreateView")
    return create(memory, tvm_ffi.Shape(shape), tvm_ffi.dtype(dtype), 0)


def to_tensor(array: np.ndarray) -> Any:
    """A tensor that shares the memory of a contiguous, writable array of any dtype."""
    if array.size == 0:  # numpy gives empty arrays strides of 0, which kernels refuse as not compact
        return view(tvm_ffi.from_dlpack(aligned_zeros((ALIGN,), np.uint8)), carrier(array.dtype), array.shape)
    if array.dtype.isbuiltin == 1:
        return tvm_ffi.from_dlpack(array)
    return view(tvm_ffi.from_dlpack(array.reshape(-1).view(np.uint8)), carrier(array.dtype), array.shape)


def to_numpy(tensor: Any, dtype: str = "") -> np.ndarray:
    """An array that shares the memory of a tensor of any dtype; `dtype` is that of what the tensor's bytes carry."""
    try:
        array = np.from_dlpack(tensor)
        return array.view(numpy_dtype(dtype)) if dtype and array.dtype != numpy_dtype(dtype) else array
    except (BufferError, RuntimeError):  # a dtype that numpy does not know
        shape, element = tuple(tensor.shape), numpy_dtype(str(tensor.dtype))
        raw = np.from_dlpack(view(tensor, "uint8", (math.prod(shape) * element.itemsize,)))
        return raw.view(element).reshape(shape)
