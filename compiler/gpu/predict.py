"""Predicted times of kernels: an analytic model over static signals. Never a measurement; it has not met hardware.

In the spirit of Hong & Kim, "An analytical model for a GPU architecture with memory-level and thread-level
parallelism awareness", ISCA 2009, and of the roofline (Williams et al., 2009). A block has a path, what it must wait
for one after another, and takes cycles of each pipe of its multiprocessor. The blocks that a multiprocessor holds at
once (as registers, threads and shared memory allow) share the pipes, and wait side by side: a wave of them takes the
path, or what the busiest pipe takes for all, whichever is longer. A launch is its waves; or what the second-level cache
or the memory take to move its bytes, if that is longer; and the time that any launch takes.

    function = compile_function(template.build(workload, target, config), target)
    seconds = predict(function, workload, {"M": 1}).seconds
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from llmc.errors import KernelError
from llmc.gpu.binary import occupancy
from llmc.gpu.demand import Demand, demand
from llmc.gpu.function import DeviceFunction, arguments_of
from llmc.gpu.host import Array, Launched, launched
from llmc.gpu.kernels import DeviceKernel
from llmc.schedules.base import Workload
from llmc.targets.cuda import CudaTarget
from llmc.tvm_shim import PrimFunc

# From one kernel of a stream to the next: 3.8 us for kernels of 2.9 us (NVIDIA, "Getting Started with CUDA Graphs",
# 2019, on a V100). The start of a kernel itself is in its path.
LAUNCH = 0.9e-6
_REACHED = 0.9  # of the data sheet's bandwidth: assumed


@dataclass(frozen=True)
class LaunchPrediction:
    """Of one launch: seconds, what limits it, the share of a multiprocessor's warps that can run, what it asks for."""

    launched: Launched
    seconds: float
    limit: str
    occupancy: float
    demand: Demand

    @property
    def kernel(self) -> str:
        return self.launched.kernel


@dataclass(frozen=True)
class Prediction:
    """Of one call of a function: what it launches, one after another."""

    launches: tuple[LaunchPrediction, ...]

    @property
    def seconds(self) -> float:
        return sum(launch.seconds for launch in self.launches)


def predict(function: DeviceFunction, workload: Workload, dims: Mapping[str, int]) -> Prediction:
    """One call of a template's function with the workload's symbols bound to `dims`.

    Raises KernelError where what is launched cannot be told from sizes.
    """
    content = max((dims[s] for s in ("total", "T", "C") if s in dims), default=64 * dims.get("CB", 0))
    arguments = arguments_of(function, workload, dims)
    return predict_call(function.host, function.kernels, arguments, content, function.target)


def predict_call(
    host: PrimFunc,
    kernels: Mapping[str, DeviceKernel],
    arguments: Sequence[tuple[tuple[int, ...], int] | int],
    content: int,
    target: CudaTarget,
    wanted: Collection[str] | None = None,
) -> Prediction:
    """One call of a lowered host function, with arguments as `llmc.gpu.host.launched` takes them; `content` stands for
    integers in memory. Of the kernels that it launches only those `wanted`. Raises as `predict` does."""
    found = launched(host, arguments, {name: kernel.launch for name, kernel in kernels.items()})
    found = [each for each in found if wanted is None or each.kernel in wanted]
    return Prediction(tuple(_launch(kernels[each.kernel], each, content, target) for each in found))


def _launch(kernel: DeviceKernel, launch: Launched, content: int, target: CudaTarget) -> LaunchPrediction:
    try:
        asked = demand(kernel.function, launch, content, target.pipes)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise KernelError(f"cannot be predicted: {error}", where=kernel.name) from error
    found = kernel.resources
    shared = found.shared_bytes + launch.shared
    share = occupancy(target, launch.threads, found.registers, shared)
    warps = -(-launch.threads // target.lanes)
    resident = max(round(share * target.threads / (warps * target.lanes)), 1)
    limits = {
        **_cycles(asked, launch, resident, target, found.spill_bytes),
        "L2": _bytes(asked, launch, launch.blocks) / target.pipes.l2 / target.pipes.clock,
        "memory": _bytes(asked, launch, 1) / (target.bandwidth * _REACHED),
    }
    limit = max(limits, key=lambda name: limits[name])
    return LaunchPrediction(launch, LAUNCH + limits[limit], limit, share, asked)


def _cycles(asked: Demand, launch: Launched, resident: int, target: CudaTarget, spills: int) -> dict[str, float]:
    """Seconds that the multiprocessors take, by what limits them."""
    pipes, lanes = target.pipes, target.lanes
    instructions = asked.floats + asked.specials + asked.integers + asked.others
    bytes_ = sum((*asked.reads.values(), *asked.writes.values())) + spills * launch.threads * launch.blocks
    pipe = {
        "issue": instructions / pipes.issue,
        "float": asked.floats * lanes / pipes.floats,
        "integer": asked.integers * lanes / pipes.integers,
        "special": asked.specials * lanes / pipes.specials,
        "tensor cores": sum(n / pipes.tensor_operations(kind) for kind, n in asked.tensor.items()),
        "shared memory": asked.shared,
        "L1": bytes_ / pipes.l1,
    }
    found = {"latency": _waves(launch.blocks, resident, target) * asked.path / pipes.clock}
    for name, cycles in pipe.items():
        # What the busiest multiprocessor gets of it.
        busiest = math.ceil(launch.blocks / target.multiprocessors) * cycles / launch.blocks
        found[name] = busiest / pipes.clock
    return found


def _waves(blocks: int, resident: int, target: CudaTarget) -> int:
    return math.ceil(blocks / (resident * target.multiprocessors))


def _bytes(asked: Demand, launch: Launched, readers: int) -> float:
    """What must come from a memory with so many caches before it: of each array what is asked for, but for each cache
    no more than there is."""
    total = 0.0
    for i, array in enumerate(launch.arguments):
        if isinstance(array, Array):
            total += min(asked.reads.get(i, 0.0), readers * array.bytes) + min(asked.writes.get(i, 0.0), array.bytes)
    return total
