"""What a query may see beyond a range of keys, and what is added to its scores for where it stands.

ALiBi, documents and trees, each a `Part` of a task's mask. The task asks all its parts in turn: once a row, once a
block of keys, and for every row of a block. What they know is compiled into the kernel; no mask of queries by keys
exists.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llmc.schedules.attention.layout import BLOCK
from llmc.targets.intrinsics import Simd
from llmc.tvm_shim import T

if TYPE_CHECKING:
    from llmc.schedules.attention.call import Call

Hides = Callable[[int], Any]  # from the first of some lanes of a block: which of these keys a row sees
_LOG2E = 1 / math.log(2)


class Part:
    """Of the mask of one task over up to `rows` rows of sequence `b`; made where the task begins."""

    adds = False  # does `add` change scores?

    def __init__(self, call: Call, b: Any, kv: Any, rows: int) -> None:
        self.call, self.b, self.kv = call, b, kv

    @property
    def simd(self) -> Simd:
        return self.call.simd

    def position(self, r: Any) -> Any:
        """Where stacked row `r` stands among the keys; negative in padding."""
        return self.call.buffers["kv_len"][self.b] - self.call.symbols["S"] + r // self.call.w.group

    def open_row(self, i: Any, r: Any) -> None:
        """Goes before all blocks: row `i` of the scratch is stacked row `r`."""

    def open_block(self, key0: Any) -> None:
        """Goes before anything that is asked of the block."""

    def relevant(self) -> Any | None:
        """Whether a row may see a key of the open block; None where that needs no question."""
        return None

    def cuts(self, key0: Any) -> Any | None:
        """Whether `seen` may hide a key of the block that is in a row's range; None where it never does."""
        return None

    def add(self, i: Any, key0: Any, xs: dict[int, Any]) -> dict[int, Any]:
        """The scores of row i in units of log2, by first column, with what is added to them."""
        return xs

    def seen(self, i: Any, key0: Any) -> Hides | None:
        return None


class Alibi(Part):
    """slope[head] * (key - position) added to scores (Press et al., "Train short, test long", ICLR 2022)."""

    adds = True

    def __init__(self, call: Call, b: Any, kv: Any, rows: int) -> None:
        super().__init__(call, b, kv, rows)
        self.slope = T.alloc_buffer((rows,), "float32")
        self.at = T.alloc_buffer((rows,), "int32")

    def open_row(self, i: Any, r: Any) -> None:
        group = self.call.w.group
        slope = self.call.buffers["slopes"][self.kv * group + r % group]
        T.buffer_store(self.slope, slope * T.float32(_LOG2E), [i])
        T.buffer_store(self.at, T.Cast("int32", self.position(r)), [i])

    def add(self, i: Any, key0: Any, xs: dict[int, Any]) -> dict[int, Any]:
        """Distances are whole numbers, exact in float32 up to 2**24; the product is rounded with the sum."""
        simd = self.simd
        first, slope = T.bind(T.Cast("int32", key0) - self.at[i]), T.bind(simd.splat(self.slope[i]))

        def distance(n: int) -> Any:
            return T.Cast(f"float32x{simd.lanes}", simd.splat(first) + T.ramp(T.int32(n), 1, simd.lanes))

        return {n: T.bind(simd.fma(slope, distance(n), x)) for n, x in xs.items()}


class Documents(Part):
    """Sequences packed into one: a query sees the keys of its own document.

    A block of keys whose numbers are all below, or all above, those of the task's rows is skipped unread.
    """

    def __init__(self, call: Call, b: Any, kv: Any, rows: int) -> None:
        super().__init__(call, b, kv, rows)
        self.own = T.alloc_buffer((rows,), "int64")
        self.keys = T.alloc_buffer((BLOCK,), "int64")
        self.of_rows, self.of_keys = (T.alloc_buffer((2,), "int64") for _ in range(2))  # least and greatest number
        self.begin(self.of_rows)

    def begin(self, ends: Any) -> None:
        T.buffer_store(ends, T.max_value("int64"), [0])
        T.buffer_store(ends, T.min_value("int64"), [1])

    def widen(self, ends: Any, number: Any) -> None:
        T.buffer_store(ends, T.min(ends[0], number), [0])
        T.buffer_store(ends, T.max(ends[1], number), [1])

    def number(self, key: Any) -> Any:
        return T.bind(self.call.buffers["documents"][self.b, key])

    def open_row(self, i: Any, r: Any) -> None:
        at = T.max(T.min(self.position(r), self.call.symbols["T"] - 1), T.int64(0))
        own = self.number(T.bind(at))
        T.buffer_store(self.own, own, [i])
        self.widen(self.of_rows, own)

    def open_block(self, key0: Any) -> None:
        self.begin(self.of_keys)
        with T.serial(0, T.min(self.call.symbols["T"] - key0, T.int64(BLOCK))) as k:
            number = self.number(key0 + k)
            T.buffer_store(self.keys, number, [k])
            self.widen(self.of_keys, number)

    def relevant(self) -> Any:
        rows, keys = self.of_rows, self.of_keys
        return T.And(keys[0] <= rows[1], rows[0] <= keys[1])

    def cuts(self, key0: Any) -> Any:
        rows, keys = self.of_rows, self.of_keys
        return T.min(rows[0], keys[0]) < T.max(rows[1], keys[1])

    def seen(self, i: Any, key0: Any) -> Hides:
        own = T.bind(self.simd.splat(self.own[i]))
        return lambda n: self.keys[self.simd.span(n)] == own


class Tree(Part):
    """Of the new keys a row sees those that its bits name (Miao et al., "SpecInfer", ASPLOS 2024)."""

    def __init__(self, call: Call, b: Any, kv: Any, rows: int) -> None:
        super().__init__(call, b, kv, rows)
        self.bits = T.alloc_buffer((rows,), "uint64")

    def open_row(self, i: Any, r: Any) -> None:
        T.buffer_store(self.bits, self.call.buffers["tree"][self.b, r // self.call.w.group], [i])

    def cuts(self, key0: Any) -> Any:
        return key0 + BLOCK > self.position(T.int64(0))

    def seen(self, i: Any, key0: Any) -> Hides:
        """A block has as many keys as a mask has bits: shifted, bit k is the block's k-th key."""
        simd = self.simd
        older, bits = T.bind(self.position(T.int64(0)) - key0), self.bits[i]
        up, down = (T.Cast("uint64", T.min(T.max(n, T.int64(0)), T.int64(63))) for n in (older, -older))
        low = T.shift_left(T.uint64(1), up) - T.uint64(1)  # a key of the block that is older than all new ones
        shifted = T.Select(older > 0, T.bitwise_or(T.shift_left(bits, up), low), T.shift_right(bits, down))
        word = T.bind(T.Select(older > -BLOCK, shifted, T.uint64(0)))

        def hides(n: int) -> Any:
            few = T.Cast("int32", T.bitwise_and(T.shift_right(word, T.uint64(n)), T.uint64(2**simd.lanes - 1)))
            lanes = T.shift_left(simd.i32(1), T.ramp(T.int32(0), 1, simd.lanes))
            return T.bitwise_and(simd.splat(few), lanes) != simd.i32(0)

        return hides


def parts_of(call: Call, b: Any, kv: Any, rows: int) -> list[Part]:
    """The parts of a task's mask that its workload asks for."""
    w = call.w
    asked = {Alibi: w.alibi, Documents: w.documents, Tree: w.tree}
    return [kind(call, b, kv, rows) for kind, wanted in asked.items() if wanted]
