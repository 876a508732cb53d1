"""Kernels of GPU templates on the CPU: the real host function launches them, the emulator of CUDA C runs them."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.emulator.emulator import Emulator, poisoned
from llmc.gpu.launch import Launch
from llmc.gpu.passes import lower
from llmc.schedules.base import Arrays, Config, Template, bind_dims
from llmc.targets.cuda import CudaTarget
from llmc.tir_pipeline import mark_kernel
from llmc.tvm_shim import IRModule, TvmTarget, cuda_source, tvm, tvm_ffi

_numbers = itertools.count()
_libc = ctypes.CDLL(None)
_libc.malloc_usable_size.restype = ctypes.c_size_t


class _Memory(dict[int, np.ndarray]):
    """Arrays of the call in progress, by address. What is none of its arguments is a workspace, which has a whole
    allocation of the host's."""

    def __missing__(self, address: int) -> np.ndarray:
        size = _libc.malloc_usable_size(ctypes.c_void_p(address)) // 4
        return np.frombuffer((ctypes.c_float * size).from_address(address), np.float32)


_memory = _Memory()


@dataclass(frozen=True)
class EmulatedKernel:
    """A member of a template's family for a GPU, built for the emulator. `launched` names its kernels as they run;
    `emulators` has them by name."""

    template: Template
    workload: Any
    target: CudaTarget
    config: Config
    call: Any
    launched: list[str]
    emulators: Mapping[str, Emulator]

    def run(self, inputs: Mapping[str, np.ndarray], packed: Arrays) -> Arrays:
        """The outputs, which start as NaN, and the inputs as they are afterwards.

        Raises EmulationError for what a kernel must not do.
        """
        dims = bind_dims(self.workload.inputs(), inputs)
        outputs = {
            arg.name: poisoned(tuple(dims[s] if isinstance(s, str) else s for s in arg.shape), arg.dtype)
            for arg in self.workload.outputs()
        }
        arrays = [np.ascontiguousarray(a) for a in (*inputs.values(), *packed.values())] + list(outputs.values())
        tensors = [tvm.runtime.tensor(a) for a in arrays]
        _memory.clear()
        views = [np.from_dlpack(tensor) for tensor in tensors]
        _memory.update({view.ctypes.data: view for view in views})
        self.launched.clear()
        self.call(*tensors)
        return {name: t.numpy() for name, t in zip((*inputs, *packed, *outputs), tensors, strict=True)}


def emulate(
    template: Template,
    workload: Any,
    target: CudaTarget,
    config: Config | None = None,
    change: Callable[[str, str], str] = lambda name, source: source,
) -> EmulatedKernel:
    """The kernel of a workload, in a configuration (None: the default). `change` may replace a kernel's CUDA C."""
    config = config or template.default(workload, target)
    entry = f"emulated{next(_numbers)}"  # its kernels are found by their names, among all of the process
    function = mark_kernel(template.build(workload, target, config).with_attr("global_symbol", entry))
    device = TvmTarget(target.tvm())
    host, kernels = lower(IRModule({entry: function}), device)
    launched: list[str] = []
    emulators = {
        name: Emulator(change(name, cuda_source(name, kernel, device))) for name, (kernel, _) in kernels.items()
    }
    for name, (_, launch) in kernels.items():
        _register(name, emulators[name], launch, launched)
    tvm_ffi.register_global_func("__tvm_set_device", lambda *_: None, override=True)
    tvm_ffi.register_global_func("device_api.cuda", tvm_ffi.get_global_func("device_api.cpu"), override=True)
    library = tvm.get_global_func("target.build.llvm")(host, device.host)
    return EmulatedKernel(template, workload, target, config, library[entry], launched, emulators)


def _register(name: str, emulator: Emulator, launch: Launch, launched: list[str]) -> None:
    """What host code finds by the kernel's name: it gets the arguments, then the sizes that the launch has tags for."""

    def call(*values: Any) -> None:
        count = len(launch.arguments)
        sizes = dict(zip(launch.tags, values[count:], strict=True))
        grid, block = (tuple(int(sizes.get(f"{what}Idx.{axis}", 1)) for axis in "xyz") for what in ("block", "thread"))
        arguments = [
            _memory[_address(v)] if argument.pointer else v
            for argument, v in zip(launch.arguments, values[:count], strict=True)
        ]
        launched.append(name)
        emulator.launch(name, grid, block, arguments, int(sizes.get("tirx.use_dyn_shared_memory", 0)), len(launched))

    tvm_ffi.register_global_func(name, call, override=True)


def _address(value: Any) -> int:
    return int(value.value if isinstance(value, ctypes.c_void_p) else value)
