"""What kernels must show before they are shipped, read from their binaries and their TIR: no GPU is asked.

A launch that the driver would refuse is an error wherever it is compiled (`llmc.gpu.kernels`), as are spilled registers
of a template's kernel. The rest are promises of the templates, by name, which tests hold them to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from llmc.gpu.function import DeviceFunction, names_of
from llmc.gpu.predict import LaunchPrediction, predict
from llmc.schedules.base import Workload


@dataclass(frozen=True)
class Gates:
    """Of a template's kernels. `tensor_cores`: "hmma" or "imma", which some kernel of a function must have. `wide`:
    inputs and weights of which a thread loads 16 bytes at once. `worst` and `mean`: the most ways of bank conflicts of
    one access, and of all. `occupancy`: the least share of a multiprocessor's warps that can run."""

    tensor_cores: str = ""
    wide: tuple[str, ...] = ()
    worst: float = 1.0
    mean: float = 1.0
    occupancy: float = 0.25


# Two warps for each scheduler are enough where products follow one another (`mma`); that is 8 of 64.
_TENSOR = Gates(wide=("q", "scale", "zero"), occupancy=0.125)
GATES = {
    # x of few rows is stored to shared memory in an order that suits the loads: once, in two wavefronts instead of one.
    "lowbit_mma": replace(_TENSOR, tensor_cores="hmma", worst=2.0, mean=1.5),
    # Sums of gate and up of several rows are read from shared memory with 2 ways, once at the end.
    "int8_mma": replace(_TENSOR, tensor_cores="imma", worst=2.0, mean=1.3),
    "bf16_mma": replace(_TENSOR, tensor_cores="hmma", worst=2.0, mean=1.5),
    # float32 for layers that must keep it: neighbouring threads load neighbouring elements, but each only one.
    "dense_cuda": Gates(occupancy=0.5),
    "lowbit_cuda": Gates(occupancy=0.5),
    "table_cuda": Gates(occupancy=0.5),
    # A block of 128 threads needs up to 247 registers each for prompts with 128 dimensions: one block, four warps.
    "attention_cuda": Gates(wide=("kp", "v"), worst=2.0, mean=1.06, occupancy=0.0625),
    "kv_append_cuda": Gates(occupancy=0.5),
    "norm_cuda": Gates(),
    "embedding_cuda": Gates(),
    "embedding_lowbit_cuda": Gates(),
}


def failures(
    function: DeviceFunction, workload: Workload, dims: Sequence[Mapping[str, int]], gates: Gates
) -> list[str]:
    """What kernels do not pass in calls with the workload's symbols bound to each of `dims`, a line for each."""
    wrong: dict[str, None] = {}
    for at in dims:
        for launch in predict(function, workload, at).launches:
            judged = _judge(launch, function, names_of(function, workload), gates)
            wrong |= dict.fromkeys(f"{launch.kernel} at {dict(at)}: {what}" for what in judged)
    wanted = gates.tensor_cores
    if wanted and not any(getattr(kernel.resources, wanted) for kernel in function.kernels.values()):
        wrong[f"no kernel has {wanted.upper()} instructions"] = None
    return list(wrong)


def _judge(launch: LaunchPrediction, function: DeviceFunction, names: Sequence[str], gates: Gates) -> list[str]:
    wrong = []
    if spilled := function.kernels[launch.kernel].resources.spill_bytes:
        wrong.append(f"{spilled} bytes of registers are spilled")
    if launch.occupancy < gates.occupancy:
        wrong.append(f"an occupancy of {launch.occupancy:.3f}, below {gates.occupancy}")
    worst, mean = launch.demand.ways
    if worst > gates.worst or mean > gates.mean:
        wrong.append(
            f"bank conflicts of {worst:.2f} ways, {mean:.3f} in the mean, above {gates.worst} and {gates.mean}"
        )
    for i, array in enumerate(launch.launched.arguments):
        number = getattr(array, "argument", None)
        width = launch.demand.width(i)
        if number is not None and names[number] in gates.wide and 0 < width < 16:
            wrong.append(f"{width:.1f} bytes of {names[number]} are loaded at once, not 16")
    return wrong
