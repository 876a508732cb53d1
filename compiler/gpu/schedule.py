"""Schedules for whatever no kernel template covers, by TVM's dlight.

Loop nests that come with an order of their own (scatters, recurrences, searches) are beyond its rules but for the last,
which runs them in one thread: slow, and right.
"""

from __future__ import annotations

from llmc.errors import KernelError
from llmc.tvm_shim import PrimFunc, TvmTarget, dlight, s_tir

_RULES = (
    dlight.gpu.Matmul(),
    dlight.gpu.GEMV(),
    dlight.gpu.Reduction(),
    dlight.gpu.GeneralReduction(),
    dlight.gpu.Fallback(),
)


def schedule(name: str, func: PrimFunc, target: TvmTarget) -> PrimFunc:
    """The function `name` with its loops on blocks and threads. Raises KernelError where no rule takes it."""
    reason = ""
    for rule in _RULES:
        try:
            found = rule.apply(func, target, False)
        except Exception as error:  # whatever a rule stumbles over, the next one asks for less
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            continue
        if found is not None:
            return (found if isinstance(found, s_tir.Schedule) else found[0]).mod["main"]
    raise KernelError(f"no schedule for GPUs takes this function: {reason or 'all rules pass'}", where=name)
