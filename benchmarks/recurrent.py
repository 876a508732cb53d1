"""Speed of LSTM, GRU and RNN against onnxruntime, each model one node with constant weights.

    python benchmarks/recurrent.py                                   every operator and shape, native target
    python benchmarks/recurrent.py --ops LSTM --shapes 100,1,256,256 some; a shape is steps,batch,inputs,hidden

Both engines take turns within one run, each turn a burst of calls; a pause before each burst lets the other's threads
fall asleep. Inputs are bound beforehand: what Python does for a call is not counted. A time is printed twice, the least
and the median; the ratio is llmc's over onnxruntime's, of both: 1 and less is good.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

import llmc
from llmc.ceilings import pin_caller
from llmc.runtime.arrays import aligned, to_tensor

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
SHAPES = ("1,1,128,128", "32,1,64,64", "100,1,256,256", "100,8,256,256", "64,1,512,512", "50,32,512,1024")
# The operators: an exporter of PyTorch writes GRU with linear_before_reset.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "LSTM": ("LSTM", {}),
    "GRU": ("GRU", {"linear_before_reset": 1}),
    "GRU-before": ("GRU", {}),
    "RNN": ("RNN", {}),
}
Call = Callable[[], Any]


def model(kind: str, shape: tuple[int, int, int, int], both: bool) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """One node with random weights, and an input for it."""
    op, attrs = KINDS[kind]
    (S, B, width, H), D, G = shape, 2 if both else 1, GATES[op]
    rng = np.random.default_rng(0)
    sizes = {"w": (D, G * H, width), "r": (D, G * H, H), "b": (D, 2 * G * H)}
    weights = [numpy_helper.from_array(rng.standard_normal(s, np.float32) / H**0.5, n) for n, s in sizes.items()]
    way = "bidirectional" if both else "forward"
    node = helper.make_node(op, ["x", *sizes], ["y", "y_h"], hidden_size=H, direction=way, **attrs)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["steps", "batch", width])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["steps", D, "batch", H])
    h = helper.make_tensor_value_info("y_h", TensorProto.FLOAT, [D, "batch", H])
    graph = helper.make_graph([node], op, [x], [y, h], weights)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return made, {"x": rng.standard_normal((S, B, width), np.float32)}


def open_both(
    proto: onnx.ModelProto, x: Mapping[str, np.ndarray], target: str, threads: int, folder: Path
) -> dict[str, Call]:
    """Raises SystemExit if the two engines do not agree."""
    path = folder / "model.onnx"
    onnx.save(proto, path)
    llmc.compile(path, target=target).save(folder / "model.llmc")
    ours = llmc.load(folder / "model.llmc", threads=threads)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    theirs = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    error = float(np.abs(ours(x)["y"] - theirs.run(["y"], dict(x))[0]).max())
    if not error < 1e-4:
        raise SystemExit(f"{proto.graph.name}: the outputs differ by {error:.2g}")
    arguments = ours.main.arguments(to_tensor(aligned(array)) for array in x.values())
    binding = theirs.io_binding()
    for name, array in x.items():
        binding.bind_cpu_input(name, array)
    for value in theirs.get_outputs():
        binding.bind_output(value.name)
    return {"llmc": lambda: ours.main.run(arguments), "onnxruntime": lambda: theirs.run_with_iobinding(binding)}


def in_turns(calls: Mapping[str, Call], seconds: float, burst: float = 0.03) -> dict[str, list[float]]:
    """Seconds of every call but the first of each burst."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < end or min(map(len, times.values())) < 20:
        for name, call in calls.items():
            time.sleep(0.005)
            call()
            turn = time.perf_counter() + burst
            while (start := time.perf_counter()) < turn:
                call()
                times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="native")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ops", default=",".join(KINDS))
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="S,B,I,H")
    parser.add_argument("--directions", type=int, nargs="+", default=[1, 2], choices=(1, 2))
    parser.add_argument("--seconds", type=float, default=1.0, help="for each engine and figure")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if unknown := set(args.ops.split(",")) - set(KINDS):
        parser.error(f"no operator is called {', '.join(sorted(unknown))}; known: {', '.join(KINDS)}")
    rows, cores = [], os.sched_getaffinity(0)
    for kind in args.ops.split(","):
        for text in args.shapes:
            for directions in args.directions:
                S, B, width, H = map(int, text.split(","))
                with tempfile.TemporaryDirectory() as name:
                    proto, x = model(kind, (S, B, width, H), directions == 2)
                    os.sched_setaffinity(0, cores)  # which threads that are made now inherit
                    calls = open_both(proto, x, args.target, args.threads, Path(name))
                    pin_caller()
                    times = in_turns(calls, args.seconds)
                low = {name: min(t) for name, t in times.items()}
                middle = {name: statistics.median(t) for name, t in times.items()}
                row = {
                    **{"op": kind, "steps": S, "batch": B, "inputs": width, "hidden": H, "directions": directions},
                    **{f"{n}_{k}_us": round(v[n] * 1e6, 1) for k, v in (("least", low), ("median", middle)) for n in v},
                    "ratio_least": round(low["llmc"] / low["onnxruntime"], 3),
                    "ratio_median": round(middle["llmc"] / middle["onnxruntime"], 3),
                }
                rows.append(row)
                if not args.json:
                    print(
                        f"{kind:11}{text:16} x{directions}  llmc {low['llmc'] * 1e6:9.1f} {middle['llmc'] * 1e6:9.1f}"
                        f"  onnxruntime {low['onnxruntime'] * 1e6:9.1f} {middle['onnxruntime'] * 1e6:9.1f} us"
                        f"  ratio {row['ratio_least']:.2f} {row['ratio_median']:.2f}",
                        flush=True,
                    )
    if args.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
