"""What this machine can do, measured by kernels from the same compiler and the same thread pool: the denominators of
profiles and benchmarks."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np

from llmc.targets.base import Target
from llmc.targets.intrinsics import Simd
from llmc.tvm_shim import IRBuilder, IRModule, T, TvmTarget, tvm


def compile_kernel(func: Any, target: Target) -> Any:
    """A PrimFunc as a callable of TVM tensors."""
    name = "kernel"
    module = IRModule({name: func.with_attr("global_symbol", name)})
    return tvm.compile(module, target=TvmTarget(target.tvm()))[name]


def pin_caller() -> None:
    """Keep the calling thread on the first core. TVM pins its workers to the others; a caller that the system moves
    next to one of them shares that core for seconds, and two threads are as slow as one."""
    tvm.runtime.num_threads()  # the pool takes the cores that the process has now
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def least(call: Callable[[], Any], seconds: float = 0.5) -> float:
    """Least wall time of `call` in seconds, over at least 3 calls: the quiet moments of a shared machine."""
    best, end, calls = float("inf"), time.perf_counter() + seconds, 0
    while calls < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
        calls += 1
    return best


def least_each(calls: Sequence[Callable[[], Any]], seconds: float = 0.5) -> float:
    """Mean over `calls` of each one's least wall time, taken in turns for `seconds`: a round of cold calls of which
    each found its quiet moment."""
    best, end, rounds = np.full(len(calls), np.inf), time.perf_counter() + seconds, 0
    while rounds < 4 or time.perf_counter() < end:
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - start)
        rounds += 1
    return float(best.mean())


@cache
def peak(target: Target, kind: str) -> float:
    """Operations a second of all threads: kind "fma" (float32) or "dot" (u8 x s8 into int32). 16 independent sums."""
    simd, threads, steps = Simd(target), tvm.runtime.num_threads(), 4_000
    dtype, R = ("float32" if kind == "fma" else "int32"), target.lanes
    chains = 16 if target.vector_registers >= 32 else 10
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name("peak")
        T.func_attr({"tirx.noalias": True})
        out = T.arg("out", T.Buffer((threads, R), dtype))
        with T.parallel(0, threads) as t:
            acc, x = [simd.reg(dtype) for _ in range(chains)], simd.reg(dtype)
            x.v = out[t, simd.span(0)]
            for i, r in enumerate(acc):  # different values, or LLVM may merge the chains
                r.v = x.v + simd.splat(T.Cast(dtype, i))
            with T.serial(0, steps):
                for r in acc:
                    if kind == "fma":
                        r.v = simd.fma(r.v, x.v, x.v)
                    else:
                        codes = T.reinterpret(f"uint8x{4 * R}", r.v)  # not x: its products would be loop invariants
                        r.v = simd.dot_u8s8(r.v, codes, T.reinterpret(f"int8x{4 * R}", x.v))
            for r in acc[1:]:
                acc[0].v = acc[0].v + r.v
            T.buffer_store(out, acc[0].v, [t, simd.span(0)])
    kernel = compile_kernel(ib.get(), target)
    data = tvm.runtime.tensor(np.zeros((threads, R), dtype))
    return threads * steps * chains * (2 if kind == "fma" else 8) * R / least(lambda: kernel(data), 1.0)


@cache
def read_bandwidth(target: Target, pieces: int = 64) -> float:
    """Bytes a second of a plain read of pieces of 8 MiB, together much larger than the cache, all threads."""
    simd, R = Simd(target), target.lanes
    rows, cols = (8 << 20) // (1024 * 4 * R), 1024
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name("read")
        T.func_attr({"tirx.noalias": True})
        data = T.arg("data", T.Buffer((rows, cols, R), "int32"))
        out = T.arg("out", T.Buffer((rows, R), "int32"))
        with T.parallel(0, rows) as r:
            acc = [simd.reg("int32") for _ in range(4)]
            for a in acc:
                a.v = simd.i32(0)
            with T.serial(0, cols // 4) as c:
                for j, a in enumerate(acc):
                    a.v = T.bitwise_or(a.v, data[r, c * 4 + j, simd.span(0)])
            T.buffer_store(out, acc[0].v + acc[1].v + acc[2].v + acc[3].v, [r, simd.span(0)])
    kernel = compile_kernel(ib.get(), target)
    sink = tvm.runtime.tensor(np.ones((rows, R), "int32"))
    arrays = [tvm.runtime.tensor(np.ones((rows, cols, R), "int32")) for _ in range(pieces)]
    return rows * cols * 4 * R / least_each([partial(kernel, array, sink) for array in arrays], 1.5)
