"""CUDA graphs: what a call launches on a GPU is kept, and launched again as a whole.

A model's token is hundreds of launches of a few microseconds each, which the host would take longer to ask for than the
device to do. All sizes of a launch come from the shapes of its arguments: how many tokens a cache holds is read by the
kernels, from the device's memory. So the same launches serve every token, as long as nothing moves.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import tvm_ffi

from llmc.runtime.cuda import Graph
from llmc.runtime.gpu import GpuMemory

if TYPE_CHECKING:
    from llmc.runtime.model import Function, Model


class Replayed:
    """A function's call with arguments that stay where they are. The first time it is called as any other, which loads
    kernels and fills the pool of memory; the second time it is captured; from then on it is replayed."""

    def __init__(self, model: Model, function: Function, arguments: tuple[Any, ...]) -> None:
        self._model, self._function, self._arguments = model, function, arguments
        self._warm = False
        self._graph: Graph | None = None
        self._held: list[Any] = []  # memory of intermediate values, which the launches go on using
        self._result: Any = None

    def run(self) -> Any:
        """The function's first result: the same tensor each time it is replayed."""
        memory = self._model.memory
        assert isinstance(memory, GpuMemory)
        if self._graph is None and self._warm and memory.graphs and not self._model.observed:
            self._capture(memory)
        self._warm = True
        if self._graph is None:
            return first(self._function.run(self._arguments))
        self._graph.launch()
        return self._result

    def _capture(self, memory: GpuMemory) -> None:
        """Leaves plain calls where the driver captures nothing, and says so once."""

        def hold(function: Any, symbol: str, before: bool, result: Any, *arguments: Any) -> None:
            if not before and result is not None:
                self._held.append(result)

        def launch(stream: int) -> Any:
            return first(memory.run_on(stream, self._function.code, self._arguments))

        try:
            with self._model.watching(hold):
                self._graph, self._result = memory.cuda.capture(launch)
        except Exception as error:  # of CUDA, or of TVM
            self._held, memory.graphs = [], False
            reason = str(error).strip().splitlines()[-1]
            warnings.warn(f"CUDA graphs are not used: {reason}; every kernel is launched by itself", stacklevel=2)


def first(result: Any) -> Any:
    """A function's first result, alone or of several."""
    return result if isinstance(result, tvm_ffi.Tensor) else result[0]
