"""What kernels must show before they are shipped, read from their binaries and their TIR: no GPU is asked.

A launch that the driver would refuse is an error wherever it is compiled (`llmc.gpu.kernels`), as are spilled registers
of a template's kernel. The rest are promises of the templates, by name, which tests hold them to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmc.gpu.function import DeviceFunction
from llmc.gpu.predict import LaunchPrediction, predict
from llmc.schedules.base import Workload


@dataclass(frozen=True)
class Gates:
    """Of a template's kernels. `tensor_cores`: "hmma" or "imma", of those launched for more than one row. `wide`: inputs
    and weights of which a thread loads 16 bytes at once. `worst` and `mean`: the most ways of bank conflicts of one
    access, and of all. `occupancy`: the least share of a multiprocessor's warps that can run."""

    tensor_cores: str = ""
    wide: tuple[str, ...] = ()
    worst: float = 1.0
    mean: float = 1.0
    occupancy: float = 0.25


GATES: dict[str, Gates] = {}


def failures(
    function: DeviceFunction, workload: Workload, dims: Sequence[Mapping[str, int]], gates: Gates
) -> list[str]:
    """What kernels do not pass in calls with the workload's symbols bound to each of `dims`, a line for each."""
    wrong: dict[str, None] = {}
    seen = False
    for at in dims:
        for launch in predict(function, workload, at).launches:
            found = function.kernels[launch.kernel].resources
            seen |= bool(gates.tensor_cores) and bool(getattr(found, gates.tensor_cores))
            wrong |= dict.fromkeys(f"{launch.kernel} at {dict(at)}: {what}" for what in _judge(launch, function, gates))
    if gates.tensor_cores and not seen:
        wrong[f"no kernel has {gates.tensor_cores.upper()} instructions"] = None
    return list(wrong)


def _judge(launch: LaunchPrediction, function: DeviceFunction, gates: Gates) -> list[str]:
    wrong = []
    if spilled := function.kernels[launch.kernel].resources.spill_bytes:
        wrong.append(f"{spilled} bytes of registers are spilled")
    if launch.occupancy < gates.occupancy:
        wrong.append(f"an occupancy of {launch.occupancy:.3f}, below {gates.occupancy}")
    worst, mean = launch.demand.ways
    if worst > gates.worst or mean > gates.mean:
        wrong.append(f"bank conflicts of {worst:.2f} ways, {mean:.3f} in the mean, above {gates.worst}, {gates.mean}")
    names = [str(param.name) for param in function.function.params]
    for i, array in enumerate(launch.launched.arguments):
        number = getattr(array, "argument", None)
        width = launch.demand.width(i)
        if number is not None and names[number] in gates.wide and 0 < width < 16:
            wrong.append(f"{width:.1f} bytes of {names[number]} are loaded at once, not 16")
    return wrong
