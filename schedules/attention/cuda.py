"""Attention on GPUs, the plain form of the family: a block of 64 threads for every row of queries, float32 arithmetic.

A block of keys has as many as a block of threads: each thread makes one score, then all of them add the block's values,
a dimension a thread, to sums that are rescaled when the maximum grows (online softmax, Milakov and Gimelshein, 2018).
"""

from __future__ import annotations

from typing import Any

from llmc.schedules.attention.attention import Attention
from llmc.schedules.attention.layout import BLOCK, parameters
from llmc.schedules.attention.reference import MASKED
from llmc.schedules.attention.workloads import AttentionWorkload
from llmc.schedules.base import Config, Space, Workload
from llmc.targets.base import Target
from llmc.targets.threads import BlockReduction, Cell, barrier, launch, shared, strided
from llmc.tvm_shim import IRBuilder, T


class CudaAttention(Attention):
    """Template "attention_cuda": every mask, over a cache in float32 whose blocks lie in order. No knobs."""

    name = "attention_cuda"

    def accepts(self, workload: Workload, target: Target) -> bool:
        known = isinstance(workload, AttentionWorkload) and target.kind == "cuda"
        return known and workload.kv_cache == "float32" and not workload.paged

    def space(self, workload: AttentionWorkload, target: Target) -> Space:
        return Space({})

    def default(self, workload: AttentionWorkload, target: Target) -> dict[str, int | str]:
        return {}

    def build(self, workload: AttentionWorkload, target: Target, config: Config) -> Any:
        with IRBuilder() as ib, T.prim_func(s_tir=True):
            T.func_name("attention")
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            buffers, symbols = parameters(workload.inputs() + workload.outputs())
            with launch(BLOCK, symbols["S"], workload.n_heads, symbols["B"]) as (thread, s, h, b):
                _Row(workload, buffers, symbols, thread, s, h, b).run()
        return ib.get()


class _Row:
    """The work of one block: row `s` of head `h` of sequence `b`."""

    def __init__(
        self,
        workload: AttentionWorkload,
        buffers: dict[str, Any],
        symbols: dict[str, Any],
        thread: Any,
        s: Any,
        h: Any,
        b: Any,
    ) -> None:
        self.w, self.buffers, self.symbols = workload, buffers, symbols
        self.thread, self.s, self.h, self.b = thread, s, h, b
        self.kv = T.bind(T.floordiv(h, T.int64(workload.group)))
        self.length = Cell(buffers["kv_len"][b], "int64")
        self.position = Cell(self.length.v - symbols["S"] + s, "int64")  # negative in padding

    def run(self) -> None:
        w, D, thread = self.w, self.w.head_dim, self.thread
        q, p = shared((D,)), shared((BLOCK,))
        with strided(D, thread, BLOCK) as d:
            T.buffer_store(q, self.buffers["q"][self.b, self.s, self.h * D + d] * T.float32(w.scale), [d])
        barrier()
        block = BlockReduction(thread, BLOCK)
        sums = [Cell(T.float32(0)) for _ in range(-(-D // BLOCK))]
        top, total = Cell(T.float32(MASKED)), Cell(T.float32(0))
        score, decay = Cell(T.float32(0)), Cell(T.float32(0))
        first, last = self._blocks()
        with T.serial(0, last - first) as step:
            key0 = T.bind((first + T.Cast("int64", step)) * BLOCK)
            key = T.bind(key0 + thread)
            score.v = T.float32(MASKED)
            with T.If(self._seen(key)), T.Then():
                score.v = self._score(q, T.floordiv(key0, T.int64(BLOCK)))
                score.v = self._changed(score.v, key)
            largest = block.max(score.v)
            largest.v = T.max(largest.v, top.v)
            decay.v = T.exp(top.v - largest.v)
            top.v = largest.v
            score.v = T.Select(score.v > T.float32(MASKED), T.exp(score.v - top.v), T.float32(0))
            T.buffer_store(p, score.v, [thread])
            barrier()
            total.v = total.v * decay.v
            for cell in sums:
                cell.v = cell.v * decay.v
            with T.serial(0, T.min(self.length.v - key0, T.int64(BLOCK))) as j:
                total.v = total.v + p[j]
                for i, cell in enumerate(sums):
                    d = thread + i * BLOCK
                    with T.If(d < D), T.Then():
                        cell.v = cell.v + p[j] * self.buffers["v"][self.b, self.kv, key0 + j, d]
            barrier()  # before the next block's scores take the place of these
        total.v = T.Select(total.v > T.float32(0), T.float32(1) / total.v, T.float32(0))
        for i, cell in enumerate(sums):
            d = thread + i * BLOCK
            with T.If(d < D), T.Then():
                T.buffer_store(self.buffers["out"], cell.v * total.v, [self.b, self.s, self.h * D + d])

    def _blocks(self) -> tuple[Any, Any]:
        """The blocks of keys that may hold one the row sees: from the first to before the last."""
        w = self.w
        end = self.length.v
        if w.ordered and not w.prefix:
            end = T.min(end, self.position.v + 1)
        last = Cell(T.floordiv(T.max(end, T.int64(0)) + (BLOCK - 1), T.int64(BLOCK)), "int64")
        if not w.window or w.sinks:
            return T.int64(0), last.v
        begin = T.max(self.position.v - w.window + 1, T.int64(0))
        return Cell(T.min(T.floordiv(begin, T.int64(BLOCK)), last.v), "int64").v, last.v

    def _seen(self, key: Any) -> Any:
        w, position = self.w, self.position.v
        seen = key < self.length.v
        if w.key_bias or w.bias or w.documents:
            seen = T.And(seen, key < self.symbols["T"])
        if w.ordered:
            visible = key <= position
            if w.prefix:
                visible = T.Or(visible, T.And(key < self.buffers["prefix_len"][self.b], position >= 0))
            seen = T.And(seen, visible)
        if w.window:
            near = key > position - w.window
            seen = T.And(seen, T.Or(near, key < w.sinks) if w.sinks else near)
        if w.documents:
            size = self.symbols["T"]
            own, theirs = (T.max(T.min(at, size - 1), T.int64(0)) for at in (position, key))
            number = self.buffers["documents"]
            seen = T.And(seen, number[self.b, own] == number[self.b, theirs])
        if w.tree:
            new = key - (self.length.v - self.symbols["S"])
            bit = T.Cast("uint64", T.max(T.min(new, T.int64(63)), T.int64(0)))
            mine = T.bitwise_and(T.shift_right(self.buffers["tree"][self.b, self.s], bit), T.uint64(1))
            seen = T.And(seen, T.Or(new < 0, T.And(new < 64, mine == T.uint64(1))))
        return seen

    def _score(self, q: Any, block: Any) -> Any:
        """q k of this thread's key."""
        dot = Cell(T.float32(0))
        with T.serial(0, self.w.head_dim) as d:
            dot.v = dot.v + q[d] * self.buffers["kp"][self.b, self.kv, block, d, self.thread]
        return dot.v

    def _changed(self, score: Any, key: Any) -> Any:
        """The score after softcap and biases; MASKED where these hide the key."""
        w, buffers = self.w, self.buffers
        if w.softcap:
            score = T.float32(w.softcap) * T.tanh(score * T.float32(1 / w.softcap))
        if w.key_bias:
            score = score + buffers["key_bias"][self.b, key]
        if w.bias:
            at = (
                self.b if w.bias_batch else T.int64(0),
                self.h if w.bias_heads else T.int64(0),
                self.s if w.bias_rows else T.int64(0),
            )
            score = score + buffers["bias"][(*at, key)]
        if w.alibi:
            score = score + buffers["slopes"][self.h] * T.Cast("float32", key - self.position.v)
        return T.max(score, T.float32(MASKED))


CUDA_ATTENTION = CudaAttention()
