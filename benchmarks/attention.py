"""Speed of attention, prefill and decode, against this machine's measured ceilings.

    python benchmarks/attention.py                                   x86-avx512, all cases
    python benchmarks/attention.py --case smollm2 --lengths 128,512  one model's heads, some lengths
    python benchmarks/attention.py --set BQ=64 --set MR=4            another configuration
    python benchmarks/attention.py --kv-cache float32,int8,int4      rounded caches beside the plain one

Prefill is judged by useful operations (masked ones do not count) against the FMA peak; decode, of one token, by keys
and values read against the memory's read bandwidth, with copies of the cache larger than the caches of the CPU, as
the layers of a model have. Times are the least of many calls, less what an empty call costs.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from llmc.ceilings import compile_kernel, least, peak, read_bandwidth
from llmc.schedules.attention.attention import ATTENTION
from llmc.schedules.attention.kv_append import KV_APPEND
from llmc.schedules.attention.kv_format import resolve_kv_cache
from llmc.schedules.attention.layout import BLOCK, size_in_bytes
from llmc.schedules.attention.workloads import AttentionWorkload, KVAppendWorkload
from llmc.schedules.base import Arg
from llmc.targets.base import Target
from llmc.targets.x86 import TARGETS
from llmc.tvm_shim import IRBuilder, T, tvm

COLD_BYTES = 128 << 20  # of keys and values read between two uses of the same copy

CASES = {
    "smollm2": AttentionWorkload(9, 3, 64, 64**-0.5),
    "llama": AttentionWorkload(32, 8, 128, 128**-0.5),
    "minilm": AttentionWorkload(12, 12, 32, 32**-0.5, causal=False, key_bias=True),
}

tensor = tvm.runtime.tensor


def array(arg: Arg, dims: Mapping[str, int], rng: np.random.Generator) -> np.ndarray:
    """Random numbers or codes; scales of a rounded cache are all 0.01."""
    shape = [dims[d] if isinstance(d, str) else d for d in arg.shape]
    if arg.name == "planes":
        return np.full(shape, 0.01, arg.dtype)
    if arg.dtype.endswith("int8"):
        return rng.integers(0, 100, shape, arg.dtype)
    return rng.standard_normal(shape, dtype=np.float32)


def arrays(w: AttentionWorkload, S: int, length: int, rng: np.random.Generator) -> list[Any]:
    """The kernel's arguments for one sequence."""
    blocks = -(-length // BLOCK)
    dims = {"B": 1, "S": S, "CB": blocks, "C": length, "T": length}
    values = {"kv_len": np.array([length])}
    for arg in (*w.inputs(), *w.outputs()):
        if arg.name != "kv_len":
            values[arg.name] = array(arg, dims, rng)
    return [tensor(values[arg.name]) for arg in (*w.inputs(), *w.outputs())]


def empty_call(arguments: int, target: Target) -> float:
    """Seconds that calling a kernel of so many arguments costs."""
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name("empty")
        first, *_ = [T.arg(f"a{i}", T.Buffer((16,), "float32")) for i in range(arguments)]
        T.buffer_store(first, T.float32(0), [0])
    kernel, args = compile_kernel(ib.get(), target), [tensor(np.zeros(16, "float32")) for _ in range(arguments)]
    return least(lambda: [kernel(*args) for _ in range(100)], 0.1) / 100


def append_time(w: AttentionWorkload, target: Target, S: int, seconds: float) -> float:
    """Seconds of the append in place of S tokens that goes before attention."""
    heads = {"n_heads": w.n_heads, "n_kv_heads": w.n_kv_heads, "head_dim": w.head_dim}
    append = KVAppendWorkload(**heads, rope=w.causal, in_place=True, kv_cache=w.kv_cache)
    kernel = compile_kernel(KV_APPEND.build(append, target, KV_APPEND.default(append, target)), target)
    blocks = -(-S // BLOCK)
    dims = {"B": 1, "S": S, "CB": blocks, "C": blocks * BLOCK}
    arguments = []
    for arg in (*append.inputs(), *append.outputs()):
        shape = [dims[d] if isinstance(d, str) else d for d in arg.shape]
        arguments.append(tensor(np.array([S]) if arg.name == "kv_len" else np.ones(shape, arg.dtype)))
    return least(lambda: kernel(*arguments), seconds) - empty_call(len(arguments), target)


@dataclass(frozen=True)
class Bench:
    """One compiled case, and the ceilings to compare with."""

    name: str
    w: AttentionWorkload
    target: Target
    kernel: Any
    overhead: float  # seconds of an empty call
    flops: float
    bandwidth: float
    seconds: float  # to spend on each figure

    def prefill(self, S: int) -> str:
        call = arrays(self.w, S, S, np.random.default_rng(0))
        seconds = least(lambda: self.kernel(*call), self.seconds) - self.overhead
        rate = ATTENTION.work(self.w, {"B": 1, "S": S, "CB": -(-S // BLOCK), "C": S, "T": S}).ops / seconds
        append = append_time(self.w, self.target, S, self.seconds / 4)
        return (
            f"{self.name:16} prefill {S:5} {seconds * 1e6:9.1f} us {rate / 1e9:7.1f} GFLOP/s {rate / self.flops:4.0%}"
            f"   append {append * 1e6:7.1f} us"
        )

    def decode(self, context: int) -> str:
        rng = np.random.default_rng(0)
        cache = [a for a in self.w.inputs() if a.name in ("kp", "v", "planes")]
        size = size_in_bytes(cache, {"B": 1, "CB": -(-context // BLOCK), "C": context})
        copies = [arrays(self.w, 1, context, rng) for _ in range(1 + COLD_BYTES // size)]
        hot = least(lambda: self.kernel(*copies[0]), self.seconds / 4) - self.overhead
        cold = least(lambda: [self.kernel(*c) for c in copies], self.seconds) / len(copies) - self.overhead
        return (
            f"{self.name:16} decode {context:6} {cold * 1e6:9.1f} us {size / cold / 1e9:7.1f} GB/s    "
            f"{size / cold / self.bandwidth:4.0%}   in cache {hot * 1e6:7.1f} us"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="x86-avx512", choices=TARGETS)
    parser.add_argument("--case", default=",".join(CASES))
    parser.add_argument("--kv-cache", default="float32", help="float32, int8, int4; several with commas")
    parser.add_argument("--lengths", default="128,512,2048", help="of prefill; empty for none")
    parser.add_argument("--contexts", default="128,512,2048,8192", help="of decode; empty for none")
    parser.add_argument("--set", action="append", default=[], metavar="KNOB=VALUE", dest="knobs")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each figure")
    args = parser.parse_args()
    target = TARGETS[args.target]
    knobs = {k: int(v) for k, v in (knob.split("=") for knob in args.knobs)}
    flops, bandwidth = peak(target, "fma"), read_bandwidth(target)
    print(f"{tvm.runtime.num_threads()} threads; read {bandwidth / 1e9:.1f} GB/s, FMA peak {flops / 1e9:.0f} GFLOP/s")
    for name, kv_cache in product(args.case.split(","), args.kv_cache.split(",")):
        w = replace(CASES[name], kv_cache=resolve_kv_cache(kv_cache))
        name = f"{name} {kv_cache}"
        config = ATTENTION.default(w, target) | knobs
        if config not in ATTENTION.space(w, target):
            raise SystemExit(f"{config} is not in the space of {name}")
        kernel = compile_kernel(ATTENTION.build(w, target, config), target)
        overhead = empty_call(len(w.inputs()) + 1, target)
        bench = Bench(name, w, target, kernel, overhead, flops, bandwidth, args.seconds)
        for S in filter(None, args.lengths.split(",")):
            print(bench.prefill(int(S)), flush=True)
        for context in filter(None, args.contexts.split(",") if w.causal else ()):
            print(bench.decode(int(context)), flush=True)


if __name__ == "__main__":
    main()
