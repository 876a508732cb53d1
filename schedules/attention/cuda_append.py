"""Rotation and append to the cache on GPUs: a thread for every element, none of which depends on another.

What enters a rounded cache does depend on its neighbours: that is `cuda_rounding`'s.
"""

from __future__ import annotations

from typing import Any

from llmc.schedules.attention.cuda_rounding import THREADS as ROUNDING_THREADS
from llmc.schedules.attention.cuda_rounding import DeviceRounding
from llmc.schedules.attention.kv_append import KVAppend
from llmc.schedules.attention.layout import BLOCK, parameters
from llmc.schedules.attention.workloads import KVAppendWorkload
from llmc.schedules.base import Config, Space, Workload
from llmc.targets.base import Target
from llmc.targets.threads import Cell, launch, strided
from llmc.tvm_shim import IRBuilder, T

_THREADS = 128


class CudaKVAppend(KVAppend):
    """Template "kv_append_cuda". No knobs."""

    name = "kv_append_cuda"

    def accepts(self, workload: Workload, target: Target) -> bool:
        return isinstance(workload, KVAppendWorkload) and target.kind == "cuda"

    def space(self, workload: KVAppendWorkload, target: Target) -> Space:
        return Space({})

    def default(self, workload: KVAppendWorkload, target: Target) -> dict[str, int | str]:
        return {}

    def build(self, workload: KVAppendWorkload, target: Target, config: Config) -> Any:
        w = workload
        with IRBuilder() as ib, T.prim_func(s_tir=True):
            T.func_name("kv_append")
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            buffers, symbols = parameters(w.inputs() + w.outputs())
            append = _Append(w, buffers, symbols)
            with T.attr(0, "sequence", 0):  # launches in a row need a frame around them
                rounds = w.kv_cache != "float32"
                if w.rope or (w.in_place and not rounds):
                    with launch(_THREADS, symbols["S"], symbols["B"]) as (thread, s, b):
                        append.token(thread, s, b)
                if rounds:
                    touched = T.floordiv(symbols["S"] + (BLOCK - 2), T.int64(BLOCK)) + 1  # wherever the tokens start
                    with launch(ROUNDING_THREADS, touched, w.n_kv_heads, symbols["B"]) as (thread, i, kv, b):
                        append.rounded(thread, i, kv, b)
                if not w.in_place:
                    with launch(_THREADS, symbols["blocks"], w.n_kv_heads, symbols["B"]) as (thread, block, kv, b):
                        append.block(thread, block, kv, b)
        return ib.get()


class _Append:
    def __init__(self, workload: KVAppendWorkload, buffers: dict[str, Any], symbols: dict[str, Any]) -> None:
        self.w, self.buffers, self.symbols = workload, buffers, symbols

    def token(self, thread: Any, s: Any, b: Any) -> None:
        """Rotate the queries of one token; in place, put its keys and values at its position."""
        w, D = self.w, self.w.head_dim
        if w.rope:
            source = self.buffers["qkv" if w.packed_qkv else "q_in"]
            with strided(w.n_heads * D, thread, _THREADS) as i:
                head, d = T.bind(T.floordiv(i, T.int64(D))), T.bind(T.floormod(i, T.int64(D)))
                T.buffer_store(self.buffers["q"], self._rotated(source, b, s, head * D, d), [b, s, i])
        if w.in_place and w.kv_cache == "float32":
            position = Cell(self.buffers["kv_len"][b] - self.symbols["S"] + s, "int64").v
            with T.If(position >= T.int64(0)), T.Then(), strided(w.n_kv_heads * D, thread, _THREADS) as i:
                kv, d = T.bind(T.floordiv(i, T.int64(D))), T.bind(T.floormod(i, T.int64(D)))
                place = self._place(b, kv, T.floordiv(position, T.int64(BLOCK)))
                at = T.floormod(position, T.int64(BLOCK))
                T.buffer_store(self.buffers["kp"], self._key(b, s, kv, d), [*place, d, at])
                row = [*place, at] if w.paged else [b, kv, position]
                T.buffer_store(self.buffers["v"], self._value(b, s, kv, d), [*row, d])

    def rounded(self, thread: Any, i: Any, kv: Any, b: Any) -> None:
        """What the call brings to the i-th block of the cache that it may reach."""
        start = Cell(self.buffers["kv_len"][b] - self.symbols["S"], "int64").v
        block = T.bind(T.floordiv(T.max(start, T.int64(0)), T.int64(BLOCK)) + i)
        rounding = DeviceRounding(self.w, self.buffers, self.symbols)
        key, value = (lambda s, d, f=f: f(b, s, kv, d) for f in (self._key, self._value))
        with T.If(block < self.symbols["CB"]), T.Then():
            rounding.block(thread, self._place(b, kv, block), block * BLOCK, start, key, value)

    def _place(self, b: Any, kv: Any, block: Any) -> list[Any]:
        """Leading indices of a block in keys, values and planes."""
        if not self.w.paged:
            return [b, kv, block]
        return [Cell(T.Cast("int64", self.buffers["table"][b, block]), "int64").v, kv]

    def block(self, thread: Any, block: Any, kv: Any, b: Any) -> None:
        """One block of the cache anew: what was there before, the new tokens, zeros in the keys behind them."""
        w, D = self.w, self.w.head_dim
        past = self.symbols["P"] if w.past else T.int64(0)
        end = self.symbols["total"]
        with strided(BLOCK * D, thread, _THREADS) as i:
            at, d = T.bind(T.floormod(i, T.int64(BLOCK))), T.bind(T.floordiv(i, T.int64(BLOCK)))
            position = T.bind(block * BLOCK + at)

            def put(key: Any, value: Any) -> None:
                T.buffer_store(self.buffers["kp"], key, [b, kv, block, d, at])
                T.buffer_store(self.buffers["v"], value, [b, kv, position, d])
                if w.present:
                    T.buffer_store(self.buffers["present_k"], key, [b, kv, position, d])

            with T.If(position < past):
                with T.Then():
                    if w.past:
                        put(*(self.buffers[name][b, kv, position, d] for name in ("past_k", "past_v")))
                with T.Else(), T.If(position < end):
                    with T.Then():
                        s = T.bind(position - past)
                        put(self._key(b, s, kv, d), self._value(b, s, kv, d))
                    with T.Else():
                        T.buffer_store(self.buffers["kp"], T.float32(0), [b, kv, block, d, at])

    def _key(self, b: Any, s: Any, kv: Any, d: Any) -> Any:
        w, D = self.w, self.w.head_dim
        if w.packed_qkv:
            return self._rotated(self.buffers["qkv"], b, s, (kv + w.n_heads) * D, d)
        return self._rotated(self.buffers["k_in"], b, s, kv * D, d)

    def _value(self, b: Any, s: Any, kv: Any, d: Any) -> Any:
        w, D = self.w, self.w.head_dim
        if w.packed_qkv:
            return self.buffers["qkv"][b, s, (kv + w.n_heads + w.n_kv_heads) * D + d]
        return self.buffers["v_in"][b, s, kv * D + d]

    def _rotated(self, source: Any, b: Any, s: Any, start: Any, d: Any) -> Any:
        """Dimension d of the head that begins at column `start`: x cos - y sin, or y cos + x sin of its pair."""
        w, half = self.w, self.w.rotary // 2
        own = source[b, s, start + d]
        if not half:
            return own
        if w.interleaved:
            angle, second = T.floordiv(d, T.int64(2)), T.floormod(d, T.int64(2)) == T.int64(1)
            other = T.Select(second, d - 1, d + 1)
        else:
            second = d >= T.int64(half)
            angle = T.Select(second, d - half, d)
            other = T.Select(second, d - half, d + half)
        cos, sin = (self.buffers[name][b, s, angle] for name in ("cos", "sin"))
        pair = source[b, s, start + other]
        rotated = own * cos + T.Select(second, pair * sin, T.float32(0) - pair * sin)
        return rotated if w.rotary == w.head_dim else T.if_then_else(d < T.int64(w.rotary), rotated, own)


CUDA_KV_APPEND = CudaKVAppend()
