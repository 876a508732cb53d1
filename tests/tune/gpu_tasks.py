"""Kernels for GPUs that are right, or wrong in one way, for the tests of what measures them."""

from __future__ import annotations

import dataclasses
from typing import Any

from llmc.schedules.base import Config, Kernel, Space
from llmc.schedules.norm.cuda import CudaNorm
from llmc.schedules.norm.norm import NormWorkload
from llmc.targets.base import Target
from llmc.targets.cuda import SM80
from llmc.targets.threads import launch
from llmc.tune.task import Point, Task
from llmc.tvm_shim import IRBuilder, T

EPSILON = 0.5  # far from the workload's own


class FaultyNorm(CudaNorm):
    """`CudaNorm` with a knob: "none", "wrong" (another epsilon), "outside" (writes where nothing is)."""

    def space(self, workload: NormWorkload, target: Target) -> Space:
        return Space({"threads": (32, 64), "fault": ("none", "wrong", "outside")})

    def default(self, workload: NormWorkload, target: Target) -> dict[str, int | str]:
        return {"threads": 32, "fault": "none"}

    def build(self, workload: NormWorkload, target: Target, config: Config) -> Any:
        if config["fault"] == "outside":
            return _outside(workload.K)
        changed = dataclasses.replace(workload, epsilon=EPSILON) if config["fault"] == "wrong" else workload
        return super().build(changed, target, config)


def _outside(K: int) -> Any:
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name("norm")
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        input_ = T.arg("x", T.handle())
        T.arg("weight", T.Buffer((K,), "float32"))
        output = T.arg("y", T.handle())
        M = T.int64()
        _, y = (T.match_buffer(handle, (M, K), "float32") for handle in (input_, output))
        with launch(32, M) as (thread, m):
            T.buffer_store(y, T.float32(0), [m + (1 << 20), thread])
    return ib.get()


FAULTY = FaultyNorm()
# A second-level cache that the emulator need not write for seconds.
SMALL = dataclasses.replace(SM80, l2_bytes=1 << 16)
TASK = Task(Kernel(FAULTY, NormWorkload(96)), SMALL, (Point((("M", 1),)), Point((("M", 3),))))
