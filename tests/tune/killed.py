"""Kills a real tuner, workers and all, again and again, and prints as JSON what was left of it each time.

    python -m tests.tune.killed DATABASE KILLS SEED

A process of its own: tuners are forked from here, so that each takes no time to start and may be killed early, too.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from llmc.schedules.base import Kernel
from llmc.schedules.gemm.dense import DENSE, DenseLinearWorkload
from llmc.targets.detect import native
from llmc.tune import stage
from llmc.tune.database import Database
from llmc.tune.effort import Effort, Tuning
from llmc.tune.task import Measurement, Point, Task

LONGEST_S = 5.0  # after half of it a tuner has workers that build and time


def tasks() -> list[Task]:
    return [Task(Kernel(DENSE, DenseLinearWorkload(N, 64)), native(), (Point((("M", 8),)),)) for N in (64, 96, 160)]


def run(path: Path, seed: int, told: int) -> None:
    """Tune, telling of every record once it is stored."""
    add = Database.add

    def tell(self: Database, task: Task, m: Measurement) -> None:
        add(self, task, m)
        os.write(told, json.dumps([task.key, sorted(m.config.items()), m.verified]).encode() + b"\n")

    Database.add = tell  # type: ignore[method-assign]
    stage.shipped = lambda target: []  # learning from all of them takes longer than most tuners here live
    stage.tune_tasks(tasks(), native(), Tuning(Effort(trials=64, batch=4, seconds=3600), seed, path))


def main() -> None:
    path, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    chance = random.Random(seed)
    for number in range(kills):
        ours, theirs = os.pipe()
        if (tuner := os.fork()) == 0:
            os.close(ours)
            run(path, number, theirs)
            os._exit(0)
        os.close(theirs)
        time.sleep(chance.uniform(0, LONGEST_S))
        workers = [p for p in Path("/proc").glob("[0-9]*") if parent(p) == tuner]
        os.kill(tuner, signal.SIGKILL)
        _, status = os.waitpid(tuner, 0)
        with open(ours) as told:
            records = [json.loads(line) for line in told]
        deadline = time.monotonic() + 10
        while (left := [p.name for p in workers if alive(p)]) and time.monotonic() < deadline:
            time.sleep(0.01)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        print(json.dumps({"killed": killed, "workers": len(workers), "left": left, "told": records}), flush=True)


def parent(process: Path) -> int:
    """Its parent's number; 0 for one that has just ended."""
    try:
        return int((process / "stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return 0


def alive(process: Path) -> bool:
    try:
        return (process / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


if __name__ == "__main__":
    main()
