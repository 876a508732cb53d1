"""What is to be run on a GPU: kernels at their boundaries, models, sessions. Each function raises where results differ.

`test_hardware.py` calls these on a real GPU, `test_hardware_emulated.py` under the emulated driver, so that they are
known to run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

import llmc
from llmc.gpu.function import DeviceFunction, compile_function
from llmc.runtime.model import Model
from llmc.schedules.attention.cuda import CUDA_ATTENTION
from llmc.schedules.attention.cuda_append import CUDA_KV_APPEND
from llmc.schedules.attention.workloads import AttentionWorkload, KVAppendWorkload
from llmc.schedules.base import Arrays, Kernel
from llmc.schedules.embedding.cuda import CUDA_EMBEDDING
from llmc.schedules.embedding.dense import EmbeddingDenseWorkload
from llmc.schedules.gemm.bf16 import Bf16LinearWorkload
from llmc.schedules.gemm.cuda import CUDA_LINEAR, CUDA_LOWBIT
from llmc.schedules.gemm.cuda_mma import MMA_BF16, MMA_INT8, MMA_LOWBIT, HalfLinearWorkload
from llmc.schedules.gemm.dense import DenseLinearWorkload
from llmc.schedules.gemm.lowbit import LowBitLinearWorkload
from llmc.schedules.norm.cuda import CUDA_NORM
from llmc.schedules.norm.norm import NormWorkload
from llmc.targets.cuda import CudaTarget, newest
from llmc.targets.detect import compute_capability
from llmc.tune.gpu_subject import load, load_runtime
from llmc.tvm_shim import tvm

Dims = dict[str, int]
_ROWS = [{"M": M} for M in (1, 2, 8, 9, 16, 17, 33, 65)]
_FEW_KEYS = [
    {"B": 1, "S": 1, "CB": 1, "C": 64, "T": 64},
    {"B": 2, "S": 4, "CB": 5, "C": 320, "T": 320},
    {"B": 1, "S": 70, "CB": 2, "C": 128, "T": 128},
]
# Sizes divide nothing: tiles, steps and groups all end early.
CASES: dict[str, tuple[Kernel, list[Dims]]] = {
    "w4a16": (Kernel(MMA_LOWBIT, HalfLinearWorkload(40, 300, 4, 32, True, 8.0, "float16", activations="a32")), _ROWS),
    "w4a8": (Kernel(MMA_INT8, LowBitLinearWorkload(40, 300, 4, 32, True, 8.0, "float16")), _ROWS),
    "bf16": (Kernel(MMA_BF16, Bf16LinearWorkload(39, 300, bias=True, residual=True, activations="bf16")), _ROWS),
    "w4a32": (Kernel(CUDA_LOWBIT, LowBitLinearWorkload(37, 100, 4, 32, True, 8.0, activations="a32")), _ROWS),
    "float32": (Kernel(CUDA_LINEAR, DenseLinearWorkload(37, 50, bias=True, activation="gelu")), _ROWS),
    "norm": (Kernel(CUDA_NORM, NormWorkload(100, residual=True, sum_output=True)), _ROWS),
    "embedding": (Kernel(CUDA_EMBEDDING, EmbeddingDenseWorkload(91, 36)), _ROWS),
    "attention": (Kernel(CUDA_ATTENTION, AttentionWorkload(4, 2, 64, 0.125)), _FEW_KEYS),
    "attention in bfloat16": (Kernel(CUDA_ATTENTION, AttentionWorkload(4, 2, 64, 0.125, bf16=True)), _FEW_KEYS),
    "attention with a bias": (Kernel(CUDA_ATTENTION, AttentionWorkload(4, 4, 40, 0.2, key_bias=True)), _FEW_KEYS),
    "append": (Kernel(CUDA_KV_APPEND, KVAppendWorkload(4, 2, 64, in_place=True)), _FEW_KEYS),
}


def compiled(kernel: Kernel, target: CudaTarget) -> DeviceFunction:
    template, workload = kernel.template, kernel.workload
    return compile_function(template.build(workload, target, template.default(workload, target)), target)


class Loaded:
    """One function on the first GPU. `known` is told of every kernel before the driver gets it."""

    def __init__(self, function: DeviceFunction, known: Callable[[Any], None] = lambda kernel: None) -> None:
        load_runtime()
        for kernel in function.kernels.values():
            known(kernel)
        self.name = str(function.function.attrs["global_symbol"])
        self.device, self.module = tvm.cuda(0), load(function)

    def put(self, arrays: Mapping[str, np.ndarray]) -> list[Any]:
        return [tvm.runtime.tensor(np.ascontiguousarray(array), self.device) for array in arrays.values()]

    def __call__(self, *tensors: Any) -> None:
        self.module[self.name](*tensors)


def outputs_of(kernel: Kernel, dims: Mapping[str, int]) -> Arrays:
    """Arrays for the outputs, NaN or all bits set."""
    found = {}
    for arg in kernel.workload.outputs():
        array = np.empty(tuple(dims[s] if isinstance(s, str) else s for s in arg.shape), arg.dtype)
        array.reshape(-1).view(np.uint8)[:] = 0xFF
        found[arg.name] = array
    return found


def check_kernel(
    name: str, known: Callable[[Any], None] = lambda kernel: None, sizes: slice = slice(None)
) -> tuple[float, int]:
    """A kernel of `CASES` at all its sizes, or some: (the largest error over its tolerance, calls).

    Raises AssertionError where an output is farther from the reference than the template says.
    """
    kernel, points = CASES[name]
    template, workload = kernel.template, kernel.workload
    target = newest(compute_capability())
    config = template.default(workload, target)
    there = Loaded(compiled(kernel, target), known)
    rng = np.random.default_rng(0)
    weights = template.example_weights(workload, rng)
    packed = there.put(template.prepack(weights, workload, config, target))
    worst = 0.0
    for dims in points[sizes]:
        inputs = template.example_inputs(workload, dims, rng)
        given, made = there.put(inputs), there.put(outputs_of(kernel, dims))
        there(*given, *packed, *made)
        want = template.expected(workload, config, inputs, weights)
        got = dict(zip([arg.name for arg in workload.outputs()], made, strict=True))
        got |= dict(zip(inputs, given, strict=True))  # what is written in place
        for output, expected in want.items():
            off = float(np.abs(got[output].numpy().astype("f8") - expected).max(initial=0))
            most = template.tolerance(workload) * max(1.0, float(np.abs(expected).max(initial=0)))
            assert off <= most, f"{name} at {dims}: {output} is off by {off}, of {most}"  # NaN, too
            worst = max(worst, off / most)
    assert math.isfinite(worst)
    return worst, len(points[sizes])


def check_model(model: Path, artifact: Path, feeds: Mapping[str, np.ndarray], get: Callable[[Path], Model]) -> None:
    """Every output of a model that was compiled for the GPU equals onnxruntime's."""
    session = onnxruntime.InferenceSession(str(model))
    asked = {i.name: feeds[i.name] for i in session.get_inputs()}
    got = get(artifact).main(asked)
    for output, want in zip(session.get_outputs(), session.run(None, asked), strict=True):
        np.testing.assert_allclose(got[output.name], want, rtol=0, atol=1e-4, err_msg=output.name)


def check_session(cpu: Path, gpu: Path, get: Callable[[Path], Model]) -> None:
    """A session on the GPU says what one on the CPU does: a prompt, tokens one by one (a CUDA graph is replayed), a
    fork, a shorter past."""
    sessions = [llmc.load(cpu).session(), get(gpu).session()]

    def both(call: Callable[[Any], Any]) -> None:
        want, got = (call(session) for session in sessions)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)

    both(lambda session: session.append([[1, 2, 3, 4, 5]]))
    for token in range(6, 12):
        both(lambda session, token=token: session.append([[token]]))  # type: ignore[misc]
    both(lambda session: session.fork().append([[3, 1]]))
    for session in sessions:
        session.truncate(4)
    both(lambda session: session.append([[7]]))
