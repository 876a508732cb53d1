"""A configuration for a GPU, compiled: why it must not be used, and the counts of `features.GPU_BUILT`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from llmc.gpu.function import DeviceFunction, compile_function
from llmc.gpu.gates import GATES, Gates, failures
from llmc.gpu.predict import Prediction, predict
from llmc.schedules.base import Config
from llmc.targets.cuda import CudaTarget
from llmc.tune.task import Task

NAME = "kernel"  # of the function


@dataclass(frozen=True)
class Compiled:
    """`failed`: why no model should use it, empty if nothing speaks against it. `seconds` of a call, as predicted, by
    point (its text form). `code`: what its code shows."""

    function: DeviceFunction
    failed: str
    seconds: Mapping[str, float]
    code: dict[str, float]


def compiled(task: Task, config: Config, careful: bool) -> Compiled:
    """A configuration as models use it, under `NAME`. Spilled registers always speak against it; with `careful`, so
    does what breaks a promise of the template's shipped kernels.

    Raises what `compile_function` raises.
    """
    assert isinstance(task.target, CudaTarget)
    template, workload = task.kernel.template, task.kernel.workload
    func = template.build(workload, task.target, config).with_attr("global_symbol", NAME)
    function = compile_function(func, task.target)
    calls = {str(point): predict(function, workload, point.sizes()) for point in task.points}
    seconds = {point: call.seconds for point, call in calls.items()}
    return Compiled(function, _gate(function, task, careful), seconds, _code_of(function, calls.values()))


def _gate(function: DeviceFunction, task: Task, careful: bool) -> str:
    spilled = {name: kernel.resources.spill_bytes for name, kernel in function.kernels.items()}
    wrong = [f"{name} spills {bytes_} bytes" for name, bytes_ in spilled.items() if bytes_]
    if careful and not wrong:
        gates = GATES.get(task.kernel.template.name, Gates())
        wrong = failures(function, task.kernel.workload, [point.sizes() for point in task.points], gates)
    return "; ".join(wrong)


def _code_of(function: DeviceFunction, calls: Iterable[Prediction]) -> dict[str, float]:
    """The counts of the kernel that should take longest in these calls, and what they should take together."""
    launches = [launch for call in calls for launch in call.launches]
    longest = max(launches, key=lambda launch: launch.seconds)
    found = function.kernels[longest.kernel].resources
    return {
        "gpu_registers": found.registers,
        "gpu_spills": found.spill_bytes,
        "gpu_shared": found.shared_bytes + longest.launched.shared,
        "gpu_occupancy": longest.occupancy,
        "hmma": found.hmma,
        "imma": found.imma,
        "predicted_us": sum(launch.seconds for launch in launches) * 1e6,
    }
