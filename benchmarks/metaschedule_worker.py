"""The process in which MetaSchedule tunes one fp32 GEMM, until it is killed; `metaschedule.py` starts it.

Its arguments are a connection's descriptor, a folder to write to, and M, N, K and a target for TVM as JSON. It sends
None when it is about to start, then after each batch (seconds since then, trials so far, least mean seconds of a call
so far, the module of that call as JSON where it is a new one).
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import statistics
import sys
import time
import types
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from llmc.ceilings import pin_caller
from llmc.tvm_shim import PrimFunc, TvmTarget, s_tir, te, tvm

ms = s_tir.meta_schedule
Callback: Any = ms.measure_callback.PyMeasureCallback
# Builds of a batch start processes anew, so small batches waste time; large ones (MetaSchedule's own default is 64)
# would leave a short run without a second, learned batch.
BATCH = 16
POPULATION = 128  # evolving TVM's own 512 takes longer than measuring a batch: in a minute this finds better kernels
TRIALS = 1 << 20  # more than there is time for
BUILD_S, RUN_S = 20.0, 10.0
SEED = 1
# Means over 40 ms each: with a flushed cache before every call, MetaSchedule times threads that have to wake up.
TIMING = ms.runner.EvaluatorConfig(number=1, repeat=3, min_repeat_ms=40)


def gemm(M: int, N: int, K: int) -> PrimFunc:
    """y [M, N] = x [M, K] w [K, N], float32. How w lies in memory is left to the schedule, as it is to llmc's."""
    x, w = te.placeholder((M, K), "float32", "x"), te.placeholder((K, N), "float32", "w")
    k = te.reduce_axis((0, K), "k")
    free = {"layout_free_placeholders": [w]}
    y = te.compute((M, N), lambda i, j: te.sum(x[i, k] * w[k, j], axis=k), name="y", attrs=free)
    return te.create_prim_func([x, w, y])


def import_intrinsics() -> None:
    """Give MetaSchedule the tensor intrinsics of x86 alone: TVM would parse those of all GPUs for half a minute."""
    name = "tvm.s_tir.tensor_intrin"
    spec = importlib.util.find_spec(name)
    assert spec is not None
    package = types.ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations or ())
    sys.modules[name] = package
    importlib.import_module(f"{name}.x86")


def build(mod: Any, target: Any, _: Any) -> Any:
    """What MetaSchedule's own builder does, less the intrinsics that it parses in every process."""
    return tvm.driver.build(
        s_tir.transform.RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(mod), target=target
    )


@tvm.ir.utils.derived_object  # type: ignore[untyped-decorator]
class Report(Callback):  # type: ignore[misc]
    """Tells the parent after every batch."""

    def __init__(self, parent: Connection) -> None:
        super().__init__()
        self.parent, self.start, self.trials, self.best = parent, time.monotonic(), 0, math.inf

    def apply(self, _: Any, task: int, candidates: Sequence, built: Sequence, run: Sequence) -> None:
        best = None
        for candidate, result in zip(candidates, run, strict=True):
            self.trials += 1
            seconds = statistics.mean(map(float, result.run_secs)) if result.run_secs else math.inf
            if seconds < self.best:
                self.best, best = seconds, candidate.sch.mod
        module = None if best is None else tvm.ir.save_json(best)
        self.parent.send((time.monotonic() - self.start, self.trials, self.best, module))


def main() -> None:
    parent, folder = Connection(int(sys.argv[1])), sys.argv[2]
    job = json.loads(sys.argv[3])
    import_intrinsics()
    parent.send(None)
    report = Report(parent)
    cores = job["target"]["num-cores"]
    ms.tune_tir(
        gemm(job["M"], job["N"], job["K"]),
        TvmTarget(job["target"]),
        folder,
        TRIALS,
        num_trials_per_iter=BATCH,
        builder=ms.builder.LocalBuilder(max_workers=cores, timeout_sec=BUILD_S, f_build=build),
        runner=ms.runner.LocalRunner(timeout_sec=RUN_S, evaluator_config=TIMING, initializer=pin_caller),
        strategy=ms.search_strategy.EvolutionarySearch(population_size=POPULATION),
        database="memory",
        measure_callbacks=[*ms.MeasureCallback.create("default"), report],
        num_tuning_cores=cores,
        seed=SEED,
    )


if __name__ == "__main__":
    main()
