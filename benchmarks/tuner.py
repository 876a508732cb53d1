"""How few trials the tuner needs: learned search, cold and warm, against random search.

    python benchmarks/tuner.py --record 1800                 half an hour of measuring, added to the table
    python benchmarks/tuner.py --quick --seed 0 --json       the figures, from the table

Measuring and judging are apart. `--record` measures samples of every workload's space (small spaces: all of it) with
the tuner's own measurer, in random order, and keeps them in a table file. Searches then run against the table, as if
they measured: every time they are told was measured, only once and for all, so that any number of seeds is cheap and
all strategies are told the same. A search may propose only what the table holds, and what is best-known is the best of
the table: with a table that holds a sample of a space, figures are those of a search in that sample.

- trials_to_95: candidates measured until one runs at 95 % of the best-known's speed or more; the default is not
  counted, nor is it a candidate.
- cold: nothing known beforehand. warm: cost model and first proposals come from all other workloads of the table.
- tau: Kendall's, of the warm model before its first trial, within each workload left out of training.
- top8: best-known cost over the best of the 8 configurations that this model ranks first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import numpy as np

from llmc.errors import KernelError
from llmc.schedules.attention.attention import ATTENTION
from llmc.schedules.attention.workloads import AttentionWorkload
from llmc.schedules.base import Kernel, Space
from llmc.schedules.gemm.dense import DENSE, DenseLinearWorkload
from llmc.schedules.gemm.lowbit import LOWBIT, LowBitLinearWorkload
from llmc.schedules.norm.norm import NORM, NormWorkload
from llmc.targets.base import Target
from llmc.targets.detect import native
from llmc.tune.cost_model import CostModel, Samples, tau
from llmc.tune.neighbours import starts
from llmc.tune.search import Key, Search, key
from llmc.tune.task import Measurement, Task, Timing
from llmc.tune.tasks import points_of

TABLE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "llmc" / "tuner-table.jsonl"
BATCH = 8
LEVEL = 0.95
CALM = 0.1  # largest relative half-width of a time that counts; others are measured again
Table = dict[Task, dict[Key, Measurement]]

KERNELS = [
    Kernel(LOWBIT, LowBitLinearWorkload(960, 576, 4, 32, zero=8.0)),
    Kernel(DENSE, DenseLinearWorkload(576, 576, residual=True)),
    Kernel(ATTENTION, AttentionWorkload(9, 3, 64, 64**-0.5)),
    Kernel(LOWBIT, LowBitLinearWorkload(3072, 576, 4, 32, zero=8.0, activation="silu_mul")),
    Kernel(DENSE, DenseLinearWorkload(1536, 384, bias=True, activation="gelu")),
    Kernel(ATTENTION, AttentionWorkload(32, 8, 128, 128**-0.5)),
    Kernel(LOWBIT, LowBitLinearWorkload(576, 1536, 4, 32, zero=8.0, residual=True)),
    Kernel(LOWBIT, LowBitLinearWorkload(1024, 1024, 8, 128, zero=128.0)),
    Kernel(DENSE, DenseLinearWorkload(1024, 2048)),
    Kernel(ATTENTION, AttentionWorkload(12, 12, 32, 32**-0.5, causal=False, key_bias=True)),
    Kernel(LOWBIT, LowBitLinearWorkload(2048, 2048, 4, 128, symmetric=False)),
    Kernel(LOWBIT, LowBitLinearWorkload(1024, 1024, 4, 32, zero=8.0, activations="a32")),
    Kernel(DENSE, DenseLinearWorkload(3072, 576, activation="silu_mul")),
    Kernel(NORM, NormWorkload(576, residual=True, sum_output=True)),
    Kernel(NORM, NormWorkload(4096, kind="layer", bias=True)),
]


def tasks(target: Target) -> list[Task]:
    return [
        Task(kernel, target, points_of(kernel))
        for kernel in KERNELS
        if kernel.template.accepts(kernel.workload, target)
    ]


# -- the table ----------------------------------------------------------------------------------------------------
def load(path: Path, target: Target) -> Table:
    """What was recorded for these workloads, of this target and these versions of the templates."""
    table: Table = {task: {} for task in tasks(target)}
    by_key = {task.key: task for task in table}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        entry = json.loads(line)
        task = by_key.get(entry["task"])
        if task is not None and entry["target"] == target.name:
            timings = {point: Timing(*t) for point, t in entry["timings"].items()}
            calm = all(t.spread < CALM for t in timings.values())
            if entry["status"] != "ok" or (calm and all(str(p) in timings for p in task.points)):
                table[task][key(entry["config"])] = Measurement(entry["config"], entry["status"], timings)
    return table


def record(path: Path, target: Target, seconds: float) -> None:
    """Add measurements to the table, a batch of each workload in turn, until the time is over or all is measured."""
    from llmc.tune.measure import Measurer

    table, end = load(path, target), time.monotonic() + seconds
    path.parent.mkdir(parents=True, exist_ok=True)
    left: dict[Task, list] = {}
    for task, known in table.items():
        configs = list(task.kernel.template.space(task.kernel.workload, target))
        Random(task.key).shuffle(configs)
        left[task] = [c for c in configs if key(c) not in known]
    with Measurer(target) as measurer, path.open("a", encoding="utf-8") as file:
        while any(left.values()):
            for task, configs in left.items():
                batch, left[task] = configs[: 2 * BATCH], configs[2 * BATCH :]
                try:
                    for m in measurer.measure(task, batch):
                        timings = {p: (t.seconds, t.default_seconds, t.spread) for p, t in m.timings.items()}
                        entry = {"task": task.key, "target": target.name, "config": dict(m.config), "status": m.status}
                        file.write(json.dumps(entry | {"timings": timings}) + "\n")
                        file.flush()
                except KernelError as error:
                    print(error, file=sys.stderr)
                    left[task] = []
                if time.monotonic() > end:
                    return


# -- searches ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Figures:
    """One workload's: trials are medians over seeds, and `random_over` the mean random trials over the mean learned."""

    task: str
    configs: int
    best: float
    within_5: float
    random: float
    cold: float
    warm: float
    random_over_cold: float
    random_over_warm: float
    tau: float
    top8: float


def judge(task: Task, table: Table, seeds: Sequence[int]) -> Figures:
    """All strategies on one workload, the others being what is known beforehand."""
    measured = {
        k: m
        for k, m in table[task].items()
        if k != key(task.kernel.template.default(task.kernel.workload, task.target))
    }
    costs = {k: m.cost(task.points) for k, m in measured.items()}
    goal = min(costs.values()) / LEVEL
    history = [(other, m) for other, known in table.items() if other is not task for m in known.values()]
    full = task.kernel.template.space(task.kernel.workload, task.target)
    space = Space(full.knobs, lambda config: key(config) in measured)

    def learned(prior: CostModel, begin: Iterable, seed: int) -> int:
        search, trials = Search(task, prior, starts=begin, seed=seed, space=space), 0
        while batch := search.propose(BATCH):
            for config in batch:
                trials += 1
                if costs[key(config)] <= goal:
                    return trials
            search.observe([measured[key(c)] for c in batch])
        return trials

    def blind(seed: int) -> int:
        order = list(costs)
        Random(f"{seed} {task.key}").shuffle(order)
        return next(i for i, k in enumerate(order, 1) if costs[k] <= goal)

    model = CostModel.fit(Samples.of(history, task.target), kind="regression")
    begin = starts(task, history)
    keys = list(costs)
    predicted = model.predict(task, [measured[k].config for k in keys]).mean
    actual = np.array([costs[k] for k in keys])
    random = [blind(seed) for seed in range(200)]
    cold = [learned(CostModel(), (), seed) for seed in seeds]
    warm = [learned(model, begin, seed) for seed in seeds]
    timed = np.isfinite(actual)
    return Figures(
        task=f"{task.kernel.template.name} {task.kernel.workload.key()}",
        configs=len(costs),
        best=min(costs.values()),
        within_5=float(np.mean(actual <= min(actual) * 1.05)),
        random=statistics.median(random),
        cold=statistics.median(cold),
        warm=statistics.median(warm),
        random_over_cold=statistics.mean(random) / statistics.mean(cold),
        random_over_warm=statistics.mean(random) / statistics.mean(warm),
        tau=tau(predicted[timed], actual[timed]),
        top8=float(actual.min() / actual[np.argsort(predicted)[:8]].min()),
    )


def summary(found: Sequence[Figures]) -> dict[str, float]:
    def median(value: Callable[[Figures], float]) -> float:
        return statistics.median(map(value, found))

    return {
        "workloads": len(found),
        "trials_to_95_warm": median(lambda f: f.warm),
        "trials_to_95_cold": median(lambda f: f.cold),
        "trials_to_95_random": median(lambda f: f.random),
        "random_over_learned": median(lambda f: f.random_over_warm),
        "random_over_learned_cold": median(lambda f: f.random_over_cold),
        "tau": median(lambda f: f.tau),
        "top8_within_5": statistics.mean(f.top8 >= 0.95 for f in found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, default=TABLE, help=f"where measurements are kept (default {TABLE})")
    parser.add_argument("--record", type=float, metavar="SECONDS", help="measure for so long, then judge")
    parser.add_argument("--quick", action="store_true", help="one seed; an empty table is filled for two minutes")
    parser.add_argument("--seed", type=int, default=0, help="of the first search; others count up")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    target = native()
    seconds = args.record or (120 if args.quick and not args.table.exists() else 0)
    if seconds:
        record(args.table, target, seconds)
    table = {task: known for task, known in load(args.table, target).items() if len(known) > BATCH}
    if len(table) < 2:
        sys.exit(f"{args.table} holds too little: measure first with --record SECONDS")
    seeds = range(args.seed, args.seed + (1 if args.quick else args.seeds))
    found = []
    for task in table:
        found.append(judge(task, table, seeds))
        if not args.json:
            f = found[-1]
            print(
                f"{f.configs:5} configs, {f.within_5:4.0%} within 5 %, best {f.best:.3f}; "
                f"trials to 95 %: random {f.random:4.0f}, cold {f.cold:4.0f}, warm {f.warm:4.0f}; "
                f"tau {f.tau:5.2f}, top 8 at {f.top8:4.0%}  {f.task[:60]}",
                flush=True,
            )
    figures = summary(found)
    if args.json:
        print(json.dumps(figures | {"by_workload": [asdict(f) for f in found]}, indent=2))
    else:
        print("  ".join(f"{name} {value:.3g}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
