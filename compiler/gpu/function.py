"""One PrimFunc for a GPU by itself: compiled without a model around it, to be judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmc.gpu.kernels import DeviceKernel, compile_kernels
from llmc.gpu.passes import lower
from llmc.schedules.base import Workload
from llmc.targets.cuda import CudaTarget
from llmc.tir_pipeline import mark_kernel
from llmc.tvm_shim import IRModule, PrimFunc, TvmTarget, tvm


@dataclass(frozen=True)
class DeviceFunction:
    """A function that a template built, lowered and compiled: what it launches, and its kernels by name."""

    function: PrimFunc
    host: PrimFunc
    kernels: dict[str, DeviceKernel]
    target: CudaTarget


def compile_function(function: PrimFunc, target: CudaTarget) -> DeviceFunction:
    """Raises OptionError where NVIDIA's tools are not installed, KernelError where they refuse a kernel."""
    name = str(function.attrs["global_symbol"])
    hosts, kernels = lower(IRModule({name: mark_kernel(function)}), TvmTarget(target.tvm()))
    compiled = {kernel.name: kernel for kernel in compile_kernels(kernels, target)}
    return DeviceFunction(function, hosts[name], compiled, target)


def names_of(function: DeviceFunction, workload: Workload) -> list[str]:
    """Of all arguments: inputs, weights as they are packed, outputs."""
    inputs, outputs = ([arg.name for arg in args] for args in (workload.inputs(), workload.outputs()))
    weights = [str(param.name) for param in function.function.params][len(inputs) :]
    return [*inputs, *weights[: len(weights) - len(outputs)], *outputs]


def arguments_of(
    function: DeviceFunction, workload: Workload, dims: Mapping[str, int]
) -> list[tuple[tuple[int, ...], int]]:
    """Shapes of all arguments, each with the bytes of an element: inputs, weights as they are packed, outputs."""
    inputs, outputs = workload.inputs(), workload.outputs()
    params = list(function.function.params)
    given = [*inputs, *[None] * (len(params) - len(inputs) - len(outputs)), *outputs]
    found = []
    for param, arg in zip(params, given, strict=True):
        sizes = param.shape if arg is None else [dims[s] if isinstance(s, str) else s for s in arg.shape]
        found.append((tuple(int(size) for size in sizes), int(tvm.runtime.DataType(str(param.dtype)).bits) // 8))
    return found
