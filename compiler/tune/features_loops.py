"""What loops of any template do; `features.CODE` names and explains the counts."""

from __future__ import annotations


def parallel_loop(tasks: int, threads: int, ops: float) -> dict[str, float]:
    """Counts of a parallel loop of `ops` operations in all, which TVM cuts into one run of tasks a thread."""
    return {
        "tasks": tasks / threads,
        "imbalance": -(-tasks // threads) * threads / tasks,
        "used_threads": min(tasks, threads) / threads,
        "task_ops": ops / tasks,
    }


def serial_loop(tasks: int, threads: int, ops: float) -> dict[str, float]:
    """The same where the calling thread does everything."""
    return {"tasks": tasks, "imbalance": threads, "used_threads": 1 / threads, "task_ops": ops / tasks}
