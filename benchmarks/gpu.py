"""First day on hardware: kernels on this machine's NVIDIA GPU, against their references, torch, and the predictions.

    python benchmarks/gpu.py                                  every shipped kernel
    python benchmarks/gpu.py --only "SmolLM2 w4a16" --json gpu.json
    python benchmarks/gpu.py --emulate                        two small kernels under the emulated driver: that this
                                                              script runs; its times mean nothing

Times are CUDA events' (TVM's device timer), the median of single calls, with the second-level cache emptied before
each. torch multiplies the same sizes: float16 for the formats that round x, bfloat16, or float32. What the analytic
model predicts is compared by ranks alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import kendalltau, spearmanr

sys.path.insert(0, str(Path(__file__).parent.parent))  # kernels and how they are run are the tests', too

from llmc.gpu.function import DeviceFunction
from llmc.gpu.predict import predict
from llmc.schedules.base import Kernel
from llmc.targets.cuda import newest
from llmc.targets.detect import compute_capability
from llmc.tune.gpu_names import FLUSH
from llmc.tvm_shim import tvm, tvm_ffi
from tests.gpu.hardware import CASES, Loaded, compiled, outputs_of
from tests.gpu.shipped import shipped
from tests.gpu.tools import points

_WEIGHTS = 1 << 28  # elements of a weight that are checked against the reference, at most


@dataclass(frozen=True)
class Result:
    """One kernel at one size: seconds that were measured and predicted, the largest error over its tolerance (None
    where the reference would take too long), and torch's seconds over ours, where torch has the same."""

    name: str
    sizes: str
    measured_us: float
    predicted_us: float
    limit: str
    error: float | None
    torch_ratio: float | None


class Device:
    """The first GPU, and how calls are timed there."""

    def __init__(self, l2_bytes: int, repeat: int, emulated: bool) -> None:
        self.repeat, self.emulated = repeat, emulated
        self.bytes = 2 * l2_bytes if not emulated else 1 << 12
        self.scratch: list[Any] = []

    def load(self, function: DeviceFunction) -> Loaded:
        return Loaded(function, _register if self.emulated else lambda kernel: None)

    def seconds(self, there: Loaded, tensors: list[Any]) -> float:
        """The median of single calls."""
        if not self.scratch:
            self.scratch = [tvm.runtime.empty((self.bytes // 4,), "float32", there.device) for _ in range(2)]

        def flush(*_: Any) -> None:
            self.scratch[0].copyto(self.scratch[1])

        tvm_ffi.register_global_func(FLUSH, flush, override=True)
        timer = there.module.time_evaluator(
            there.name, there.device, number=1, repeat=self.repeat, f_preproc=FLUSH, limit_zero_time_iterations=1
        )
        return float(np.median(timer(*tensors).results))


def measure(
    name: str, kernel: Kernel, function: DeviceFunction, sizes: list[dict[str, int]], device: Device
) -> list[Result]:
    """Numerics first: who computes wrong is not timed. Raises AssertionError."""
    template, workload, target = kernel.template, kernel.workload, function.target
    config = template.default(workload, target)
    there, rng = device.load(function), np.random.default_rng(0)
    weights = template.example_weights(workload, rng)
    packed = there.put(template.prepack(weights, workload, config, target))
    found = []
    for dims in sizes:
        inputs = template.example_inputs(workload, dims, rng)
        given, made = there.put(inputs), there.put(outputs_of(kernel, dims))
        there(*given, *packed, *made)
        error = None
        if work(kernel) * dims.get("M", 1) < _WEIGHTS:
            error = off(
                kernel, config, inputs, weights, dict(zip([a.name for a in workload.outputs()], made, strict=True))
            )
            assert error <= 1, f"{name} at {dims} is wrong: {error:.1f} times its tolerance"
        seconds = device.seconds(there, [*given, *packed, *made])
        call = predict(function, workload, dims)
        limit = max(call.launches, key=lambda launch: launch.seconds).limit
        ours = Result(
            name,
            _text(dims),
            1e6 * seconds,
            1e6 * call.seconds,
            limit,
            error,
            torch_ratio(kernel, dims, seconds, device),
        )
        print(_line(ours), flush=True)
        found.append(ours)
    return found


def off(kernel: Kernel, config: Any, inputs: Any, weights: Any, got: Mapping[str, Any]) -> float:
    """The largest error of an output over its tolerance."""
    want = kernel.template.expected(kernel.workload, config, inputs, weights)
    ratios = [0.0]
    for output, tensor in got.items():
        most = kernel.template.tolerance(kernel.workload) * max(1.0, float(np.abs(want[output]).max(initial=0)))
        ratios.append(float(np.abs(tensor.numpy().astype("f8") - want[output]).max(initial=0)) / most)
    return max(ratios)


def work(kernel: Kernel) -> int:
    """Elements of a linear layer's weight; 1 for others."""
    return int(getattr(kernel.workload, "N", 1)) * int(getattr(kernel.workload, "K", 1))


def torch_ratio(kernel: Kernel, dims: Mapping[str, int], ours: float, device: Device) -> float | None:
    """cuBLAS's time for the product alone, over ours: above 1 we are faster. None without torch, and for others."""
    try:
        import torch
    except ImportError:
        return None
    if device.emulated or not hasattr(kernel.workload, "N") or "M" not in dims or not torch.cuda.is_available():
        return None
    named = {"bf16_mma": torch.bfloat16, "dense_cuda": torch.float32}
    dtype = named.get(kernel.template.name, torch.float16)
    x, w = (torch.randn(rows, kernel.workload.K, device="cuda", dtype=dtype) for rows in (dims["M"], kernel.workload.N))
    scratch = torch.empty(device.bytes, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(device.repeat + 3):
        scratch.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        torch.nn.functional.linear(x, w)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return float(np.median(times[3:])) / ours


def _register(kernel: Any) -> None:
    from llmc.emulator import driver

    driver.register_kernel(kernel.name, kernel.source, kernel.module)


def _text(dims: Mapping[str, int]) -> str:
    return " ".join(f"{name}={size}" for name, size in dims.items())


def _line(r: Result) -> str:
    error = "not checked" if r.error is None else f"error {r.error:.2f} of tolerance"
    torch = "" if r.torch_ratio is None else f", torch {r.torch_ratio:.2f} x"
    what = f"{r.measured_us:9.2f} us, predicted {r.predicted_us:9.2f} us ({r.limit}), {error}{torch}"
    return f"{r.name:34} {r.sizes:32} {what}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="kernels whose names contain this")
    parser.add_argument("--repeat", type=int, default=20, help="calls that are timed, for each size")
    parser.add_argument("--emulate", action="store_true", help="under the emulated driver; times mean nothing")
    parser.add_argument("--json", type=Path, help="write all results there")
    args = parser.parse_args()
    capability = (8, 0) if args.emulate else compute_capability()
    if capability is None:
        print("skipped: this machine has no NVIDIA GPU, or no driver; --emulate runs the script without")
        return
    target = newest(capability)
    if args.emulate:
        chosen = {name: (CASES[name][0], CASES[name][1][:2]) for name in ("w4a16", "norm")}
    else:
        chosen = {name: (kernel, points(kernel)) for name, kernel in shipped().items() if args.only in name}
    functions = {name: compiled(kernel, target) for name, (kernel, _) in chosen.items()}
    if args.emulate:  # only now: NVIDIA's compiler does not run beside it
        from llmc.emulator import driver

        driver.install(capability)
    device = Device(target.l2_bytes, 2 if args.emulate else args.repeat, args.emulate)
    results: list[Result] = []
    wrong: list[str] = []
    for name, (kernel, sizes) in chosen.items():
        try:
            results += measure(name, kernel, functions[name], sizes, device)
        except AssertionError as error:
            wrong.append(str(error))
            print(error, flush=True)
    pairs = [(r.measured_us, r.predicted_us) for r in results]
    ranks: dict[str, float] = {}
    if len(pairs) > 2:
        ranks = {"spearman": float(spearmanr(*zip(*pairs, strict=True))[0])}
        ranks["kendall"] = float(kendalltau(*zip(*pairs, strict=True))[0])
    what = "emulated: times mean nothing" if args.emulate else f"{target.name}, measured"
    print(f"{len(results)} sizes ({what}), {len(wrong)} wrong; ranks of predicted and measured:", ranks or "too few")
    if args.json:
        report = {"device": what, "ranks": ranks, "wrong": wrong, "results": [asdict(r) for r in results]}
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
