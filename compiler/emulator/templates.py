"""A template's kernels on the CPU: a call's launches are read from its host function, and the emulator runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from llmc.emulator.emulator import Emulator, poisoned
from llmc.gpu.host import Array, launched
from llmc.gpu.passes import lower
from llmc.schedules.base import Arrays, Config, Template, bind_dims
from llmc.targets.cuda import CudaTarget
from llmc.tir_pipeline import mark_kernel
from llmc.tvm_shim import IRModule, TvmTarget, cuda_source

_ENTRY = "call"  # always the same, so that equal kernels are compiled for the CPU once


class EmulatedKernel:
    """A template's kernels for a workload, in a configuration (None: the default).

    `emulators` has them by name, `launched` names those of the last call, in order. `change` is given each kernel's
    name and CUDA C, and returns what is emulated. Raises TranslationError, BuildError for what cannot be.
    """

    def __init__(
        self,
        template: Template,
        workload: Any,
        target: CudaTarget,
        config: Config | None = None,
        change: Callable[[str, str], str] = lambda name, source: source,
    ) -> None:
        self.template, self.workload, self.target = template, workload, target
        self.config = config or template.default(workload, target)
        function = template.build(workload, target, self.config).with_attr("global_symbol", _ENTRY)
        device = TvmTarget(target.tvm())
        host, kernels = lower(IRModule({_ENTRY: mark_kernel(function)}), device)
        self._host, self._launches = host[_ENTRY], {name: launch for name, (_, launch) in kernels.items()}
        self.emulators = {
            name: Emulator(change(name, cuda_source(name, kernel, device))) for name, (kernel, _) in kernels.items()
        }
        self.launched: list[str] = []
        self._seed = 0  # another one for each launch: equal calls run their threads in other orders

    def run(self, inputs: Mapping[str, np.ndarray], packed: Arrays) -> Arrays:
        """Inputs, weights and outputs after a call, in copies. Outputs begin as NaN.

        Raises EmulationError for what a kernel must not do, KernelError where launches depend on more than sizes.
        """
        dims = bind_dims(self.workload.inputs(), inputs)
        arrays = {name: np.array(array) for name, array in (*inputs.items(), *packed.items())}
        for arg in self.workload.outputs():
            arrays[arg.name] = poisoned(tuple(dims[s] if isinstance(s, str) else s for s in arg.shape), arg.dtype)
        places, workspaces = list(arrays.values()), dict[int, np.ndarray]()
        self.launched.clear()

        def given(value: Any) -> Any:
            if not isinstance(value, Array):
                return value
            if value.argument is not None:
                return places[value.argument]
            return workspaces.setdefault(id(value), poisoned(value.bytes // 4, np.float32))

        for call in launched(self._host, [(a.shape, a.itemsize) for a in places], self._launches):
            self.launched.append(call.kernel)
            self._seed += 1
            arguments = [given(value) for value in call.arguments]
            emulator = self.emulators[call.kernel]
            emulator.launch(call.kernel, call.grid, call.block, arguments, call.shared, self._seed)
        return arrays
