"""Speed of the low-bit linear on a model's shapes, against this machine's measured ceilings.

    python benchmarks/linear.py                                   SmolLM2-135M, x86-avx512
    python benchmarks/linear.py --shapes 4096x4096 --rows 1,128   other shapes
    python benchmarks/linear.py --set MR=7 --set skinny=6         another configuration

Each call reads another copy of the weights, all copies together larger than the caches, as the layers of a model do.
The time is the mean over the copies of each one's least, less what an empty call costs.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from llmc.ceilings import compile_kernel, least, least_each, peak, read_bandwidth
from llmc.schedules.formats import QuantizedWeight
from llmc.schedules.gemm.lowbit import LOWBIT, LowBitLinearWorkload
from llmc.targets.base import Target
from llmc.targets.x86 import TARGETS
from llmc.tvm_shim import IRBuilder, T, tvm

COLD_BYTES = 160 << 20  # of weights read between two uses of the same copy

tensor = tvm.runtime.tensor


def pin_caller() -> None:
    """Keep the calling thread on the first core. TVM pins its workers to the others; a caller that the system moves
    next to one of them shares that core for seconds, and two threads are as slow as one."""
    tvm.runtime.num_threads()  # the pool takes the cores that the process has now
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


@dataclass(frozen=True)
class Case:
    name: str
    workload: LowBitLinearWorkload


def smollm2(bits: int, group: int, activations: str) -> list[Case]:
    """The linears of SmolLM2-135M; the output layer is 8-bit."""

    def case(name: str, N: int, K: int, bits: int = bits, **epilogue: Any) -> Case:
        zero = float(2 ** (bits - 1))
        return Case(name, LowBitLinearWorkload(N, K, bits, group, zero=zero, activations=activations, **epilogue))

    return [
        case("qkv", 960, 576),
        case("out", 576, 576, residual=True),
        case("gate_up", 3072, 576, activation="silu_mul"),
        case("down", 576, 1536, residual=True),
        case("head", 49152, 576, bits=8),
    ]


def empty_call(arguments: int, target: Target) -> float:
    """Seconds that calling a kernel of so many arguments costs."""
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name("empty")
        first, *_ = [T.arg(f"a{i}", T.Buffer((16,), "float32")) for i in range(arguments)]
        T.buffer_store(first, T.float32(0), [0])
    kernel, arrays = compile_kernel(ib.get(), target), [tensor(np.zeros(16, "float32")) for _ in range(arguments)]
    return least(lambda: [kernel(*arrays) for _ in range(100)], 0.1) / 100


def measure(case: Case, target: Target, rows: list[int], knobs: dict[str, int], seconds: float) -> dict[int, float]:
    """Seconds a call for each number of rows."""
    w, rng = case.workload, np.random.default_rng(0)
    config = LOWBIT.default(w, target) | knobs
    if config not in LOWBIT.space(w, target):
        raise SystemExit(f"{config} is not in the space of {case.name}")
    codes = rng.integers(0, 2**w.bits, (w.N, w.K), "uint8")
    scale = rng.random((w.N, -(-w.K // w.group_size)), "float32")
    weight = QuantizedWeight(codes, scale.astype(w.scale_dtype).astype("float32"), w.zero, w.bits, w.group_size)
    kernel = compile_kernel(LOWBIT.build(w, target, config), target)
    packed = list(LOWBIT.prepack({"weight": weight}, w, config, target).values())
    copies = 1 + COLD_BYTES // sum(p.nbytes for p in packed)
    weights = [[tensor(p) for p in packed] for _ in range(copies)]
    overhead = empty_call(len(w.inputs()) + len(packed) + 1, target)
    times = {}
    for M in rows:
        inputs = [tensor(rng.standard_normal((M, arg.shape[1]), "float32")) for arg in w.inputs()]
        y = tensor(np.zeros((M, w.columns), "float32"))
        calls = [partial(kernel, *inputs, *planes, y) for planes in weights]
        times[M] = least_each(calls, seconds) - overhead
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="x86-avx512", choices=TARGETS)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--activations", default="a8", choices=("a8", "a32"))
    parser.add_argument("--shapes", help="N×K as 4096x4096,11008x4096 (default: SmolLM2's)")
    parser.add_argument("--only", help="the SmolLM2 linears to take: qkv,out,gate_up,down,head")
    parser.add_argument("--rows", default="1,2,4,8,32,128,512")
    parser.add_argument("--set", action="append", default=[], metavar="KNOB=VALUE", dest="knobs")
    parser.add_argument("--seconds", type=float, default=0.4, help="for each figure")
    args = parser.parse_args()
    target, rows = TARGETS[args.target], [int(m) for m in args.rows.split(",")]
    knobs = {k: int(v) for k, v in (knob.split("=") for knob in args.knobs)}
    cases = smollm2(args.bits, args.group, args.activations)
    if args.only:
        cases = [case for case in cases if case.name in args.only.split(",")]
    if args.shapes:
        shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes.split(",")]
        zero = float(2 ** (args.bits - 1))
        cases = [
            Case(f"{N}x{K}", LowBitLinearWorkload(N, K, args.bits, args.group, zero=zero, activations=args.activations))
            for N, K in shapes
        ]
    pin_caller()
    bandwidth = read_bandwidth(target)
    compute = peak(target, "dot" if args.activations == "a8" else "fma")
    print(f"{tvm.runtime.num_threads()} threads; read {bandwidth / 1e9:.1f} GB/s, peak {compute / 1e9:.0f} GOP/s")
    for case in cases:
        for M, seconds in measure(case, target, rows, knobs, args.seconds).items():
            work = LOWBIT.work(case.workload, {"M": M})
            print(
                f"{case.name:10} M={M:4} {seconds * 1e6:9.1f} us  {work.bytes / seconds / 1e9:6.1f} GB/s "
                f"{work.bytes / seconds / bandwidth:5.0%}  {work.ops / seconds / 1e9:7.0f} GOP/s "
                f"{work.ops / seconds / compute:5.0%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
