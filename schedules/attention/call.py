"""One call of the attention kernel as its body sees it: operands, sizes, and which keys a row of queries sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmc.schedules.attention.layout import BLOCK, span
from llmc.schedules.attention.workloads import AttentionWorkload
from llmc.targets.intrinsics import Simd
from llmc.tvm_shim import T


@dataclass(frozen=True)
class Operands:
    """What every piece of a kernel's body sees of its call, whatever the target: buffers, and symbolic dimensions."""

    w: AttentionWorkload
    buffers: dict[str, Any]
    symbols: dict[str, Any]

    @property
    def rows(self) -> Any:
        """Stacked rows of one key head."""
        return self.symbols["S"] * self.w.group

    def seen(self, b: Any, r: Any) -> tuple[Any, Any]:
        """First key, and one past the last, that stacked row `r` of batch `b` sees; the range may be empty.

        Neither decreases from row to row. Sinks are seen besides, and parts of the mask may hide keys of the range.
        """
        w, length = self.w, self.buffers["kv_len"][b]
        after = length - self.symbols["S"] + r // w.group + 1
        end = after if w.ordered else length
        if w.prefix:
            prefix = T.min(self.buffers["prefix_len"][b], length)
            end = T.Select(after > 0, T.max(after, prefix), T.int64(0))
        if w.key_bias or w.bias or w.documents:
            end = T.min(end, self.symbols["T"])
        begin = T.max(after - w.window, T.int64(0)) if w.window else T.int64(0)
        return begin, T.max(end, T.int64(0))

    def blocks(self, b: Any, first_row: Any, last_row: Any) -> tuple[Any, Any]:
        """First block of keys, and one past the last, that any row of a range sees; `gap` is not counted."""
        (begin, _), (_, end) = self.seen(b, first_row), self.seen(b, last_row)
        first, last = T.bind(begin // BLOCK), T.bind((end + BLOCK - 1) // BLOCK)
        return (T.int64(0), T.bind(last - self.gap(b, first_row, last_row))) if self.w.sinks else (first, last)

    def gap(self, b: Any, first_row: Any, last_row: Any) -> Any:
        """Blocks between the sinks and the window of a range of rows, which none of them sees."""
        (begin, _), (_, end) = self.seen(b, first_row), self.seen(b, last_row)
        first, last = begin // BLOCK, (end + BLOCK - 1) // BLOCK
        return T.bind(T.max(T.min(first, last) - self.sink_blocks, T.int64(0)))

    @property
    def sink_blocks(self) -> int:
        return -(-self.w.sinks // BLOCK)

    def output_at(self, b: Any, kv: Any, r: Any, column: int, n: int) -> list[Any]:
        """Index of `n` columns of stacked row `r` in q and out."""
        head = kv * self.w.group + r % self.w.group
        return [b, r // self.w.group, span(head * self.w.head_dim + column, n)]


@dataclass(frozen=True)
class Call(Operands):
    """A call on a CPU, whose vectors are `simd`'s."""

    simd: Simd
