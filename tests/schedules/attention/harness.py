"""Compile many attention kernels at once, and run them on arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from llmc.schedules.base import Config, Template, Workload
from llmc.targets.base import Target
from llmc.tir_pipeline import build_kernels
from llmc.tvm_shim import TvmTarget, tvm

Arrays = dict[str, np.ndarray]
Run = Callable[[str, Mapping[str, np.ndarray], Mapping[str, tuple[int, ...]]], Arrays]


def compile_all(kernels: Mapping[str, tuple[Template, Workload, Config]], target: Target) -> Run:
    """One library of all kernels; each is (template, workload, changes to the default configuration)."""
    functions = {
        name: template.build(w, target, template.default(w, target) | dict(changes))
        for name, (template, w, changes) in kernels.items()
    }
    module = build_kernels(functions, TvmTarget(target.tvm()))

    def run(name: str, inputs: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
        """Outputs (poisoned with NaN before the call), and the inputs as they are afterwards."""
        workload = kernels[name][1]
        tensors = {arg.name: tvm.runtime.tensor(inputs[arg.name]) for arg in workload.inputs()}
        for arg in workload.outputs():
            tensors[arg.name] = tvm.runtime.tensor(np.full(shapes[arg.name], np.nan, arg.dtype))
        module[name](*tensors.values())
        return {key: tensor.numpy() for key, tensor in tensors.items()}

    return run
