"""What is known of a GPU function once it is compiled: why it must not be used, and the counts of `features.BUILT`."""

from __future__ import annotations

from collections.abc import Iterable

from llmc.gpu.function import DeviceFunction
from llmc.gpu.gates import GATES, Gates, failures
from llmc.gpu.predict import Prediction
from llmc.tune.task import Task


def gate(function: DeviceFunction, task: Task, careful: bool) -> str:
    """Why no model should use these kernels; empty if nothing speaks against them. Spilled registers always do, with
    `careful` all that the template's shipped kernels promise."""
    spilled = {name: kernel.resources.spill_bytes for name, kernel in function.kernels.items()}
    wrong = [f"{name} spills {bytes_} bytes" for name, bytes_ in spilled.items() if bytes_]
    if careful and not wrong:
        gates = GATES.get(task.kernel.template.name, Gates())
        wrong = failures(function, task.kernel.workload, [point.sizes() for point in task.points], gates)
    return "; ".join(wrong)


def code_of(function: DeviceFunction, calls: Iterable[Prediction]) -> dict[str, float]:
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
