"""llmc's tuner against TVM's MetaSchedule: the same fp32 GEMMs, the same wall time, nothing known beforehand.

    python benchmarks/metaschedule.py --seconds 60                         all shapes (M x N x K)
    python benchmarks/metaschedule.py --seconds 60 --shape 128x576x576     one of them
    python benchmarks/metaschedule.py --json > metaschedule.json           with the curves, for plot_tuner.py

MetaSchedule (Shao et al., "Tensor Program Optimization with Probabilistic Programs", 2022) tunes y = x w for one M, in
a process of its own that is killed when the time is over, and may lay out w as it likes. Its search is TVM's, with
smaller batches and populations, which find better kernels in a minute. llmc's tuner gets the template "dense" at the
same M. Starting the tuner's own processes counts, importing TVM does not.

What each found is then built for that M, compared with numpy, and called in turns with llmc's default. Every kernel
goes round copies of its weights; those of all kernels together exceed the cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from llmc.ceilings import pin_caller
from llmc.errors import KernelError
from llmc.schedules.base import Config, Kernel
from llmc.schedules.gemm.dense import DENSE, DenseLinearWorkload
from llmc.targets.base import Target
from llmc.targets.detect import machine, native
from llmc.tune.database import Database
from llmc.tune.measure import Measurer
from llmc.tune.search import upper_cost
from llmc.tune.subject import Candidate, Subject, undisturbed
from llmc.tune.task import Measurement, Point, Task
from llmc.tune.tuner import tune
from llmc.tvm_shim import TvmTarget, s_tir, te, tirx, tvm, tvm_ffi

WORKER = Path(__file__).with_name("metaschedule_worker.py")
SHAPES = ("128x576x576", "128x1024x2048", "128x3072x576", "1x1024x2048")
TRIALS = 4096  # a space's size and more: time is what limits
START_S = 300.0  # for importing TVM
CACHE = 128 << 20  # bytes; copies of a kernel's weights take twice that at most, whatever the cache is
RACE_S, WARM = 3.0, 3  # seconds of timing, and calls before

Step = tuple[float, int, float]  # seconds and trials so far, and the least cost so far, in the tuner's own measure


@dataclass(frozen=True)
class Curve:
    """A tuner's run, and what it ended with, if anything: a configuration, or a module as JSON."""

    steps: tuple[Step, ...]
    found: Any


@dataclass(frozen=True)
class Result:
    """One shape's. Speeds are GFLOP/s as raced, None where a tuner found nothing in time; curves are (seconds, trials,
    GFLOP/s), each scaled so that its tuner's own measure agrees with the race."""

    shape: str
    default: float
    llmc: float
    metaschedule: float | None
    config: Config
    trials: Mapping[str, int]
    curves: Mapping[str, list[Step]]


def gemm_task(M: int, N: int, K: int, target: Target) -> Task:
    return Task(Kernel(DENSE, DenseLinearWorkload(N, K)), target, (Point((("M", M),)),))


# -- tuning -------------------------------------------------------------------------------------------------------
def tune_with_metaschedule(M: int, N: int, K: int, target: Target, seconds: float) -> Curve:
    """What MetaSchedule finds in so many seconds of wall time; a batch that is unfinished then is lost. Costs are
    seconds of a call. Raises KernelError if it ends without having measured anything."""
    job = {"M": M, "N": N, "K": K, "target": target.tvm() | {"num-cores": machine().cores}}
    ours, theirs = Pipe()
    steps: list[Step] = []
    module: str | None = None
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as words:
        process = subprocess.Popen(
            [sys.executable, str(WORKER), str(theirs.fileno()), folder, json.dumps(job)],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=words,
            stderr=words,
            env=os.environ | {"TMPDIR": folder, "TVM_NUM_THREADS": str(machine().cores)},
            start_new_session=True,  # its builders and its runner are in its process group
        )
        theirs.close()
        try:
            if not ours.poll(START_S):
                raise KernelError("MetaSchedule did not start", where=f"{M}x{N}x{K}")
            ours.recv()
            end = time.monotonic() + seconds
            while ours.poll(max(0.0, end - time.monotonic())):
                elapsed, trials, best, new = ours.recv()
                module = new or module
                if math.isfinite(best):
                    steps.append((elapsed, trials, best))
        except EOFError:
            if not steps:
                words.seek(0)
                said = words.read().decode(errors="replace").strip().splitlines()[-3:]
                raise KernelError(f"MetaSchedule ended early: {' '.join(said)}", where=f"{M}x{N}x{K}") from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            ours.close()
    return Curve(tuple(steps), module)


class _Recorder:
    """A database that also notes when which cost was reached."""

    def __init__(self, database: Database) -> None:
        self.database, self.start = database, time.monotonic()
        self.steps: list[Step] = [(0.0, 0, 1.0)]

    def add(self, task: Task, measurement: Measurement) -> None:
        self.database.add(task, measurement)
        if not measurement.verified:
            _, trials, best = self.steps[-1]
            cost = min(best, upper_cost(task, measurement))
            self.steps.append((time.monotonic() - self.start, trials + 1, cost))


def tune_with_llmc(task: Task, seconds: float) -> Curve:
    """What llmc's tuner finds in so many seconds, verification included. Costs are relative to the default."""
    with tempfile.TemporaryDirectory() as folder, Database(Path(folder) / "tuning.db") as database:
        recorder = _Recorder(database)
        with Measurer(task.target) as measurer:
            (result,) = tune([task], measurer, recorder, trials=TRIALS, time_budget_s=seconds)
    if result.error:
        raise KernelError(result.error, where=task.key)
    return Curve(tuple(recorder.steps), result.config)


# -- comparing ----------------------------------------------------------------------------------------------------
def as_candidate(module: str, subject: Subject) -> Candidate:
    """MetaSchedule's kernel, with as many copies of its weights as llmc's default has."""
    target = TvmTarget(subject.task.target.tvm() | {"num-cores": machine().cores})
    mod, weight = tvm.ir.load_json(module), np.ascontiguousarray(subject.weights["weight"].T)
    blocks: list[Any] = []
    tvm_ffi.structural_walk(mod["main"].body, (s_tir.SBlock, blocks.append), order="post")
    for block in blocks:
        if block.annotations.get("meta_schedule.layout_rewrite_preproc"):
            weight = _laid_out(weight, tirx.IndexMap([v.var for v in block.iter_vars], list(block.body.indices), None))
    stripped = s_tir.transform.RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(mod)
    copies = [(tvm.runtime.tensor(weight),) for _ in subject.default.packed]
    call = tvm.driver.build(stripped, target=target)["main"]
    return dataclasses.replace(subject.default, call=call, packed=copies, turns=itertools.cycle(copies))


def _laid_out(weight: np.ndarray, layout: Any) -> np.ndarray:
    """The weight [K, N] as the schedule wants it."""
    inverse, shape = layout.inverse(weight.shape), [int(size) for size in layout.map_shape(weight.shape)]
    source = te.placeholder(weight.shape, "float32")
    result = te.compute(shape, lambda *at: source[tuple(inverse.map_indices(list(at)))])
    kernel = tvm.compile(te.create_prim_func([source, result]), target=TvmTarget({"kind": "llvm"}))
    packed = tvm.runtime.tensor(np.empty(shape, np.float32))
    kernel["main"](tvm.runtime.tensor(weight), packed)
    return packed.numpy()


def race(subject: Subject, racers: Mapping[str, Candidate], seconds: float = RACE_S) -> dict[str, float]:
    """Seconds of a call of each, called in turns. The order is random: what a kernel leaves in the caches suits some
    successors better than others."""
    case = subject.timed[0]
    inputs = [tvm.runtime.tensor(a) for a in case.inputs.values()]
    outputs = [tvm.runtime.tensor(np.empty(*spec)) for spec in case.outputs.values()]
    times: dict[str, list[float]] = {name: [] for name in racers}
    order, chance = list(racers), Random(0)
    with _pinned():
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times[order[0]]) <= WARM:
            chance.shuffle(order)
            for name in order:
                call, arguments = racers[name].call, (*inputs, *next(racers[name].turns), *outputs)
                start = time.perf_counter()
                call(*arguments)
                times[name].append(time.perf_counter() - start)
    return {name: undisturbed(taken[WARM:])[0] for name, taken in times.items()}


@contextmanager
def _pinned() -> Iterator[None]:
    """On a core of its own, without garbage collection."""
    before = os.sched_getaffinity(0)
    pin_caller()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        os.sched_setaffinity(0, before)


def compare(shape: str, target: Target, seconds: float) -> Result:
    """Both tuners on one shape, one after the other, and what they found in turns."""
    M, N, K = map(int, shape.split("x"))
    theirs = tune_with_metaschedule(M, N, K, target, seconds)
    ours = tune_with_llmc(gemm_task(M, N, K, target), seconds)
    small = dataclasses.replace(target, l3_bytes=min(CACHE, target.l3_bytes))
    subject = Subject(gemm_task(M, N, K, small), careful=False, seed=0)
    racers = {"default": subject.default, "llmc": subject.build(ours.found)}
    if theirs.found:
        racers["metaschedule"] = as_candidate(theirs.found, subject)
    for racer in racers.values():
        subject.check(racer)
    taken = race(subject, racers)
    units = {"llmc": taken["default"]}
    if theirs.found:
        units["metaschedule"] = taken["metaschedule"] / theirs.steps[-1][2]
    curves = {"llmc": ours.steps, "metaschedule": theirs.steps}
    billions = 2e-9 * M * N * K
    return Result(
        shape=shape,
        default=billions / taken["default"],
        llmc=billions / taken["llmc"],
        metaschedule=billions / taken["metaschedule"] if theirs.found else None,
        config=ours.found,
        trials={name: steps[-1][1] if steps else 0 for name, steps in curves.items()},
        curves={
            name: [(s, n, billions / (cost * units[name])) for s, n, cost in steps] for name, steps in curves.items()
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="for each tuner and shape")
    parser.add_argument("--shape", nargs="+", default=SHAPES, metavar="MxNxK")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    target, results = native(), []
    where = {"machine": machine().cpu, "threads": tvm.runtime.num_threads(), "target": target.name}
    if not args.json:
        print("{machine}, {threads} threads, {target}".format(**where), f"{args.seconds:g} s each; GFLOP/s:", sep=", ")
    for shape in args.shape:
        results.append(r := compare(shape, target, args.seconds))
        if not args.json:
            found = f"{r.metaschedule:6.1f}" if r.metaschedule else "nothing in time"
            print(
                f"{r.shape:14} llmc default {r.default:6.1f}, tuned {r.llmc:6.1f} ({r.trials['llmc']} trials); "
                f"MetaSchedule {found} ({r.trials['metaschedule']} trials)",
                flush=True,
            )
    if args.json:
        shapes = [dataclasses.asdict(r) for r in results]
        print(json.dumps(where | {"seconds": args.seconds, "shapes": shapes}, indent=2))


if __name__ == "__main__":
    main()
