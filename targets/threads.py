"""Threads of a GPU behind names, for the bodies of CUDA templates: launches, barriers, sums over a block.

A body is what one thread does. Barriers stand where the body puts them (`llmc.gpu.passes` adds none), and all threads
of a block must come to each. What several expressions read is put into a `cell`: a name alone is no more than the
expression behind it, which TVM may write twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from llmc.errors import KernelError
from llmc.targets.base import Target
from llmc.tvm_shim import T

WARP = 32
_ALL_LANES = 0xFFFFFFFF


@contextlib.contextmanager
def launch(threads: int, *grid: Any) -> Iterator[tuple[Any, ...]]:
    """The body that follows is one kernel: gives the thread's number, then that of its block along x, y, z, all int64.

    `grid` are up to three sizes, which may be known at run time only; a grid of nothing is not launched.
    """
    if threads % WARP or not 0 < threads <= 1024:
        raise KernelError(f"a block of {threads} threads is not made of whole warps, or too large")
    with contextlib.ExitStack() as stack:
        blocks = [stack.enter_context(T.launch_thread(f"blockIdx.{a}", n)) for a, n in zip("xyz", grid, strict=False)]
        thread = stack.enter_context(T.launch_thread("threadIdx.x", threads))
        # With a least number of blocks the compiler gives threads what they need, and does not spill for more blocks.
        stack.enter_context(T.attr(0, "tirx.launch_bounds_min_blocks_per_sm", 1))
        yield tuple(T.Cast("int64", index) for index in (thread, *blocks))


def barrier() -> None:
    """No thread of a block goes on before all have come here; what they wrote to shared memory is then seen by all."""
    T.evaluate(T.tvm_storage_sync("shared"))


def warp_barrier() -> None:
    """No lane of a warp goes on before all have come here; what they wrote to shared memory is then seen by all."""
    T.evaluate(T.cuda.warp_sync())


def shuffled(value: Any, distance: int) -> Any:
    """The value of the lane whose number differs in the bit `distance`. All lanes of the warp come here."""
    return Cell(T.tvm_warp_shuffle_xor(T.uint32(_ALL_LANES), value, distance, WARP, WARP)).v


def shared(shape: tuple[int, ...], dtype: str = "float32") -> Any:
    """Memory of a block, with undefined content."""
    return T.alloc_buffer(shape, dtype, scope="shared")


class Cell:
    """A variable of one thread."""

    def __init__(self, value: Any, dtype: str = "float32") -> None:
        self.buffer = T.alloc_buffer((1,), dtype, scope="local")
        self.v = value

    @property
    def v(self) -> Any:
        return self.buffer[0]

    @v.setter
    def v(self, value: Any) -> None:
        T.buffer_store(self.buffer, value, [0])


@contextlib.contextmanager
def strided(count: Any, thread: Any, threads: int, unroll: int | None = None) -> Iterator[Any]:
    """The numbers thread, thread + threads, … below `count`: what one thread does of a row that a block shares.

    The body must have no barrier: threads may differ in how often they run it. `unroll` is how many steps the compiler
    may write out: as many as their loads find registers.
    """
    steps = -(-count // threads) if isinstance(count, int) else T.floordiv(count + (threads - 1), T.int64(threads))
    with T.serial(0, steps, unroll=unroll) as step:
        i = T.bind(T.Cast("int64", step) * threads + thread)
        if isinstance(count, int) and count % threads == 0:
            yield i
        else:
            with T.If(i < count), T.Then():
                yield i


class BlockReduction:
    """Reductions over all threads of a block. Each call has shared memory of its own, so that one barrier is enough.

    A call inside of a loop needs one more between its result and the next round's call.
    """

    def __init__(self, thread: Any, threads: int) -> None:
        self.thread, self.warps = thread, threads // WARP

    def sum(self, value: Any) -> Cell:
        """The sum of every thread's float32, the same for all."""
        return self._reduce(value, lambda a, b: a + b)

    def max(self, value: Any) -> Cell:
        return self._reduce(value, T.max)

    def _reduce(self, value: Any, combine: Callable[[Any, Any], Any]) -> Cell:
        total = Cell(value)
        warp_reduce(total, combine)
        if self.warps == 1:
            return total
        parts = shared((self.warps,))
        with T.If(self.thread % WARP == 0), T.Then():
            T.buffer_store(parts, total.v, [T.floordiv(self.thread, T.int64(WARP))])
        barrier()
        total.v = parts[0]
        for warp in range(1, self.warps):
            total.v = combine(total.v, parts[warp])
        return total


def warp_reduce(total: Cell, combine: Callable[[Any, Any], Any]) -> None:
    """total := the reduction over the warp, the same in all lanes."""
    other = Cell(total.v)
    for distance in (16, 8, 4, 2, 1):
        other.v = T.tvm_warp_shuffle_xor(T.uint32(_ALL_LANES), total.v, distance, WARP, WARP)
        total.v = combine(total.v, other.v)


class Scalar:
    """The arithmetic of `llmc.targets.intrinsics.Simd` for one thread: what epilogues and masks are written in."""

    lanes = 1

    def __init__(self, target: Target) -> None:
        self.target = target

    def f32(self, x: float, n: int | None = None) -> Any:
        return T.float32(x)

    def fma(self, a: Any, b: Any, c: Any, n: int | None = None) -> Any:
        return a * b + c  # which the compiler contracts

    def sigmoid(self, x: Any) -> Any:
        return T.float32(1) / (T.float32(1) + T.exp(-x))

    def tanh(self, x: Any) -> Any:
        return T.tanh(x)

    def erf(self, x: Any) -> Any:
        return T.erf(x)
