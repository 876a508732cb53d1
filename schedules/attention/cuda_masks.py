"""Which keys one row of queries sees on a GPU, and what is added to its scores: variables of one thread.

Scores are in units of log2: queries are scaled by `factor` on their way in, and exp is 2^x.
"""

from __future__ import annotations

import functools
from typing import Any

from llmc.schedules.attention.call import Operands
from llmc.schedules.attention.flash import LOG2E
from llmc.schedules.attention.layout import BLOCK
from llmc.schedules.attention.workloads import AttentionWorkload
from llmc.targets.threads import Cell
from llmc.tvm_shim import T


def factor(w: AttentionWorkload) -> float:
    """What queries are multiplied by."""
    return w.scale / w.softcap if w.softcap else w.scale * LOG2E


def changes_scores(w: AttentionWorkload) -> bool:
    """Is there more to a score than the product?"""
    return bool(w.softcap or w.key_bias or w.bias or w.alibi)


class Row:
    """Stacked row `r` of key head `kv` of sequence `b`."""

    def __init__(self, call: Operands, b: Any, kv: Any, r: Any) -> None:
        w = call.w
        self.call, self.w, self.b = call, w, b
        self._s = Cell(T.Cast("int32", T.floordiv(r, T.int64(w.group))), "int32")
        self._head = Cell(T.Cast("int32", kv * w.group + T.floormod(r, T.int64(w.group))), "int32")
        begin, end = call.seen(b, r)
        self.begin, self.end = Cell(T.Cast("int32", begin), "int32"), Cell(T.Cast("int32", end), "int32")
        length = call.buffers["kv_len"][b]
        if w.alibi or w.documents:
            self.position = Cell(T.Cast("int32", length - call.symbols["S"] + self.s), "int32")
        if w.alibi:
            self.slope = Cell(call.buffers["slopes"][self.head] * T.float32(LOG2E))
        if w.documents:
            self.document = Cell(self._number(self.position.v), "int64")
        if w.tree:
            self.oldest = Cell(T.Cast("int32", length - call.symbols["S"]), "int32")  # of the new keys
            self.bits = Cell(call.buffers["tree"][b, self.s], "uint64")

    @property
    def s(self) -> Any:
        """The query's number, int64 like all indices."""
        return T.Cast("int64", self._s.v)

    @property
    def head(self) -> Any:
        return T.Cast("int64", self._head.v)

    def seen(self, key: Any) -> Any:
        """Does the row see key `key`, an int32?"""
        w = self.w
        conditions = [key < self.end.v]
        if w.window:
            near = key >= self.begin.v
            conditions.append(T.Or(near, key < w.sinks) if w.sinks else near)
        if w.documents:
            conditions.append(self._number(key) == self.document.v)
        if w.tree:
            conditions.append(self._named(key - self.oldest.v))
        return functools.reduce(T.And, conditions)

    def seen_whole(self, key0: Any) -> Any | None:
        """Does it see all keys of the block from `key0` on? None where that takes a look at each."""
        if self.w.documents or self.w.tree:
            return None
        return T.And(self.begin.v <= key0, key0 + BLOCK <= self.end.v)

    def changed(self, score: Any, key: Any) -> Any:
        """The score of a key that the row sees after softcap and biases."""
        w, buffers = self.w, self.call.buffers
        at = T.Cast("int64", key)
        if w.softcap:
            score = T.float32(w.softcap * LOG2E) * T.tanh(score)
        if w.key_bias:
            score = score + buffers["key_bias"][self.b, at] * T.float32(LOG2E)
        if w.bias:
            full = (w.bias_batch, w.bias_heads, w.bias_rows)
            row = [i if f else T.int64(0) for i, f in zip((self.b, self.head, self.s), full, strict=True)]
            score = score + buffers["bias"][(*row, at)] * T.float32(LOG2E)
        if w.alibi:
            score = score + self.slope.v * T.Cast("float32", key - self.position.v)
        return score

    def _number(self, key: Any) -> Any:
        """The document of a key; there is one for every index."""
        last = T.Cast("int32", self.call.symbols["T"] - 1)
        return self.call.buffers["documents"][self.b, T.Cast("int64", T.max(T.min(key, last), T.int32(0)))]

    def _named(self, new: Any) -> Any:
        """Is a key old, or the `new`-th of the new ones and named by the row's bits?"""
        bit = T.Cast("uint64", T.max(T.min(new, T.int32(63)), T.int32(0)))
        mine = T.bitwise_and(T.shift_right(self.bits.v, bit), T.uint64(1))
        return T.Or(new < 0, T.And(new < 64, mine == T.uint64(1)))


class BlockRun:
    """The blocks of keys that rows `first_row` … `last_row` may see, one after the other: int32 all."""

    def __init__(self, call: Operands, b: Any, first_row: Any, last_row: Any) -> None:
        first, last = call.blocks(b, first_row, last_row)
        self.first = Cell(T.Cast("int32", first), "int32")
        self.count = Cell(T.Cast("int32", T.max(last - first, T.int64(0))), "int32")
        self.sinks = call.sink_blocks
        self.gap = Cell(T.Cast("int32", call.gap(b, first_row, last_row)), "int32") if call.w.sinks else None

    def block(self, i: Any) -> Any:
        """The i-th."""
        number = self.first.v + i
        if self.gap is None:
            return number
        return number + T.Select(number < self.sinks, T.int32(0), self.gap.v)
