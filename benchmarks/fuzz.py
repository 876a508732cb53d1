"""Differential fuzzing: random graphs through llmc with its rewrites, llmc without them, and onnxruntime.

    python benchmarks/fuzz.py                          until stopped
    python benchmarks/fuzz.py --graphs 2000 --json     so many; 1 where one failed
    python benchmarks/fuzz.py --quick                  twice as many, without LLVM's optimiser
    python benchmarks/fuzz.py --seed 7 --first 240 --graphs 1    one again

The graph of a seed and a number is always the same. What fails is made smaller as long as it fails in the same way, and
written to the folder of --found as a JSON file: it is a test of tests/fuzz as soon as it lies in tests/fuzz/found. What
the graphs are made of and what counts as equal is in tests/fuzz: generator.py, sketch.py and differential.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the generator is the tests', too

from llmc.targets.base import Target
from tests.fuzz.differential import Quick
from tests.fuzz.generator import generate
from tests.fuzz.isolation import isolated
from tests.fuzz.minimise import minimise
from tests.fuzz.program import Program, save

TOGETHER = 24  # graphs that are compiled at once
GENERATOR = ("reference", "bounds")  # failures for which the generator is to blame, and nothing need be made small


class Tally:
    """What was run and what came of it."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.graphs = 0
        self.operators: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()

    def count(self, programs: Sequence[Program]) -> None:
        self.graphs += len(programs)
        self.operators.update(node.op for p in programs for node in p.nodes)

    def figures(self) -> dict[str, object]:
        return {
            "graphs": self.graphs,
            "clean": self.graphs - sum(self.failures.values()),
            "failed": dict(self.failures),
            "nodes": sum(self.operators.values()),
            "operators": dict(sorted(self.operators.items())),
            "seconds": round(time.monotonic() - self.start, 1),
        }


def batches(seed: int, first: int, count: int | None) -> Iterator[dict[int, Program]]:
    """Programs by number, without end where there is no count."""
    number = first
    while count is None or number < first + count:
        end = number + TOGETHER if count is None else min(number + TOGETHER, first + count)
        yield {i: generate(seed, i) for i in range(number, end)}
        number = end


def run(seed: int, first: int, count: int | None, found: Path, target: Target | None = None) -> Tally:
    """Runs programs, tells what fails, and keeps it. Ctrl-C ends it with what was counted."""
    tally = Tally()
    check = partial(isolated, target=target)
    try:
        for programs in batches(seed, first, count):
            results = check(list(programs.values()))
            tally.count(list(programs.values()))
            for (number, program), failure in zip(programs.items(), results, strict=True):
                if failure is not None:
                    tally.failures[failure.kind] += 1
                    print(f"seed {seed}, graph {number}: {failure}", file=sys.stderr, flush=True)
                    found.mkdir(parents=True, exist_ok=True)
                    path = found / f"{seed}-{number}.json"
                    ours = failure.kind in GENERATOR
                    save(program if ours else minimise(program, failure.kind, check), path)
                    print(f"  {path}", file=sys.stderr, flush=True)
            clean = tally.graphs - sum(tally.failures.values())
            rate = tally.graphs / (time.monotonic() - tally.start)
            print(f"{tally.graphs} graphs, {clean} clean, {rate:.2f} a second", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    return tally


def main() -> int:
    """Run what the command line asks for; 1 where a graph failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, help="stop after so many; default: never")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first graph")
    parser.add_argument("--found", type=Path, default=Path("found"), help="folder for graphs that fail")
    parser.add_argument("--quick", action="store_true", help="without LLVM's optimiser")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    args = parser.parse_args()
    tally = run(args.seed, args.first, args.graphs, args.found, Quick.native() if args.quick else None)
    figures = tally.figures()
    print(json.dumps(figures, indent=1) if args.json else f"{figures['clean']} of {figures['graphs']} graphs clean")
    return bool(tally.failures)


if __name__ == "__main__":
    sys.exit(main())
