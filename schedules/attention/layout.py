"""The key cache's layout, and what the bodies of all attention kernels share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from llmc.schedules.base import Arg
from llmc.targets.intrinsics import Simd
from llmc.tvm_shim import T

BLOCK = 64  # keys that lie side by side in the packed cache, whatever the target: caches outlive kernels


def pack_keys(k: np.ndarray) -> np.ndarray:
    """[B, KV, L, D] -> [B, KV, ceil(L/64), D, 64], padded with zeros: what a cache append writes."""
    B, KV, L, D = k.shape
    padded = np.pad(k, ((0, 0), (0, 0), (0, -L % BLOCK), (0, 0)))
    return np.ascontiguousarray(padded.reshape(B, KV, -1, BLOCK, D).swapaxes(3, 4))


def vectors(n: int, lanes: int) -> tuple[int, list[int]]:
    """Width and first columns of the vectors that cover `n` columns.

    Where the width does not divide `n` the last vector overlaps the one before: the same values are computed twice,
    and no load or store leaves the row.
    """
    if n == 0:
        return 1, []
    width = min(lanes, 1 << (n.bit_length() - 1))
    starts = list(range(0, n - width + 1, width))
    return width, starts + ([n - width] if n % width else [])


def span(start: Any, n: int, stride: int = 1) -> Any:
    """Index of `n` elements from `start`; TVM has no vectors of one element."""
    return start if n == 1 else T.ramp(start, stride, n)


def parameters(args: Iterable[Arg]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Declare a kernel's parameters: (buffers by argument name, symbolic dimensions by symbol name)."""
    args = tuple(args)
    handles = [T.arg(arg.name, T.handle()) for arg in args]
    symbols: dict[str, Any] = {}
    for arg in args:
        symbols.update({d: T.int64() for d in arg.shape if isinstance(d, str) and d not in symbols})
    shapes = [tuple(symbols[d] if isinstance(d, str) else d for d in arg.shape) for arg in args]
    buffers = {a.name: T.match_buffer(h, s, a.dtype) for a, h, s in zip(args, handles, shapes, strict=True)}
    return buffers, symbols


def fill(simd: Simd, buffer: Any, value: float, size: int) -> None:
    """Set the `size` elements of a one-dimensional scratch buffer; `size` is a multiple of the lanes."""
    with T.serial(0, size // simd.lanes) as i:
        T.buffer_store(buffer, simd.f32(value), [simd.span(i * simd.lanes)])


def distribute(tasks: Any, serial: Any, body: Callable[[Any], None]) -> None:
    """Run `body(task)` for all tasks: on one thread where the condition `serial` holds, else on all.

    Waking the other threads costs about a microsecond, and far more where one of them has lost its core.
    """
    with T.If(serial):
        with T.Then():
            with T.serial(0, tasks) as task:
                body(task)
        with T.Else():
            with T.parallel(0, tasks) as task:
                body(task)


def size_in_bytes(args: Iterable[Arg], dims: Mapping[str, int]) -> int:
    """Bytes of buffers of these shapes, symbols bound to `dims`."""

    def size(arg: Arg) -> int:
        count = np.prod([dims[d] if isinstance(d, str) else d for d in arg.shape])
        return int(count) * np.dtype(arg.dtype).itemsize

    return sum(map(size, args))
