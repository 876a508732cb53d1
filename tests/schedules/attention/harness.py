"""Compile many attention kernels at once, and run them on arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from llmc.schedules.base import Template, Workload
from llmc.targets.base import Target
from llmc.tvm_shim import IRModule, TvmTarget, tvm

Run = Callable[[str, Mapping[str, np.ndarray], Mapping[str, tuple[int, ...]]], dict[str, np.ndarray]]


def missing_flags(target: Target) -> set[str]:
    return set(target.requires) - set(Path("/proc/cpuinfo").read_text().split())


def compile_all(kernels: Mapping[str, tuple[Template, Workload, Mapping[str, int | str]]], target: Target) -> Run:
    """One library of all kernels; each is (template, workload, changes to the default configuration)."""
    functions = {
        name: template.build(w, target, template.default(w, target) | dict(changes)).with_attr("global_symbol", name)
        for name, (template, w, changes) in kernels.items()
    }
    module = tvm.compile(IRModule(functions), target=TvmTarget(target.tvm()))

    def run(
        name: str, inputs: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, np.ndarray]:
        """Outputs (poisoned with NaN before the call), and the inputs as they are afterwards."""
        workload = kernels[name][1]
        tensors = {arg.name: tvm.runtime.tensor(inputs[arg.name]) for arg in workload.inputs()}
        for arg in workload.outputs():
            tensors[arg.name] = tvm.runtime.tensor(np.full(shapes[arg.name], np.nan, arg.dtype))
        module[name](*tensors.values())
        return {key: tensor.numpy() for key, tensor in tensors.items()}

    return run
