"""One task inside a worker whose machine has a GPU: data and kernels are there, and CUDA's events time the calls."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmc.gpu.function import DeviceFunction
from llmc.runtime.device import load_cudart
from llmc.schedules.base import Config
from llmc.targets.cuda import CudaTarget
from llmc.tune.gpu_build import build_function, host_module
from llmc.tune.gpu_code import NAME
from llmc.tune.gpu_names import FLUSH
from llmc.tune.rounds import BURST, Round, alternate
from llmc.tune.subject import Candidate, Case, Subject
from llmc.tune.task import Task, Timing
from llmc.tvm_shim import tvm, tvm_ffi

_RUNTIME = "libtvm_runtime_cuda.so"
_FLUSHED = 2  # buffers of so many times the second-level cache leave nothing else in it


@dataclass(frozen=True)
class _Loaded(Candidate):
    """A kernel on the GPU, in a module of its own."""

    module: Any


class GpuSubject(Subject):
    """A task's data on this machine's first GPU. Kernels are built as models use them, `careful` or not.

    Raises whatever building the default raises, and `Rejected` if it is wrong.
    """

    def __init__(self, task: Task, careful: bool, seed: int) -> None:
        assert isinstance(task.target, CudaTarget)
        load_runtime()
        self.device = tvm.cuda(0)
        shape = (math.ceil(_FLUSHED * task.target.l2_bytes / 4),)
        self.scratch = [tvm.runtime.empty(shape, "float32", self.device) for _ in range(2)]
        super().__init__(task, careful, seed)

    def build(self, config: Config) -> Candidate:
        """Compile a configuration, load it and pack the weights for it. Raises Rejected for what fails a gate."""
        function, code = build_function(self.task, config, self.careful)
        module = load(function)
        return _Loaded(module[NAME], *self._packed(config), code, config, module)

    def _there(self, array: np.ndarray) -> Any:
        return tvm.runtime.tensor(array, self.device)

    def _copies(self, size: int) -> int:
        return 1  # caches are flushed

    def _race(self, candidate: Candidate, case: Case) -> Timing:
        """Weights and cold inputs come from memory in every call; other inputs were just written."""
        warm = {arg.name for arg in self.kernel.workload.inputs() if not arg.cold}
        inputs = {name: self._there(array) for name, array in case.inputs.items()}
        twins = [(self._there(case.inputs[name]), inputs[name]) for name in case.inputs if name in warm]
        outputs = self._outputs(case).values()

        def flush(*_: Any) -> None:
            self.scratch[0].copyto(self.scratch[1])
            for source, tensor in twins:
                source.copyto(tensor)

        tvm_ffi.register_global_func(FLUSH, flush, override=True)

        def timer(racer: Candidate) -> Round:
            assert isinstance(racer, _Loaded)
            evaluate = racer.module.time_evaluator(
                NAME, self.device, number=1, repeat=BURST, f_preproc=FLUSH, limit_zero_time_iterations=1
            )
            return lambda: list(evaluate(*inputs.values(), *racer.packed[0], *outputs).results)

        return alternate(timer(candidate), timer(self.default), self.careful)


def load(function: DeviceFunction) -> Any:
    """A compiled function as a module that can be called: host code from memory, kernels as the driver takes them."""
    host = host_module(function)
    from_bytes = tvm_ffi.get_global_func("ffi.Module.load_from_bytes.cuda")
    for kernel in function.kernels.values():
        host.import_module(from_bytes(kernel.module))
    return host


def load_runtime() -> None:
    """TVM's runtime library for CUDA, and NVIDIA's, unless they are there. Raises ArtifactError where one is missing,
    OSError where it cannot be loaded."""
    if tvm_ffi.get_global_func("device_api.cuda", allow_missing=True) is None:
        load_cudart("tuning")
        ctypes.CDLL(str(Path(tvm.__file__).parent / "lib" / _RUNTIME), ctypes.RTLD_GLOBAL)
