"""Few queries: keys are split over tasks, and a second pass merges ("Flash-Decoding", Dao et al., 2023).

A task takes all stacked rows of one key head over `chunk` blocks of keys. How many tasks there are depends on the
lengths alone, never on the number of threads: results are the same bits on every machine of a target.
"""

from __future__ import annotations

from typing import Any

from llmc.schedules.attention.flash import FLOOR, Call, Flash
from llmc.schedules.attention.layout import BLOCK, distribute, vectors
from llmc.targets.intrinsics import Reg
from llmc.tvm_shim import T

MAX_QUERIES = 4  # up to so many queries a call decodes


def decode(call: Call, chunk: int, serial_kib: int, MR: int, NR: int) -> None:
    """Emit the body. One thread does it all where keys and values read are at most `serial_kib` KiB."""
    w, B = call.w, call.symbols["B"]
    rows = T.bind(call.rows)

    def span_of(b: Any) -> tuple[Any, Any]:
        return call.blocks(b, T.int64(0), rows - 1)

    longest = T.alloc_buffer((1,), "int64")
    T.buffer_store(longest, T.int64(1), [0])
    with T.serial(0, B) as b:
        first, last = span_of(b)
        T.buffer_store(longest, T.max(longest[0], last - first), [0])
    splits = T.bind((longest[0] + chunk - 1) // chunk)
    tasks = T.bind(B * w.n_kv_heads * splits)
    part, tile = _Partial(call, chunk), _tile(w.group, MR, NR, call.simd.lanes)

    def body(task: Any) -> None:
        b, kv = T.bind(task // (w.n_kv_heads * splits)), T.bind(task // splits % w.n_kv_heads)
        first, last = span_of(b)
        begin = T.bind(first + task % splits * chunk)
        with T.If(begin < last), T.Then():
            flash = Flash(call, b, kv, T.int64(0), rows, MAX_QUERIES * w.group, *tile, ahead=True)
            flash.run(begin, T.min(begin + chunk, last))
            part.store(task, flash)

    block_bytes = 2 * 4 * BLOCK * w.head_dim * w.n_kv_heads
    distribute(tasks, serial_kib * 1024 >= B * longest[0] * block_bytes, body)
    with T.serial(0, B) as b:
        first, last = span_of(b)
        used = T.bind((T.max(last - first, T.int64(0)) + chunk - 1) // chunk)
        with T.serial(0, w.n_kv_heads) as kv, T.serial(0, rows) as r:
            part.merge(b, kv, r, (b * w.n_kv_heads + kv) * splits, used)


def _tile(group: int, MR: int, NR: int, lanes: int) -> tuple[int, int]:
    """Tile for one query's heads: whole groups where they fit, and wider for fewer rows, to keep FMAs independent."""
    rows = -(-group // -(-group // MR))
    widths = [n for n in (1, 2, 4, 8) if n * lanes <= BLOCK and rows * n <= max(MR * NR, rows * NR)]
    return rows, max(widths)


class _Partial:
    """Results of tasks that saw only some of the keys: acc [tasks, rows, D], maxima and sums of weights."""

    def __init__(self, call: Call, chunk: int) -> None:
        self.call = call
        # Sizes in terms of the parameters' shapes alone: TVM moves allocations to the top of the function.
        tasks = call.symbols["B"] * call.w.n_kv_heads * ((call.symbols["CB"] + chunk - 1) // chunk)
        rows = T.min(call.symbols["S"], T.int64(MAX_QUERIES)) * call.w.group
        self.width, self.starts = vectors(call.w.head_dim, call.simd.lanes)
        self.acc = T.alloc_buffer((tasks, rows, len(self.starts) * self.width), "float32")
        self.top = T.alloc_buffer((tasks, rows), "float32")
        self.total = T.alloc_buffer((tasks, rows), "float32")

    def store(self, task: Any, flash: Flash) -> None:
        with T.serial(0, flash.count) as r:
            T.buffer_store(self.top, flash.top[r], [task, r])
            T.buffer_store(self.total, flash.sum_of_weights(r), [task, r])
            for j in range(len(self.starts)):
                at = self.call.simd.span(j * self.width, self.width)
                T.buffer_store(self.acc, flash.acc[r, at], [task, r, at])

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
