"""Runs CUDA C on the CPU and judges it: a functional emulator of one GPU, without any claim on time or rounding.

    emulator = Emulator(source)
    emulator.launch("kernel", grid, block, [a, b, out, 128], shared_bytes, seed=1)

Threads of a block are fibers that run in an order drawn from `seed`, and every access to memory is checked: what lies
outside of the arrays, shared memory that was never written, asynchronous copies that were not waited for, and accesses
of two threads that nothing orders (no barrier in between, or none that both came to) end the launch with
`EmulationError`. No order of threads has to show a race for it to be found. What is emulated, and where that is
stricter or weaker than hardware, stands in README.md.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmc.emulator.build import build, compiler
from llmc.emulator.translate import Parameter, translate

__all__ = ["EmulationError", "Emulator", "available", "poisoned"]

SCALARS: dict[str, type[ctypes._SimpleCData[Any]]] = {
    "int": ctypes.c_int32, "int32_t": ctypes.c_int32, "uint": ctypes.c_uint32, "uint32_t": ctypes.c_uint32,
    "unsigned int": ctypes.c_uint32, "unsigned": ctypes.c_uint32, "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
    "long long": ctypes.c_int64, "float": ctypes.c_float, "double": ctypes.c_double, "bool": ctypes.c_bool,
    "int16_t": ctypes.c_int16, "int8_t": ctypes.c_int8, "uint8_t": ctypes.c_uint8, "uint16_t": ctypes.c_uint16,
}  # fmt: skip
_ALIGNMENT = 256  # of what cudaMalloc gives


class EmulationError(Exception):
    """A kernel did what it must not: which thread, what, where."""


class _Launch(ctypes.Structure):
    _fields_ = [
        ("entry", ctypes.c_void_p),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("dynamic_bytes", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("max_threads", ctypes.c_int),
        ("buffers", ctypes.POINTER(ctypes.c_uint64)),
        ("buffer_count", ctypes.c_int),
        ("name", ctypes.c_char_p),
        ("describe", ctypes.c_void_p),
    ]


def available() -> bool:
    """There is a compiler that the emulator can use."""
    return compiler() is not None


def poisoned(shape: int | Sequence[int], dtype: Any) -> np.ndarray:
    """An array for a kernel to write: NaN, or all bits set, until then."""
    array = np.empty(shape, dtype)
    array.reshape(-1).view(np.uint8)[:] = 0xFF
    return array


class Emulator:
    """The kernels of one CUDA C source. Raises TranslationError, BuildError for what cannot be emulated."""

    def __init__(self, source: str) -> None:
        code, self.kernels = translate(source)
        self._path = build(code)
        self.library = ctypes.CDLL(str(self._path))

    def launch(
        self,
        kernel: str,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[Any],
        shared_bytes: int = 0,
        seed: int = 0,
    ) -> None:
        """Run `kernel` on a grid of blocks, (x, y, z) each or less; `shared_bytes` of dynamic shared memory.

        `args`: an array for each pointer (written in place; given twice, it is one memory), numbers for scalars.
        Raises EmulationError.
        """
        entry = self.kernels[kernel]
        if len(args) != len(entry.parameters):
            raise TypeError(f"{kernel} takes {len(entry.parameters)} arguments, not {len(args)}")
        buffers: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        cells = [self._argument(p, value, buffers) for p, value in zip(entry.parameters, args, strict=True)]
        arguments = (ctypes.c_void_p * len(cells))(*(ctypes.addressof(cell) for cell in cells))
        extents = [n for _, copy in buffers.values() for n in (copy.ctypes.data, copy.nbytes)]
        launch = _Launch(
            ctypes.cast(self.library[f"emu_entry_{kernel}"], ctypes.c_void_p),
            ctypes.cast(arguments, ctypes.POINTER(ctypes.c_void_p)),
            (ctypes.c_uint * 3)(*grid, *[1] * (3 - len(grid))),
            (ctypes.c_uint * 3)(*block, *[1] * (3 - len(block))),
            shared_bytes,
            seed,
            entry.max_threads,
            (ctypes.c_uint64 * max(len(extents), 2))(*extents),
            max(len(buffers), 1),  # a kernel without buffers may touch none
            kernel.encode(),
        )
        error = ctypes.create_string_buffer(4096)
        failed = self.library.emu_launch(ctypes.byref(launch), error, ctypes.c_size_t(len(error)))
        for array, copy in buffers.values():
            if array.flags.writeable:
                array[...] = copy.reshape(array.shape)
        if failed:
            raise EmulationError(with_line(error.value.decode(), self._path))

    def _argument(self, parameter: Parameter, value: Any, buffers: dict[int, tuple[np.ndarray, np.ndarray]]) -> Any:
        if not parameter.pointer:
            return SCALARS[parameter.type](value)
        if not isinstance(value, np.ndarray):
            raise TypeError(f"{parameter.name} is a pointer and needs an array, not {type(value).__name__}")
        if id(value) not in buffers:
            buffers[id(value)] = value, _aligned(value)
        return ctypes.c_uint64(buffers[id(value)][1].ctypes.data)


def with_line(message: str, library: Path) -> str:
    """The message with the line of CUDA C in place of an address in the library of a kernel."""
    match = re.search(r" \[at (0x[0-9a-f]+)\]", message)
    if not match or not (base := _base(library, int(match[1], 16))):
        return message
    place = subprocess.run(
        ["addr2line", "-i", "-e", str(library), hex(int(match[1], 16) - base - 1)],
        capture_output=True,
        text=True,
    ).stdout
    lines = re.findall(r"kernel\.(?:cu|cpp):(\d+)", place)
    return message.replace(match[0], f" (line {lines[-1]})" if lines else "")


def _aligned(array: np.ndarray) -> np.ndarray:
    """A contiguous copy that begins where an allocation on a GPU may."""
    room = np.empty(array.nbytes + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    copy = room[start : start + array.nbytes].view(array.dtype)
    copy[...] = array.reshape(-1)
    return copy


def _base(library: Path, address: int) -> int:
    """Where a library was loaded, if the address is in it; else 0."""
    lines = [x for x in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines() if x.endswith(str(library))]
    if not lines:
        return 0
    begin, end = (int(x, 16) for x in (lines[0].partition("-")[0], lines[-1].partition("-")[2].partition(" ")[0]))
    return begin if begin <= address < end else 0
