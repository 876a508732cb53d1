"""A candidate for a GPU as what is loaded: host code as for CPUs, and beside it the kernels' modules."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llmc.gpu.function import DeviceFunction
from llmc.schedules.base import Config
from llmc.tune.gpu_code import NAME, compiled
from llmc.tune.subject import Rejected
from llmc.tune.task import Task
from llmc.tvm_shim import IRModule, TvmTarget, tvm


def build_function(task: Task, config: Config, careful: bool) -> tuple[DeviceFunction, dict[str, float]]:
    """A configuration, compiled as models use it, and what its code shows.

    Raises Rejected if it fails a gate and is not the default, and what `compiled` raises.
    """
    made = compiled(task, config, careful)
    if made.failed and config != task.kernel.template.default(task.kernel.workload, task.target):
        raise Rejected("gate", made.failed)
    return made.function, made.code


def host_module(function: DeviceFunction) -> Any:
    """Its host code, which calls kernels by name: those of the modules that are to be imported."""
    host = TvmTarget(function.target.tvm()).host
    return tvm.get_global_func("target.build.llvm")(IRModule({NAME: function.host}), host)


def build_library(task: Task, config: Config, careful: bool) -> tuple[bytes, Mapping[str, bytes], dict[str, float]]:
    """(shared library of the host code, modules of the kernels by name, what the code shows) of a configuration."""
    function, code = build_function(task, config, careful)
    with TemporaryDirectory(prefix="llmc-") as folder:
        library = Path(folder) / "kernel.so"
        host_module(function).export_library(str(library))
        return library.read_bytes(), {name: k.module for name, k in function.kernels.items()}, code
