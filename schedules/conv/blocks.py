"""What kernels over images share: how a row of pixels is cut into blocks, and buffers as plain runs of floats.

A body addresses a buffer by one number that is computed once, plus constants. TVM's simplifier must not see how it is
computed: it would put those divisions and sizes of run time in place of the number wherever it stands, and reason about
them for seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from llmc.targets.intrinsics import Opaque
from llmc.tvm_shim import T


@dataclass(frozen=True)
class Row:
    """`width` pixels in `count` blocks; `lengths` are those that a block can have, largest first.

    A width that is known is cut into nearly equal blocks. Of one that is not, all blocks are of the greatest length
    that fits, and the last is moved back: some pixels are computed twice, to the same values, which costs less than
    a body for each remainder would take to compile.
    """

    width: Any
    count: Any
    lengths: tuple[int, ...]
    length: Any  # of all blocks, where the width is not known

    def each(self, opaque: Opaque, body: Callable[[Any, int], None]) -> None:
        """body(first pixel, length) for all blocks, one after another."""

        def loop(lengths: tuple[int, ...]) -> None:
            with T.serial(0, self.count) as i:
                first, length = self.block(i, opaque)
                choose(length, lengths, lambda n: body(first, n))

        if self.length is None:
            loop(self.lengths)
        else:  # chosen once, not in the loop: LLVM would take the loop apart for each length, over and over
            choose(self.length, self.lengths, lambda n: loop((n,)))

    def block(self, i: Any, opaque: Opaque) -> tuple[Any, Any]:
        """(first pixel, length) of block `i`."""
        if self.length is not None:
            return opaque(T.min(i * self.length, self.width - self.length)), self.length
        first = opaque(T.floordiv(i * self.width, self.count))
        return first, opaque(T.floordiv((i + 1) * self.width, self.count) - first)


def choose(value: Any, known: Sequence[int], body: Callable[[int], None]) -> None:
    """body(value) with the value known: one of `known`."""
    if len(known) == 1:
        body(known[0])
        return
    with T.If(value == known[0]):
        with T.Then():
            body(known[0])
        with T.Else():
            choose(value, known[1:], body)


def flat(buffer: Any) -> Any:
    """The same memory as one dimension."""
    size = reduce(lambda a, b: a * b, buffer.shape)
    return T.decl_buffer((size,), buffer.dtype, data=buffer.data)


def cut(width: Any, longest: int, opaque: Opaque) -> Row:
    """`width`: an int, or a TVM expression of at least 1; `longest` pixels make the longest block."""
    if isinstance(width, int):
        count = -(-width // longest)
        lengths = {width // count, -(-width // count)}
        return Row(width, count, tuple(sorted(lengths, reverse=True)), None)
    lengths_ = (longest, *(1 << p for p in reversed(range(6)) if 1 << p < longest))
    length: Any = T.int64(1)
    for shorter in reversed(lengths_[:-1]):
        length = T.Select(width >= shorter, T.int64(shorter), length)
    length = opaque(length)
    return Row(width, T.bind(T.floordiv(width + length - 1, length)), lengths_, length)
