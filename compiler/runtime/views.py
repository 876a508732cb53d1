"""Arrays in a device's memory, as far as caches index them, and the runtime's tensors of parts of them."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import tvm_ffi

Key = int | slice


@dataclass(frozen=True)
class DeviceArray:
    """A view of a device's memory: `strides` in bytes, as numpy's are. `owner` keeps the memory alive."""

    owner: Any
    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype

    @staticmethod
    def of(owner: Any, shape: tuple[int, ...], dtype: np.dtype) -> DeviceArray:
        """All of a tensor's bytes."""
        strides = [math.prod(shape[axis + 1 :]) * dtype.itemsize for axis in range(len(shape))]
        return DeviceArray(owner, int(owner.data_ptr()), shape, tuple(strides), dtype)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def end(self) -> int:
        """The address behind its last element."""
        return (
            self.address
            + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
            + self.dtype.itemsize
        )

    def overlaps(self, other: DeviceArray) -> bool:
        return self.address < other.end and other.address < self.end

    def __getitem__(self, key: Key | tuple[Key, ...]) -> DeviceArray:
        """Of the first dimensions a place, or a range without steps."""
        keys = key if isinstance(key, tuple) else (key,)
        address, shape, strides = self.address, list[int](), list[int]()
        for part, size, stride in zip(keys, self.shape, self.strides, strict=False):
            if isinstance(part, slice):
                first, last, _ = part.indices(size)
                shape.append(max(last - first, 0))
                strides.append(stride)
            else:
                first = range(size)[part]
            address += first * stride
        rest = len(keys)
        whole = (*shape, *self.shape[rest:]), (*strides, *self.strides[rest:])
        return replace(self, address=address, shape=whole[0], strides=whole[1])


def runs(*views: DeviceArray) -> Iterator[tuple[tuple[int, ...], int]]:
    """The addresses in each view, all of one shape, of elements that lie side by side in all of them; and bytes."""
    first = views[0]
    if not first.nbytes:
        return
    assert all(view.shape == first.shape for view in views)
    axis, size = first.ndim, first.dtype.itemsize
    while axis and all(view.strides[axis - 1] == size for view in views):
        axis -= 1
        size *= first.shape[axis]
    for place in itertools.product(*map(range, first.shape[:axis])):
        yield tuple(v.address + sum(map(int.__mul__, place, v.strides)) for v in views), size


class _Managed(ctypes.Structure):
    """DLPack's DLManagedTensor."""

    _fields_ = (
        *(("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32)),
        *(("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)),
        *(("shape", ctypes.c_void_p), ("strides", ctypes.c_void_p), ("byte_offset", ctypes.c_uint64)),
        *(("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)),
    )


@cache
def _c_library() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    library.malloc.restype = ctypes.c_void_p
    return library


def tensor_at(address: int, dtype: str, shape: tuple[int, ...], device_type: int) -> Any:
    """The runtime's tensor of elements side by side at an address, which must outlive it.

    A view of TVM's own says with an offset where it begins, which compiled code does not look at.
    """
    c = _c_library()
    place = c.malloc(ctypes.c_size_t(ctypes.sizeof(_Managed) + 8 * len(shape)))
    sizes = place + ctypes.sizeof(_Managed)
    (ctypes.c_int64 * len(shape)).from_address(sizes)[:] = list(shape)
    type_ = tvm_ffi.dtype(dtype)
    tensor = _Managed.from_address(place)
    tensor.data, tensor.device_type, tensor.device_id, tensor.ndim = address, device_type, 0, len(shape)
    tensor.code, tensor.bits, tensor.lanes = int(type_.type_code), type_.bits, type_.lanes
    tensor.shape, tensor.strides, tensor.byte_offset, tensor.context = sizes, None, 0, None
    tensor.deleter = ctypes.cast(c.free, ctypes.c_void_p).value  # one piece of the C library's memory, and no Python
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return tvm_ffi.from_dlpack(capsule(place, b"dltensor", None))
