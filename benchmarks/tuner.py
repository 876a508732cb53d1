"""How few trials the tuner needs: learned search, cold and warm, against random search.

    python benchmarks/tuner.py --record 1800                 half an hour of measuring, added to the table
    python benchmarks/tuner.py                               the figures, from the table
    python benchmarks/tuner.py --quick --seed 0 --json       the same with one seed

Measuring and judging are apart. `--record` measures every configuration of every workload with the tuner's own
measurer, in random order, and keeps the times in a table file; one is shipped. Searches then run against the table,
as if they measured: what they are told was measured, only once and for all, so that any number of seeds is cheap and
all strategies are told the same.

A workload is one kernel at one size. Configurations that differ in knobs without effect at that size build the same
code and count once; what is best-known is the best of all of them (of those measured, while a table is incomplete:
`measured` says which share).

- trials_to_95: candidates measured until one runs at 95 % of the best-known's speed or more; the default is not
  counted, nor is it a candidate.
- cold: nothing known beforehand. warm: cost model and first proposals come from all other workloads of the table.
- random_over_learned: mean trials of random search over mean trials of the warm one (`…_cold`: of the cold one).
- tau: Kendall's, of the warm model before its first trial, within each workload left out of training.
- top8: best-known cost over the best of the 8 configurations that this model ranks first.
- within_5: share of the configurations that run within 5 % of the best.
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
from llmc.schedules.base import Config, Kernel, Space
from llmc.schedules.gemm.dense import DENSE, DenseLinearWorkload
from llmc.schedules.gemm.lowbit import LOWBIT, LowBitLinearWorkload
from llmc.schedules.norm.norm import NORM, NormWorkload
from llmc.targets.base import Target
from llmc.targets.detect import machine, native
from llmc.tune import features
from llmc.tune.cost_model import CostModel, Samples, tau
from llmc.tune.effort import EFFORTS
from llmc.tune.neighbours import starts
from llmc.tune.search import Key, Search, key
from llmc.tune.task import Measurement, Point, Task, Timing

SHIPPED = Path(__file__).with_name("tuner_table.jsonl")  # complete, of the machine that it names
OWN = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "llmc" / "tuner-table.jsonl"
BATCH = EFFORTS["full"].batch
LEAST = 8  # measured configurations that make a workload worth a search
LEVEL = 0.95
CALM = 0.1  # largest relative half-width of a time that counts; others are measured again
TURN = 32  # configurations of a workload that are recorded in a row
CURVE = 64  # trials that curves show
Table = dict[Task, dict[Key, Measurement]]

ROW, ROWS = Point((("M", 1),)), Point((("M", 128),))
PROMPT = Point((("B", 1), ("S", 128), ("CB", 2), ("C", 128)))
SHORT_PAST = Point((("B", 1), ("S", 1), ("CB", 32), ("C", 2048)))
LONG_PAST = Point((("B", 1), ("S", 1), ("CB", 64), ("C", 4096)))
WORKLOADS = [
    (Kernel(LOWBIT, LowBitLinearWorkload(896, 4864, 4, 32, zero=8.0, residual=True)), ROW),
    (Kernel(DENSE, DenseLinearWorkload(768, 768, bias=True, residual=True)), ROWS),
    (Kernel(ATTENTION, AttentionWorkload(14, 2, 64, 64**-0.5)), PROMPT),
    (Kernel(LOWBIT, LowBitLinearWorkload(1152, 896, 4, 32, symmetric=False, bias=True)), ROWS),
    (Kernel(DENSE, DenseLinearWorkload(3072, 768, bias=True, activation="gelu")), ROWS),
    (Kernel(LOWBIT, LowBitLinearWorkload(2048, 2048, 8, 32, zero=128.0)), ROW),
    (Kernel(NORM, NormWorkload(896, residual=True, sum_output=True)), ROWS),
    (Kernel(DENSE, DenseLinearWorkload(768, 3072)), ROW),
    (Kernel(ATTENTION, AttentionWorkload(32, 8, 64, 64**-0.5)), LONG_PAST),
    (Kernel(LOWBIT, LowBitLinearWorkload(768, 768, 8, 768, zero=128.0, bias=True)), ROWS),
    (Kernel(DENSE, DenseLinearWorkload(9728, 896, activation="silu_mul")), ROWS),
    (Kernel(LOWBIT, LowBitLinearWorkload(11264, 2048, 4, 64, zero=8.0, activation="silu_mul")), ROW),
    (Kernel(ATTENTION, AttentionWorkload(12, 12, 64, 64**-0.5, causal=False)), PROMPT),
    (Kernel(LOWBIT, LowBitLinearWorkload(896, 896, 4, 64, zero=8.0, activations="a32")), ROWS),
    (Kernel(NORM, NormWorkload(768, kind="layer", bias=True)), ROWS),
    (Kernel(DENSE, DenseLinearWorkload(4096, 1024)), ROW),
    (Kernel(ATTENTION, AttentionWorkload(14, 2, 64, 64**-0.5)), SHORT_PAST),
    (Kernel(LOWBIT, LowBitLinearWorkload(2048, 5632, 4, 128, zero=8.0, residual=True)), ROWS),
]


def tasks(target: Target) -> list[Task]:
    return [
        Task(kernel, target, (point,))
        for kernel, point in WORKLOADS
        if kernel.template.accepts(kernel.workload, target)
    ]


def distinct(task: Task) -> list[Config]:
    """The space, each kernel once: of those that look alike at the task's size the one with fewest changed knobs."""
    template, workload = task.kernel.template, task.kernel.workload
    default = template.default(workload, task.target)
    configs = list(template.space(workload, task.target))
    found: dict[bytes, Config] = {}
    for config, vector in zip(configs, features.matrix(task, task.points[0], configs), strict=True):
        known = found.setdefault(vector.tobytes(), config)
        if _changes(config, default) < _changes(known, default):
            found[vector.tobytes()] = config
    return list(found.values())


def _changes(config: Config, default: Config) -> int:
    return sum(config[name] != value for name, value in default.items())


# -- the table ----------------------------------------------------------------------------------------------------
# A line is a workload, {"task", "point", "target", "cpu", "cores", "knobs"}, or a configuration of the last such line:
# [values of its knobs, status, seconds, default's seconds, spread], the times only where the status is "ok".
def load(path: Path, target: Target) -> Table:
    """What was recorded for these workloads, of this target and these versions of the templates."""
    table: Table = {task: {} for task in tasks(target)}
    by_name = {(task.key, str(task.points[0]), target.name): task for task in table}
    task, knobs = None, list[str]()
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        entry = json.loads(line)
        if isinstance(entry, dict):
            task, knobs = by_name.get((entry["task"], entry["point"], entry["target"])), entry["knobs"]
        elif task is not None and (entry[1] != "ok" or entry[4] < CALM):
            config = dict(zip(knobs, entry[0], strict=True))
            timings = {str(task.points[0]): Timing(*entry[2:])} if entry[1] == "ok" else {}
            table[task][key(config)] = Measurement(config, entry[1], timings)
    return table


def record(path: Path, target: Target, seconds: float) -> None:
    """Add measurements to the table, a batch of each workload in turn, until the time is over or all is measured.

    Prints how many candidates a second that were: built, checked, timed against the default, and all that between."""
    from llmc.tune.measure import Measurer

    table, end = load(path, target), time.monotonic() + seconds
    path.parent.mkdir(parents=True, exist_ok=True)
    left: dict[Task, list[Config]] = {}
    for task, known in table.items():
        configs = distinct(task)
        Random(task.key).shuffle(configs)
        left[task] = [c for c in configs if key(c) not in known]
    spent: dict[str, list[float]] = {"one row": [0, 0], "more rows": [0, 0]}  # candidates and seconds
    with Measurer(target) as measurer, path.open("a", encoding="utf-8") as file:
        while any(left.values()) and time.monotonic() < end:
            for task, configs in left.items():
                batch, left[task] = configs[:TURN], configs[TURN:]
                begin = time.monotonic()
                try:
                    lines = [_row(m) for m in measurer.measure(task, batch)]
                except KernelError as error:
                    print(error, file=sys.stderr)
                    left[task] = []
                    continue
                if lines:
                    file.write("".join(f"{line}\n" for line in [_header(task), *lines]))
                    file.flush()
                sizes = task.points[0].sizes()
                total = spent["one row" if 1 in (sizes.get("M"), sizes.get("S")) else "more rows"]
                total[:] = total[0] + len(batch), total[1] + time.monotonic() - begin
                if time.monotonic() > end:
                    break
    for rows, (candidates, took) in spent.items():
        if candidates:
            print(f"{rows}: {candidates} candidates, {candidates / took:.2f} a second", file=sys.stderr)


def _header(task: Task) -> str:
    here, knobs = machine(), task.kernel.template.space(task.kernel.workload, task.target).knobs
    names = {"task": task.key, "point": str(task.points[0]), "target": task.target.name}
    return json.dumps(names | {"cpu": here.cpu, "cores": here.cores, "knobs": sorted(knobs)})


def _row(m: Measurement) -> str:
    values = [m.config[name] for name in sorted(m.config)]
    times = [float(f"{x:.4g}") for t in m.timings.values() for x in (t.seconds, t.default_seconds, t.spread)]
    return json.dumps([values, m.status, *times], separators=(",", ":"))


# -- searches ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Figures:
    """One workload's: trials are medians over seeds, `random_over` the mean random trials over the mean learned.

    `curves` by strategy and seed: the best cost relative to the best-known after each of the first trials.
    """

    task: str
    configs: int
    measured: float
    best: float
    within_5: float
    random: float
    cold: float
    warm: float
    random_over_cold: float
    random_over_warm: float
    tau: float
    top8: float
    curves: dict[str, list[list[float]]]


def judge(task: Task, table: Table, seeds: Sequence[int]) -> Figures:
    """All strategies on one workload, the others, at whatever size, being what is known beforehand."""
    default = key(task.kernel.template.default(task.kernel.workload, task.target))
    measured = {k: m for k, m in table[task].items() if k != default}
    costs = {k: m.cost(task.points) for k, m in measured.items()}
    best = min(costs.values())
    history = [(other, m) for other, known in table.items() if other.key != task.key for m in known.values()]
    full = task.kernel.template.space(task.kernel.workload, task.target)
    space = Space(full.knobs, lambda config: key(config) in measured)

    def learned(prior: CostModel, begin: Iterable[Config], seed: int) -> list[float]:
        search, found = Search(task, prior, starts=begin, seed=seed, space=space), list[float]()
        while batch := search.propose(BATCH):
            found += [costs[key(c)] for c in batch]
            if min(found) <= best and len(found) >= CURVE:
                break
            search.observe([measured[key(c)] for c in batch])
        return found

    def blind(seed: int) -> list[float]:
        order = list(costs.values())
        Random(f"{seed} {task.key}").shuffle(order)
        return order

    model = CostModel.fit(Samples.of(history, task.target), kind="regression")
    begin = starts(task, history)
    runs = {
        "random": [blind(seed) for seed in range(100)],
        "cold": [learned(CostModel(), (), seed) for seed in seeds],
        "warm": [learned(model, begin, seed) for seed in seeds],
    }
    trials = {name: [_trials(run, best / LEVEL) for run in found] for name, found in runs.items()}
    predicted = model.predict(task, [m.config for m in measured.values()]).mean
    actual = np.array(list(costs.values()))
    timed = np.isfinite(actual)
    return Figures(
        task=f"{task.kernel.template.name} {task.points[0]} {task.kernel.workload.key()}",
        configs=len(costs),
        measured=len(table[task]) / len(distinct(task)),
        best=best,
        within_5=float(np.mean(actual <= best * 1.05)),
        random=statistics.median(trials["random"]),
        cold=statistics.median(trials["cold"]),
        warm=statistics.median(trials["warm"]),
        random_over_cold=statistics.mean(trials["random"]) / statistics.mean(trials["cold"]),
        random_over_warm=statistics.mean(trials["random"]) / statistics.mean(trials["warm"]),
        tau=tau(predicted[timed], actual[timed]),
        top8=best / float(actual[np.argsort(predicted)[:8]].min()),
        curves={name: [_curve(run, best) for run in found[: len(seeds)]] for name, found in runs.items()},
    )


def _trials(costs: Sequence[float], goal: float) -> int:
    """How many candidates until one reaches the goal."""
    return next((i for i, cost in enumerate(costs, 1) if cost <= goal), len(costs))


def _curve(costs: Sequence[float], best: float) -> list[float]:
    """The best so far, relative to the best-known; it starts at the default, whose cost is 1."""
    return [round(float(c) / best, 4) for c in np.minimum.accumulate([1.0, *costs])[1 : CURVE + 1]]


def summary(found: Sequence[Figures]) -> dict[str, float]:
    def median(value: Callable[[Figures], float]) -> float:
        return statistics.median(map(value, found))

    return {
        "workloads": len(found),
        "exhaustive": sum(f.measured == 1 for f in found),
        "trials_to_95_warm": median(lambda f: f.warm),
        "trials_to_95_cold": median(lambda f: f.cold),
        "trials_to_95_random": median(lambda f: f.random),
        "random_over_learned": median(lambda f: f.random_over_warm),
        "random_over_learned_cold": median(lambda f: f.random_over_cold),
        "tau": median(lambda f: f.tau),
        "top8_within_5": statistics.mean(f.top8 >= 0.95 for f in found),
        "within_5": median(lambda f: f.within_5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, help=f"default: {OWN} once something was recorded, else {SHIPPED.name}")
    parser.add_argument("--record", type=float, metavar="SECONDS", help="measure for so long, then judge")
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--seed", type=int, default=0, help="of the first search; others count up")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    target = native()
    path = args.table or (OWN if args.record or OWN.exists() else SHIPPED)
    if args.record:
        record(path, target, args.record)
    table = {task: known for task, known in load(path, target).items() if len(known) > LEAST}
    if len(table) < 2:
        sys.exit(f"{path} holds too little of {target.name}: measure first with --record SECONDS")
    seeds = range(args.seed, args.seed + (1 if args.quick else args.seeds))
    found = []
    for task in table:
        found.append(judge(task, table, seeds))
        if not args.json:
            f = found[-1]
            print(
                f"{f.configs:4} configs ({f.measured:4.0%}), {f.within_5:4.0%} within 5 %, best {f.best:.3f}; trials "
                f"to 95 %: random {f.random:3.0f}, cold {f.cold:3.0f} ({f.random_over_cold:.1f}x), warm {f.warm:3.0f} "
                f"({f.random_over_warm:.1f}x); tau {f.tau:5.2f}, top 8 at {f.top8:4.0%}  {f.task[:50]}",
                flush=True,
            )
    figures = summary(found)
    if args.json:
        by_workload = [asdict(f) for f in found]
        curves = {f["task"]: f.pop("curves") for f in by_workload}
        print(json.dumps(figures | {"by_workload": by_workload, "curves": curves}))
    else:
        print("  ".join(f"{name} {value:.3g}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
