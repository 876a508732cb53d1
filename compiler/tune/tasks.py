"""What is to be tuned in a model: its kernels, each once, and the sizes at which they are timed."""

from __future__ import annotations

from collections.abc import Mapping

from llmc.schedules.base import Kernel
from llmc.targets.base import Target
from llmc.tune.task import Point, Task

DECODE_CONTEXT, SHORT, PREFILL = 512, 32, 128  # tokens
_BLOCK = 64  # keys side by side in the packed cache


def tasks_of(calls: Mapping[Kernel, int], target: Target) -> list[Task]:
    """A task for every kernel of which there is more than one configuration; `calls` as `Plan.calls` counts them.

    A model with a cache in place decodes: one row counts as much as many. Others mostly see many rows.
    """
    decoder = any(getattr(kernel.workload, "in_place", False) for kernel in calls)
    return [
        Task(kernel, target, points_of(kernel, decoder), count)
        for kernel, count in calls.items()
        if any(len(values) > 1 for values in kernel.template.space(kernel.workload, target).knobs.values())
    ]


def points_of(kernel: Kernel, decoder: bool = True) -> tuple[Point, ...]:
    """Where configurations of a kernel are compared: decode of one token, and prompts."""
    first = 0.5 if decoder else 0.1
    many = (1 - first) / 2
    symbols = {s for arg in (*kernel.workload.inputs(), *kernel.workload.outputs()) for s in arg.shape}
    decode, prompt = (_attention(symbols, *sizes) for sizes in ((1, DECODE_CONTEXT - 1), (PREFILL, 0)))
    if kernel.template.name == "attention":
        return Point(decode, first), Point(prompt, 1 - first)
    if "S" in symbols:
        return Point(decode, first), Point(_attention(symbols, SHORT, 0), many), Point(prompt, many)
    rows = (PREFILL, 4 * PREFILL) if kernel.template.name in ("lowbit", "dense") else (SHORT, PREFILL)
    return Point((("M", 1),), first), *(Point((("M", M),), many) for M in rows)


def _attention(symbols: set[int | str], tokens: int, past: int) -> tuple[tuple[str, int], ...]:
    """Those of attention's symbols that a workload has, for one sequence."""
    total = past + tokens
    blocks = -(-total // _BLOCK)
    sizes = {"B": 1, "S": tokens, "P": past, "total": total, "blocks": blocks, "CB": blocks, "T": total}
    sizes["C"] = blocks * _BLOCK if "CB" in symbols else total
    return tuple((name, size) for name, size in sizes.items() if name in symbols)
