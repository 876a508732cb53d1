"""Rotary embedding and cache append in one kernel: the step between the QKV projection and attention.

Queries are one pass over tokens; keys and values one pass over blocks of 64 positions, so that no two threads write
the same cache line of the packed keys. A block of the functional form is past, then new tokens, then zeros.
Where the cache is rounded, so is each token as it enters (`rounding`); where it is paged, a table says which page holds
a block. No two sequences have the same page where new tokens go: who calls sees to that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from llmc.schedules.attention import examples, reference
from llmc.schedules.attention.kv_format import FORMATS
from llmc.schedules.attention.layout import BLOCK, distribute, parameters, span, vectors
from llmc.schedules.attention.rounding import Rounding
from llmc.schedules.attention.workloads import KVAppendWorkload
from llmc.schedules.base import Arrays, Config, Space, Template, Work, Workload
from llmc.targets.base import Target
from llmc.targets.intrinsics import Simd
from llmc.tvm_shim import IRBuilder, T

Load = Callable[[Any, int, int], Any]  # (first column, width, stride) -> vector
Store = Callable[[Any, int, int, Any], None]  # (first column, width, stride, vector)


class KVAppend(Template):
    """Template "kv_append"; `serial_tokens` is the knob: up to so many tokens one thread does all."""

    name = "kv_append"

    def accepts(self, workload: Workload, target: Target) -> bool:
        return isinstance(workload, KVAppendWorkload) and target.kind == "llvm"

    def space(self, workload: KVAppendWorkload, target: Target) -> Space:
        return Space({"serial_tokens": (4, 16, 64)})

    def default(self, workload: KVAppendWorkload, target: Target) -> dict[str, int | str]:
        return {"serial_tokens": 16}

    def build(self, workload: KVAppendWorkload, target: Target, config: Config) -> Any:
        return _Kernel(workload, target).build(int(config["serial_tokens"]))

    def reference(
        self, workload: KVAppendWorkload, inputs: Mapping[str, np.ndarray], weights: Mapping[str, Any]
    ) -> Arrays:
        return reference.kv_append(workload, inputs)

    def work(self, workload: KVAppendWorkload, dims: Mapping[str, int]) -> Work:
        """dims: B, S, and P where there is a past."""
        w = workload
        new = dims["B"] * dims["S"] * w.head_dim
        old = dims["B"] * dims.get("P", 0) * w.head_dim * w.n_kv_heads
        kept = 4 if w.kv_cache == "float32" else FORMATS[w.kv_cache].bits / 8  # bytes of a number in the cache
        moved: float = 4 * new * (2 * w.n_kv_heads + (2 * w.n_heads if w.rope else 0)) + 16 * old
        moved += kept * 2 * new * w.n_kv_heads
        copies = 4 * (new * w.n_kv_heads + old) if w.present else 0
        return Work(ops=3 * new * (w.n_heads + w.n_kv_heads) if w.rope else 0, bytes=moved + copies)

    def example_inputs(self, workload: KVAppendWorkload, dims: Mapping[str, int], rng: np.random.Generator) -> Arrays:
        return examples.append_inputs(workload, dims, rng)

    def corners(self, workload: KVAppendWorkload) -> Sequence[Mapping[str, int]]:
        return examples.append_corners(workload)


class _Kernel:
    """One kernel under construction: what the pieces of its body share."""

    def __init__(self, workload: KVAppendWorkload, target: Target) -> None:
        self.w, self.simd = workload, Simd(target)
        self.lanes = self.simd.lanes

    def build(self, serial_tokens: int) -> Any:
        w = self.w
        with IRBuilder() as ib:
            with T.prim_func(s_tir=True):
                T.func_name("kv_append")
                T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
                self.buffers, symbols = parameters(w.inputs() + w.outputs())
                self.rounding = Rounding(w, self.simd, self.buffers) if w.kv_cache != "float32" else None
                B, S = symbols["B"], symbols["S"]
                self.S = S
                self.past = symbols["P"] if w.past else T.int64(0)
                self.blocks = symbols["CB" if w.in_place else "blocks"]
                if w.rope:
                    distribute(B * S, serial_tokens >= B * S, self.queries)
                # S consecutive tokens touch at most so many blocks, wherever they start.
                self.touched = (S + BLOCK - 2) // BLOCK + 1 if w.in_place else self.blocks
                few = serial_tokens >= B * (self.past + S)
                distribute(B * w.n_kv_heads * self.touched, few, self.block)
        return ib.get()

    def queries(self, task: Any) -> None:
        """Rotate the query heads of one token."""
        w, D = self.w, self.w.head_dim
        b, s = T.bind(task // self.S), T.bind(task % self.S)
        source, out = self.buffers["qkv" if w.packed_qkv else "q_in"], self.buffers["q"]
        with T.serial(0, w.n_heads) as h:

            def load(c: Any, n: int, stride: int) -> Any:
                return source[b, s, span(h * D + c, n, stride)]

            def store(c: Any, n: int, stride: int, x: Any) -> None:
                T.buffer_store(out, x, [b, s, span(h * D + c, n, stride)])

            self.rotated(b, s, load, store)

    def block(self, task: Any) -> None:
        """Fill the columns of one block of one key head, and the same rows of v."""
        w, D = self.w, self.w.head_dim
        per_batch = w.n_kv_heads * self.touched
        b, kv, i = T.bind(task // per_batch), T.bind(task // self.touched % w.n_kv_heads), T.bind(task % self.touched)
        # Positions of the new tokens: start .. end-1; of the block: low .. high-1.
        start = T.bind(self.buffers["kv_len"][b] - self.S) if w.in_place else self.past
        end = T.bind(start + self.S)
        at = T.bind(T.max(start, T.int64(0)) // BLOCK + i if w.in_place else i)
        low, high = T.bind(at * BLOCK), T.bind(T.min(at + 1, self.blocks) * BLOCK)
        place = self.place(b, kv, at)
        rows = T.alloc_buffer((BLOCK, D), "float32")
        if w.past:
            with T.serial(0, T.max(T.min(high, self.past) - low, T.int64(0))) as p:
                self.copy_past(b, kv, low + p, rows, p)
        first = T.bind(T.max(T.max(low, start), T.int64(0)))
        with T.serial(0, T.max(T.min(high, end) - first, T.int64(0))) as p:
            self.append(b, kv, first + p, first + p - start, rows, first + p - low, place)
        if not w.in_place:
            with T.serial(0, T.max(high - T.max(low, end), T.int64(0))) as p, T.serial(0, D) as d:
                T.buffer_store(rows, T.float32(0), [BLOCK - 1 - p, d])
        left = T.bind(first - low if w.in_place else T.int64(0))
        right = T.bind(T.min(high, end) - low if w.in_place else T.int64(BLOCK))
        with T.serial(0, D) as d, T.serial(0, T.max(right - left, T.int64(0))) as p:
            if self.rounding:
                self.rounding.put_key(rows[left + p, d], place, d, left + p)
            else:
                T.buffer_store(self.buffers["kp"], rows[left + p, d], [*place, d, left + p])

    def place(self, b: Any, kv: Any, block: Any) -> list[Any]:
        """Leading indices of a block in keys, values and planes. Beyond the last one nothing is written."""
        if not self.w.paged:
            return [b, kv, block]
        return [T.bind(T.Cast("int64", self.buffers["table"][b, T.min(block, self.blocks - 1)])), kv]

    def copy_past(self, b: Any, kv: Any, position: Any, rows: Any, row: Any) -> None:
        for n, c in self.cover(self.w.head_dim):
            key, value = (self.buffers[name][b, kv, position, span(c, n)] for name in ("past_k", "past_v"))
            T.buffer_store(rows, key, [row, span(c, n)])
            T.buffer_store(self.buffers["v"], value, [b, kv, position, span(c, n)])
            if self.w.present:
                T.buffer_store(self.buffers["present_k"], key, [b, kv, position, span(c, n)])

    def append(self, b: Any, kv: Any, position: Any, s: Any, rows: Any, row: Any, place: list[Any]) -> None:
        """Put token `s` at `position`: its value into v, its rotated key into `row` of the rows of the block there."""
        w, D = self.w, self.w.head_dim
        H, KV = w.n_heads, w.n_kv_heads
        if w.packed_qkv:
            k = v = self.buffers["qkv"]
            k_at, v_at = (H + kv) * D, (H + KV + kv) * D
        else:
            k, v = self.buffers["k_in"], self.buffers["v_in"]
            k_at = v_at = kv * D

        def load(c: Any, n: int, stride: int) -> Any:
            return k[b, s, span(k_at + c, n, stride)]

        def store(c: Any, n: int, stride: int, x: Any) -> None:
            T.buffer_store(rows, x, [row, span(c, n, stride)])

        self.rotated(b, s, load, store)
        if self.rounding:
            self.rounding.round_key(rows, place, row)
            self.rounding.put_value(lambda c, n: v[b, s, span(v_at + c, n)], place, row)
            return
        to = [*place, row] if w.paged else [b, kv, position]
        for n, c in self.cover(D):
            T.buffer_store(self.buffers["v"], v[b, s, span(v_at + c, n)], [*to, span(c, n)])
            if w.present:
                T.buffer_store(self.buffers["present_k"], rows[row, span(c, n)], [b, kv, position, span(c, n)])

    def rotated(self, b: Any, s: Any, load: Load, store: Store) -> None:
        """Move one head, its leading dimensions rotated by the angles of token `s`."""
        w = self.w
        half = w.rotary // 2
        for n, c in self.cover(half):
            cos, sin = (T.bind(self.buffers[name][b, s, span(c, n)]) for name in ("cos", "sin"))
            (first, second), stride = ((2 * c, 2 * c + 1), 2) if w.interleaved else ((c, half + c), 1)
            x, y = T.bind(load(first, n, stride)), T.bind(load(second, n, stride))
            store(first, n, stride, x * cos - y * sin)
            store(second, n, stride, y * cos + x * sin)
        for n, c in self.cover(w.head_dim - w.rotary):
            store(w.rotary + c, n, 1, load(w.rotary + c, n, 1))

    def cover(self, size: int) -> list[tuple[int, int]]:
        """(width, first column) of the vectors over `size` columns."""
        width, starts = vectors(size, self.lanes)
        return [(width, c) for c in starts]


KV_APPEND = KVAppend()
