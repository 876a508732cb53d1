"""What is to be tuned: kernels, each once, and the sizes at which they are timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmc.errors import OptionError
from llmc.schedules.attention.workloads import AttentionWorkload
from llmc.schedules.base import Kernel
from llmc.schedules.conv.workloads import ConvWorkload, WindowWorkload
from llmc.schedules.recurrent.workload import RecurrentWorkload
from llmc.schedules.sampling.sample import SampleWorkload
from llmc.targets.base import Target
from llmc.tune.task import Point, Task

EARLY_CONTEXT, DECODE_CONTEXT, SHORT, PREFILL = 192, 512, 32, 128  # tokens
_STEPS = ((1, 1), (32, 1), (32, 8))  # of a recurrent layer, and sequences side by side
_PIXELS = (28, 28)  # of an image where the model leaves them open
# Templates that are compared at long prompts; those for tensor cores of GPUs at a few rows, too, for which they have
# kernels, and knobs, of their own.
_LONG = ("lowbit", "table", "outliers", "dense", "lowbit_cuda", "table_cuda", "dense_cuda")
_LONG_AND_FEW = (
    *("lowbit_mma", "int8_mma", "bf16_mma", "f16_mma", "table_mma", "int8_table_mma", "outliers_mma"),
    *("fp8_mma", "fp8_f16_mma", "lowbit_wgmma", "bf16_wgmma", "f16_wgmma", "fp8_wgmma"),
)
_FEW = 16
_BLOCK = 64  # keys side by side in the packed cache


def tasks_of(calls: Mapping[Kernel, int], target: Target) -> list[Task]:
    """A task for every kernel of which there is more than one configuration; `calls` as `Plan.calls` counts them.

    A model with a cache in place decodes: one row counts as much as many. Others mostly see many rows.
    """
    decoder = any(getattr(kernel.workload, "in_place", False) for kernel in calls)
    return [
        Task(kernel, target, points_of(kernel, decoder), count)
        for kernel, count in calls.items()
        if has_choice(kernel, target)
    ]


def has_choice(kernel: Kernel, target: Target) -> bool:
    """Is there anything to tune: more than one configuration?"""
    return any(len(values) > 1 for values in kernel.template.space(kernel.workload, target).knobs.values())


def points_of(kernel: Kernel, decoder: bool = True) -> tuple[Point, ...]:
    """Where configurations of a kernel are compared: decode of one token, and prompts."""
    first = 0.5 if decoder else 0.1
    many = (1 - first) / 2
    if isinstance(kernel.workload, ConvWorkload | WindowWorkload):
        return (Point(tuple(kernel.workload.sizes(1, *_PIXELS).items())),)
    if isinstance(kernel.workload, RecurrentWorkload):
        return tuple(Point((("steps", steps), ("B", B)), 1 / len(_STEPS)) for steps, B in _STEPS)
    if isinstance(kernel.workload, SampleWorkload):
        return (Point((("R", 1),)),)
    symbols = _symbols(kernel)
    decode, prompt = (_attention(symbols, *sizes) for sizes in ((1, DECODE_CONTEXT - 1), (PREFILL, 0)))
    if isinstance(kernel.workload, AttentionWorkload):  # few keys are better shared out in another way than many
        early = _attention(symbols, 1, EARLY_CONTEXT - 1)
        return Point(early, first / 2), Point(decode, first / 2), Point(prompt, 1 - first)
    if "S" in symbols:
        return Point(decode, first), Point(_attention(symbols, SHORT, 0), many), Point(prompt, many)
    name = kernel.template.name
    rows: tuple[int, ...] = (PREFILL, 4 * PREFILL) if name in (*_LONG, *_LONG_AND_FEW) else (SHORT, PREFILL)
    if name in _LONG_AND_FEW:
        rows, many = (_FEW, *rows), (1 - first) / 3
    return Point((("M", 1),), first), *(Point((("M", M),), many) for M in rows)


def points_at(kernel: Kernel, rows: Sequence[int]) -> tuple[Point, ...]:
    """Where a kernel is compared if a user chooses: at these numbers of rows M, which count alike.

    Raises OptionError for a kernel whose sizes are others.
    """
    if "M" not in _symbols(kernel):
        raise OptionError(
            f"{kernel.template.name} has no rows to choose", where="--rows", hint="leave --rows out for this workload"
        )
    return tuple(Point((("M", M),)) for M in dict.fromkeys(rows))


def decode_and_prompt(kernel: Kernel, keys: int, tokens: int) -> list[dict[str, int]]:
    """Sizes of a kernel of attention, for one token behind so many keys, and for a prompt."""
    symbols = _symbols(kernel)
    return [dict(_attention(symbols, *sizes)) for sizes in ((1, keys - 1), (tokens, 0))]


def _symbols(kernel: Kernel) -> set[int | str]:
    """The dimensions of a kernel's buffers: numbers, and names of those that are known only at run time."""
    return {s for arg in (*kernel.workload.inputs(), *kernel.workload.outputs()) for s in arg.shape}


def _attention(symbols: set[int | str], tokens: int, past: int) -> tuple[tuple[str, int], ...]:
    """Those of attention's symbols that a workload has, for one sequence."""
    total = past + tokens
    blocks = -(-total // _BLOCK)
    sizes = {"B": 1, "S": tokens, "P": past, "total": total, "blocks": blocks, "CB": blocks}
    sizes |= {"T": total, "pages": blocks}
    sizes["C"] = blocks * _BLOCK if "CB" in symbols else total
    return tuple((name, size) for name, size in sizes.items() if name in symbols)
