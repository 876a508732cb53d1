"""The low-bit linear with weights of several widths, and with its bodies, called in turns.

    python benchmarks/widths.py                                  4, 3, 2 and 1 bits on the linears of SmolLM2-135M
    python benchmarks/widths.py --kernels w4,w3,w2:lut           others: bits, and the body ("dot" unless named)
    python benchmarks/widths.py --target x86-avx2 --rows 4       the AVX2 kernels; four rows

Copies of the weights, larger than the caches together, are read in turn, and the kernels take turns call by call: what
slows the machine meets all of them. A figure is the lower quartile of a kernel's calls, less what an empty call costs.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import Any

import numpy as np

from benchmarks.linear import COLD_BYTES, empty_call, smollm2, tensor
from llmc.ceilings import compile_kernel, pin_caller
from llmc.schedules.gemm.lowbit import LOWBIT, LowBitLinearWorkload
from llmc.targets.base import Target
from llmc.targets.x86 import TARGETS
from llmc.tvm_shim import for_sizes


def calls_of(w: LowBitLinearWorkload, body: str, M: int, target: Target) -> list[Any]:
    """One call for each copy of the weights."""
    rng = np.random.default_rng(0)
    config = LOWBIT.default(w, target) | ({"body": body} if body else {})
    func = for_sizes(LOWBIT.build(w, target, config), [arg.shape for arg in w.inputs()], [{"M": M}])
    kernel = compile_kernel(func, target)
    packed = list(LOWBIT.prepack(LOWBIT.example_weights(w, rng), w, config, target).values())
    inputs = [tensor(rng.standard_normal((M, arg.shape[1]), "float32")) for arg in w.inputs()]
    y = tensor(np.zeros((M, w.columns), "float32"))
    copies = 1 + COLD_BYTES // sum(p.nbytes for p in packed)
    return [partial(kernel, *inputs, *map(tensor, packed), y) for _ in range(copies)]


def race(racers: list[list[Any]], seconds: float) -> list[float]:
    """The lower quartile of each racer's times, taken in turns."""
    times: list[list[float]] = [[] for _ in racers]
    end, turn = time.perf_counter() + seconds, 0
    while turn < 20 or time.perf_counter() < end:
        for calls, took in zip(racers, times, strict=True):
            start = time.perf_counter()
            calls[turn % len(calls)]()
            took.append(time.perf_counter() - start)
        turn += 1
    return [float(np.quantile(took[2:], 0.25)) for took in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="x86-avx512", choices=TARGETS)
    parser.add_argument("--kernels", default="w4,w3,w2,w1", help="w<bits>[:<body>], the first is the base of ratios")
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--only", default="qkv,out,gate_up,down", help="the linear layers to take")
    parser.add_argument("--seconds", type=float, default=2, help="for each linear layer")
    args = parser.parse_args()
    target, names = TARGETS[args.target], args.kernels.split(",")
    pin_caller()
    totals = np.zeros(len(names))
    print(f"{f'{args.rows} rows, us a call':>21}: " + " ".join(f"{name:>9}" for name in names))
    for case in [case for case in smollm2(4, args.group, "a8") if case.name in args.only.split(",")]:
        racers, overheads = [], []
        for name in names:
            width, _, body = name.partition(":")
            bits = int(width[1:])
            zero = float(2 ** (bits - 1)) if bits > 1 else 0.0
            fields = vars(case.workload) | {"bits": bits, "zero": zero, "scale_dtype": "float16"}
            w = LowBitLinearWorkload(**fields)
            racers.append(calls_of(w, body, args.rows, target))
            overheads.append(empty_call(len(racers[-1][0].args), target))
        times = (np.array(race(racers, args.seconds)) - overheads) * 1e6
        totals += times
        print(f"{case.name:>21}: " + " ".join(f"{t:9.2f}" for t in times), flush=True)
    print(f"{'together':>21}: " + " ".join(f"{t:9.2f}" for t in totals))
    print(f"{'ratio':>21}: " + " ".join(f"{t / totals[0]:9.3f}" for t in totals))


if __name__ == "__main__":
    main()
