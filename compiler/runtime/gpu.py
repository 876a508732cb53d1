"""A model's arrays on the first GPU: copies of the host's, and caches that never leave it.

Everything goes through the one stream of `llmc.runtime.cuda`, in order. The host waits where it reads a result.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import tvm_ffi

from llmc.errors import InputError
from llmc.runtime.arrays import carrier, numpy_dtype
from llmc.runtime.cuda import Cuda, cuda
from llmc.runtime.views import DeviceArray, runs, tensor_at

CUDA = 2  # DLPack's device type
_ALIGN = 256  # bytes at which the driver's allocations begin
_WINDOW = 16 << 20  # bytes of pinned memory through which large arrays go


class GpuStage:
    """Copies in pinned memory, next to each other, go to the device at once."""

    def __init__(self, cuda: Cuda, arrays: Sequence[np.ndarray]) -> None:
        starts = np.cumsum([0] + [-(-array.nbytes // _ALIGN) * _ALIGN for array in arrays]).tolist()
        self._cuda, self._arrays, self._size = cuda, list(arrays), starts[-1]
        self._pinned = cuda.pinned(self._size)
        self._device = _allocate(self._size)
        self._copies = [
            self._pinned[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
            for start, array in zip(starts, arrays, strict=False)
        ]
        first = int(self._device.data_ptr())
        self.tensors = [
            tensor_at(first + start, carrier(array.dtype), array.shape, CUDA)
            for start, array in zip(starts, arrays, strict=False)
        ]

    def send(self) -> None:
        """The call before this one has been waited for, or its copies would be overwritten under way."""
        for copy, array in zip(self._copies, self._arrays, strict=True):
            copy[...] = array
        self._cuda.copy(self._device.data_ptr(), self._pinned.ctypes.data, self._size)


class GpuMemory:
    """The first GPU's."""

    on_device = True

    def __init__(self) -> None:
        self.cuda, self.graphs = cuda(), True
        self._window, self._lock = self.cuda.pinned(_WINDOW), threading.Lock()

    def put(self, array: np.ndarray) -> Any:
        whole = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        tensor = _allocate(array.shape, carrier(array.dtype))
        for start in range(0, whole.size, _WINDOW):
            piece = whole[start : start + _WINDOW]
            with self._lock:
                self._window[: piece.size] = piece
                self.cuda.copy(tensor.data_ptr() + start, self._window.ctypes.data, piece.size)
                self.cuda.synchronize()
        return tensor

    def get(self, tensor: Any, dtype: str) -> np.ndarray:
        array = np.empty(tuple(tensor.shape), numpy_dtype(dtype or str(tensor.dtype)))
        bytes_ = array.reshape(-1).view(np.uint8)
        for start in range(0, bytes_.size, _WINDOW):
            piece = bytes_[start : start + _WINDOW]
            with self._lock:
                self.cuda.copy(self._window.ctypes.data, tensor.data_ptr() + start, piece.size)
                self.cuda.synchronize()
                piece[...] = self._window[: piece.size]
        return array

    def bound(self, code: Any) -> Callable[..., Any]:
        return lambda *arguments: self.run_on(self.cuda.stream, code, arguments)

    def run_on(self, stream: int, code: Any, arguments: tuple[Any, ...]) -> Any:
        """Call compiled code, whose launches go to a stream."""
        with tvm_ffi.use_raw_stream(tvm_ffi.device(CUDA, 0), stream):
            return code(*arguments)

    def demand(self, size: int, what: str) -> None:
        free = self.cuda.free_memory()
        if size > free:
            raise InputError(
                f"{size / 1e6:.0f} MB are needed for {what}, and the GPU has {free / 1e6:.0f} MB left",
                hint="close other sessions and programs that use it, or keep fewer tokens",
            )

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype) -> DeviceArray:
        owner = _allocate(math.prod(shape) * dtype.itemsize)
        array = DeviceArray.of(owner, shape, dtype)
        self.clear(array)
        return array

    def tensor(self, array: DeviceArray) -> Any:
        return tensor_at(array.address, carrier(array.dtype), array.shape, CUDA)

    def copy(self, target: DeviceArray, source: DeviceArray) -> None:
        if target.overlaps(source):  # then it goes through other memory
            between = DeviceArray.of(_allocate(source.nbytes), source.shape, source.dtype)
            self._copy(between, source)
            source = between
        self._copy(target, source)

    def _copy(self, target: DeviceArray, source: DeviceArray) -> None:
        for (to, at), size in runs(target, source):
            self.cuda.copy(to, at, size)

    def clear(self, array: DeviceArray) -> None:
        for (to,), size in runs(array):
            self.cuda.clear(to, size)

    @contextmanager
    def edit(self, views: Sequence[DeviceArray]) -> Iterator[list[np.ndarray]]:
        arrays = [np.empty(view.shape, view.dtype) for view in views]
        self._move(views, arrays, down=True)
        yield arrays
        self._move(views, arrays, down=False)

    @contextmanager
    def edit_rows(
        self, arrays: Sequence[DeviceArray], numbers: np.ndarray
    ) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
        rows, places = np.unique(numbers, return_inverse=True)
        copies = [np.empty((len(rows), *array.shape[1:]), array.dtype) for array in arrays]
        views = [array[int(row)] for array in arrays for row in rows]
        parts = [part for copy in copies for part in copy]
        self._move(views, parts, down=True)
        yield copies, places
        self._move(views, parts, down=False)

    def _move(self, views: Sequence[DeviceArray], arrays: Sequence[np.ndarray], *, down: bool) -> None:
        """Between views and arrays of the host, which are waited for."""
        for view, array in zip(views, arrays, strict=True):
            at = array.ctypes.data
            for (there,), size in runs(view):
                self.cuda.copy(*((at, there) if down else (there, at)), size)
                at += size
        self.cuda.synchronize()

    def stage(self, arrays: Sequence[np.ndarray]) -> GpuStage:
        return GpuStage(self.cuda, arrays)


@cache
def gpu_memory() -> GpuMemory:
    return GpuMemory()


def _allocate(shape: int | tuple[int, ...], dtype: str = "uint8") -> Any:
    """A new tensor of the runtime's on the device; it is given back with its last reference."""
    sizes = (max(shape, 1),) if isinstance(shape, int) else shape
    allocate = tvm_ffi.get_global_func("runtime.TVMTensorAllocWithScope")
    return allocate(tvm_ffi.Shape(sizes), tvm_ffi.dtype(dtype), tvm_ffi.device(CUDA, 0), None)
