"""Few queries: keys are split over tasks, and a second pass merges ("Flash-Decoding", Dao et al., 2023).

A task takes all stacked rows of one key head over `chunk` blocks of keys. How many tasks there are depends on the
lengths alone, never on the number of threads: results are the same bits on every machine of a target.

Leading pages that all sequences share are read once: a task stacks the rows of many sequences over them ("Hydragen",
Juravsky et al., 2024; "ChunkAttention", Ye et al., 2024). The merge makes no difference between parts.
"""

from __future__ import annotations

from typing import Any

from llmc.schedules.attention.call import Call
from llmc.schedules.attention.flash import FLOOR, Flash
from llmc.schedules.attention.layout import BLOCK, distribute, vectors
from llmc.targets.intrinsics import Reg
from llmc.tvm_shim import T

MAX_QUERIES = 4  # up to so many queries a call decodes
SHARED_ROWS = 48  # rows of several sequences that a task stacks over shared pages


def decode(call: Call, chunk: int, serial_kib: int, MR: int, NR: int) -> None:
    """Emit the body. One thread does it all where keys and values read are at most `serial_kib` KiB."""
    w, B = call.w, call.symbols["B"]
    rows = T.bind(call.rows)
    shared = T.bind(T.Select(B > 1, call.buffers["shared"][0], T.int64(0))) if w.sharable else T.int64(0)
    shared_splits = T.bind((shared + chunk - 1) // chunk)

    def span_of(b: Any) -> tuple[Any, Any]:
        first, last = call.blocks(b, T.int64(0), rows - 1)
        return (T.bind(T.max(first, shared)), last) if w.sharable else (first, last)

    longest = T.alloc_buffer((1,), "int64")
    T.buffer_store(longest, T.int64(1), [0])
    with T.serial(0, B) as b:
        first, last = span_of(b)
        T.buffer_store(longest, T.max(longest[0], last - first), [0])
    splits = T.bind((longest[0] + chunk - 1) // chunk)
    tasks = T.bind(B * w.n_kv_heads * splits)
    part, tile = _Partial(call, chunk), _tile(w.group, MR, NR, call.simd.lanes)
    parts = T.bind(shared_splits + splits)  # of each sequence's key head

    def body(task: Any) -> None:
        b, kv = T.bind(task // (w.n_kv_heads * splits)), T.bind(task // splits % w.n_kv_heads)
        first, last = span_of(b)
        begin = T.bind(first + task % splits * chunk)
        with T.If(begin < last), T.Then():
            flash = Flash(call, b, kv, T.int64(0), rows, MAX_QUERIES * w.group, *tile, ahead=True)
            flash.run(begin, T.min(begin + chunk, last))
            at = T.bind((b * w.n_kv_heads + kv) * parts + shared_splits + task % splits)
            with T.serial(0, flash.count) as r:
                part.store(at, r, flash, r)

    # Sequences that a task over shared pages takes, and how many tasks that makes.
    together = T.bind(T.max(SHARED_ROWS // rows, T.int64(1)))
    shared_tasks = T.bind((B + together - 1) // together * w.n_kv_heads * shared_splits)

    def over_shared(task: Any) -> None:
        b = T.bind(task // (w.n_kv_heads * shared_splits) * together)
        kv, split = T.bind(task // shared_splits % w.n_kv_heads), T.bind(task % shared_splits)
        count = T.bind(T.min(B - b, together) * rows)
        flash = _Together(call, b, kv, T.int64(0), count, max(SHARED_ROWS, MAX_QUERIES * w.group), MR, NR, ahead=True)
        flash.run(split * chunk, T.min((split + 1) * chunk, shared))
        with T.serial(0, flash.count) as i:
            sequence, r = T.bind(b + i // rows), T.bind(i % rows)
            part.store(T.bind((sequence * w.n_kv_heads + kv) * parts + split), r, flash, i)

    block_bytes = 2 * 4 * BLOCK * w.head_dim * w.n_kv_heads
    if w.sharable:
        with T.If(shared > 0), T.Then(), T.parallel(0, shared_tasks) as task:
            over_shared(task)
    distribute(tasks, serial_kib * 1024 >= B * longest[0] * block_bytes, body)
    with T.serial(0, B) as b:
        first, last = span_of(b)
        used = T.bind((T.max(last - first, T.int64(0)) + chunk - 1) // chunk)
        with T.serial(0, w.n_kv_heads) as kv, T.serial(0, rows) as r:
            part.merge(b, kv, r, (b * w.n_kv_heads + kv) * parts, shared_splits + used)


def _tile(group: int, MR: int, NR: int, lanes: int) -> tuple[int, int]:
    """Tile for one query's heads: whole groups where they fit, and wider for fewer rows, to keep FMAs independent."""
    rows = -(-group // -(-group // MR))
    widths = [n for n in (1, 2, 4, 8) if n * lanes <= BLOCK and rows * n <= max(MR * NR, rows * NR)]
    return rows, max(widths)


class _Together(Flash):
    """Rows of consecutive sequences from `b` on, over pages that all of them share and see whole."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.parts = []  # a tree hides new keys alone

    def row(self, i: Any) -> tuple[Any, Any]:
        row = T.bind(T.min(i, self.count - 1))
        return T.bind(self.b + row // self.call.rows), T.bind(row % self.call.rows)

    def seen(self, b: Any, r: Any) -> tuple[Any, Any]:
        return T.int64(0), T.int64(2**31 - 1)

    def first_tile(self, key0: Any) -> Any:
        return T.int64(0)


class _Partial:
    """Results of tasks that saw only some of the keys: acc [tasks, rows, D], maxima and sums of weights."""

    def __init__(self, call: Call, chunk: int) -> None:
        self.call = call
        # Sizes in terms of the parameters' shapes alone: TVM moves allocations to the top of the function.
        parts = (call.symbols["CB"] + chunk - 1) // chunk + (1 if call.w.sharable else 0)
        tasks = call.symbols["B"] * call.w.n_kv_heads * parts
        rows = T.min(call.symbols["S"], T.int64(MAX_QUERIES)) * call.w.group
        self.width, self.starts = vectors(call.w.head_dim, call.simd.lanes)
        self.acc = T.alloc_buffer((tasks, rows, len(self.starts) * self.width), "float32")
        self.top = T.alloc_buffer((tasks, rows), "float32")
        self.total = T.alloc_buffer((tasks, rows), "float32")

    def store(self, part: Any, r: Any, flash: Flash, i: Any) -> None:
        """Row `r` of `part` := what `flash` found for its row i."""
        T.buffer_store(self.top, flash.top[i], [part, r])
        T.buffer_store(self.total, flash.sum_of_weights(i), [part, r])
        for j in range(len(self.starts)):
            at = self.call.simd.span(j * self.width, self.width)
            T.buffer_store(self.acc, flash.acc[i, at], [part, r, at])

    def merge(self, b: Any, kv: Any, r: Any, task0: Any, used: Any) -> None:
        """out row := sum of the parts, each rescaled to the largest maximum, over the sum of their weights."""
        simd, n = self.call.simd, self.width
        top, total = simd.reg(), simd.reg()
        top.v, total.v = simd.f32(FLOOR), simd.f32(0)
        out = [Reg(n) for _ in self.starts]
        for o in out:
            o.v = simd.f32(0, n)
        with T.serial(0, used) as t:
            top.v = T.max(top.v, simd.splat(self.top[task0 + t, r]))
        with T.serial(0, used) as t:
            weight = simd.exp2(simd.splat(self.top[task0 + t, r]) - top.v)
            total.v = simd.fma(weight, simd.splat(self.total[task0 + t, r]), total.v)
            scale = T.bind(simd.reduce_max(weight))
            for j, o in enumerate(out):
                o.v = simd.fma(self.acc[task0 + t, r, simd.span(j * n, n)], simd.splat(scale, n), o.v, n)
        sum_ = T.bind(simd.reduce_max(total.v))
        norm = T.bind(T.Select(sum_ < T.float32(0.5), T.float32(0), T.float32(1) / sum_))
        for o, c in zip(out, self.starts, strict=True):
            T.buffer_store(self.call.buffers["out"], o.v * simd.splat(norm, n), self.call.output_at(b, kv, r, c, n))
