"""NVIDIA's CUDA runtime library, called directly: pinned memory, a stream, copies, and graphs of launches.

The library is the one that TVM's runtime for CUDA uses, so that both see the same device, its memory and its streams.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from llmc.errors import KernelError

LIBRARY = "libcudart.so.13"  # as TVM's runtime names it
_ANY_DIRECTION = 4  # cudaMemcpyDefault: the addresses say where they lie
_NON_BLOCKING = 1  # a stream that does not wait for the default one
_RELAXED = 2  # a capture during which memory may be allocated
_OUT_OF_MEMORY = 2

Pointer = ctypes.c_void_p


class Cuda:
    """The library, and the one stream on which everything of llmc's happens, in the order in which it is asked for."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(LIBRARY)
        self._library.cudaGetErrorString.restype = ctypes.c_char_p
        self.stream = self.new_stream()

    def call(self, name: str, *arguments: Any) -> None:
        """Raises KernelError with the library's words where it reports a failure."""
        if code := getattr(self._library, name)(*arguments):
            self._library.cudaGetLastError()  # or the next call that asks reports it again
            text = self._library.cudaGetErrorString(code).decode()
            hint = "close sessions, or reserve less for them" if code == _OUT_OF_MEMORY else None
            raise KernelError(f"{name} failed: {text} (error {code} of CUDA's)", hint=hint)

    def new_stream(self) -> int:
        stream = Pointer()
        self.call("cudaStreamCreateWithFlags", ctypes.byref(stream), _NON_BLOCKING)
        assert stream.value is not None
        return stream.value

    def synchronize(self) -> None:
        """Wait for all that was asked for on the stream."""
        self.call("cudaStreamSynchronize", Pointer(self.stream))

    def copy(self, target: int, source: int, size: int) -> None:
        """From address to address, wherever they lie, when its turn comes."""
        if size:
            where = Pointer(target), Pointer(source), ctypes.c_size_t(size)
            self.call("cudaMemcpyAsync", *where, _ANY_DIRECTION, Pointer(self.stream))

    def clear(self, target: int, size: int) -> None:
        if size:
            self.call("cudaMemsetAsync", Pointer(target), 0, ctypes.c_size_t(size), Pointer(self.stream))

    def free_memory(self) -> int:
        """Bytes of the device that nobody holds."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def pinned(self, size: int) -> np.ndarray:
        """Bytes of the host that the device reads and writes by itself, uint8 [size]."""
        place = Pointer()
        self.call("cudaMallocHost", ctypes.byref(place), ctypes.c_size_t(size))
        assert place.value is not None
        memory = (ctypes.c_uint8 * size).from_address(place.value)
        weakref.finalize(memory, self._library.cudaFreeHost, place).atexit = False
        return np.ctypeslib.as_array(memory)

    def capture(self, launch: Callable[[int], Any]) -> tuple[Graph, Any]:
        """What `launch` asks for on the stream that it gets, kept instead of done; and what it returns."""
        stream, graph, executable = Pointer(self.new_stream()), Pointer(), Pointer()
        try:
            self.call("cudaStreamBeginCapture", stream, _RELAXED)
            try:
                result = launch(stream.value or 0)
            except BaseException:
                self._library.cudaStreamEndCapture(stream, ctypes.byref(graph))
                self._library.cudaGetLastError()
                raise
            self.call("cudaStreamEndCapture", stream, ctypes.byref(graph))
            self.call("cudaGraphInstantiate", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        finally:
            if graph.value:
                self._library.cudaGraphDestroy(graph)
            self._library.cudaStreamDestroy(stream)
        return Graph(self, executable), result

    def launch(self, executable: Pointer) -> None:
        self.call("cudaGraphLaunch", executable, Pointer(self.stream))

    def destroy(self, executable: Pointer) -> None:
        self._library.cudaGraphExecDestroy(executable)


class Graph:
    """Launches that were captured. What they read and write must stay where it is for as long as they are replayed."""

    def __init__(self, cuda: Cuda, executable: Pointer) -> None:
        self._cuda, self._executable = cuda, executable
        weakref.finalize(self, cuda.destroy, executable).atexit = False

    def launch(self) -> None:
        self._cuda.launch(self._executable)


@cache
def cuda() -> Cuda:
    """The library; TVM's runtime has it loaded."""
    return Cuda()
