"""Speed of the fp32 linear on the shapes of SmolLM2-135M and MiniLM-L6, against this machine's ceilings and its peers.

    python benchmarks/dense.py                                     every shape, x86-avx512
    python benchmarks/dense.py --models minilm --rows 128          one model, one number of rows
    python benchmarks/dense.py --set MR=6 --set NV=4               another configuration

llmc computes the epilogue too; numpy (OpenBLAS) and onnxruntime only the product. All take turns within one run, each
turn a burst of calls, and the least time counts. Up to 8 rows every call reads another copy of the
weights, all copies together larger than the caches, as the layers of a model do.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from llmc.ceilings import compile_kernel, peak, read_bandwidth
from llmc.schedules.gemm.dense import DENSE, DenseLinearWorkload
from llmc.targets.base import Target
from llmc.targets.x86 import TARGETS
from llmc.tvm_shim import tvm

COLD_BYTES = 160 << 20  # of weights read between two uses of the same copy
COLD_ROWS = 8
Call = Callable[[], Any]

MODELS = {
    "smollm2": [
        DenseLinearWorkload(960, 576),
        DenseLinearWorkload(576, 576, residual=True),
        DenseLinearWorkload(3072, 576, activation="silu_mul"),
        DenseLinearWorkload(576, 1536, residual=True),
        DenseLinearWorkload(49152, 576),
    ],
    "minilm": [
        DenseLinearWorkload(1152, 384, bias=True),
        DenseLinearWorkload(384, 384, bias=True, residual=True),
        DenseLinearWorkload(1536, 384, bias=True, activation="gelu"),
        DenseLinearWorkload(384, 1536, bias=True, residual=True),
    ],
}


def in_turns(calls: Mapping[str, Call], seconds: float, burst: float = 0.02) -> dict[str, float]:
    """Least seconds of each call; a pause before each burst of calls lets the others' threads fall asleep."""
    best, end = dict.fromkeys(calls, float("inf")), time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < end:
        for name, call in calls.items():
            time.sleep(0.005)
            call()
            turn = time.perf_counter() + burst
            while (start := time.perf_counter()) < turn:
                call()
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def ours(w: DenseLinearWorkload, target: Target, knobs: Mapping[str, int]) -> Callable[[np.ndarray, int, int], Call]:
    """(weight, copies, M) -> the call that multiplies M rows by every copy."""
    config = DENSE.default(w, target) | knobs
    if config not in DENSE.space(w, target):
        raise SystemExit(f"{config} is not in the space of {w}")
    kernel, tensor = compile_kernel(DENSE.build(w, target, config), target), tvm.runtime.tensor

    def make(weight: np.ndarray, copies: int, M: int) -> Call:
        weights = {"weight": weight, "bias": np.zeros(w.N, np.float32)}
        packed = DENSE.prepack(weights, w, config, target)
        layers = [[tensor(p) for p in packed.values()] for _ in range(copies)]
        inputs = [tensor(np.ones((M, arg.shape[1]), np.float32)) for arg in w.inputs()]
        y = tensor(np.zeros((M, w.columns), np.float32))
        return lambda: [kernel(*inputs, *layer, y) for layer in layers]

    return make


def numpy_call(weight: np.ndarray, copies: int, M: int) -> Call:
    x, layers = np.ones((M, weight.shape[1]), np.float32), [weight.T.copy() for _ in range(copies)]
    y = np.empty((M, weight.shape[0]), np.float32)
    return lambda: [np.matmul(x, layer, out=y) for layer in layers]


def onnxruntime_call(weight: np.ndarray, copies: int, M: int) -> Call:
    """One MatMul for each copy, in one session. The copies differ, or onnxruntime would keep one of them."""
    N, K = weight.shape
    layers = [numpy_helper.from_array(weight.T + np.float32(i), f"w{i}") for i in range(copies)]
    nodes = [helper.make_node("MatMul", ["x", f"w{i}"], [f"y{i}"]) for i in range(copies)]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", K])
    y = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["M", N]) for i in range(copies)]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], y, layers), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = tvm.runtime.num_threads()
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input("x", np.ones((M, K), np.float32))
    for value in y:
        binding.bind_output(value.name)
    return lambda: session.run_with_iobinding(binding)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="x86-avx512", choices=TARGETS)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--rows", default="1,2,4,8,128,512")
    parser.add_argument("--set", action="append", default=[], metavar="KNOB=VALUE", dest="knobs")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each figure")
    args = parser.parse_args()
    target, rows = TARGETS[args.target], [int(m) for m in args.rows.split(",")]
    knobs = {k: int(v) for k, v in (knob.split("=") for knob in args.knobs)}
    compute, bandwidth = peak(target, "fma"), read_bandwidth(target)
    print(f"{tvm.runtime.num_threads()} threads; read {bandwidth / 1e9:.1f} GB/s, peak {compute / 1e9:.0f} GFLOP/s")
    for w in (w for model in args.models.split(",") for w in MODELS[model]):
        make = ours(w, target, knobs)
        weight = np.random.default_rng(0).standard_normal((w.N, w.K), np.float32)
        for M in rows:
            copies = 1 + COLD_BYTES // weight.nbytes if M <= COLD_ROWS else 1
            peers = {"numpy": numpy_call, "onnxruntime": onnxruntime_call}
            calls = {"llmc": make(weight, copies, M)} | {n: peer(weight, copies, M) for n, peer in peers.items()}
            times = {name: t / copies for name, t in in_turns(calls, args.seconds).items()}
            t, work = times["llmc"], DENSE.work(w, {"M": M})
            against = ", ".join(f"{times[name] / t:.2f}x {name}" for name in peers)
            print(
                f"{w.N:5}x{w.K:<5}{w.activation:9} M={M:<4}{t * 1e6:9.1f} us {work.ops / t / 1e9:7.1f} GFLOP/s "
                f"{work.ops / t / compute:4.0%} of peak, {work.bytes / t / 1e9:6.1f} GB/s "
                f"{work.bytes / t / bandwidth:4.0%} of read; {against}",
                flush=True,
            )


if __name__ == "__main__":
    main()
