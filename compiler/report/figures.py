"""A report's figures, as SVG text to stand in a page. Needs matplotlib, which comes with the extra `report`."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import Any

from llmc.errors import OptionError
from llmc.profile import Ceilings, Operator
from llmc.report.profiles import TaskProfile
from llmc.tune.held_out import Quality
from llmc.tune.report import TaskReport

try:
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator
except ModuleNotFoundError as error:
    raise OptionError(
        f"a report's figures need the module {error.name}, which is not installed",
        hint="pip install 'llmc[report]', or take the data with --json",
    ) from None

INK, FAINT, GRID = "#1f2933", "#9aa5b1", "#e4e7eb"
BLUE, GREEN, RED = "#0b69a3", "#0f8b5f", "#ba2525"
# Okabe and Ito's colours, which those who see fewer colours tell apart, too.
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#7a6a00", "#000000")
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: small, and to be searched and copied
    "svg.hashsalt": "llmc",  # the same data give the same file
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
_SLOW = 1.5  # relative to the default: candidates beyond are drawn at the upper edge
_LABELLED = 0.03  # share of the time from which a kernel gets its number in the roofline


def tuning_curve(task: TaskReport) -> str:
    """The least cost against trials: each candidate a dot, a failure a cross, the verified winner a line."""
    with rc_context(_STYLE):
        figure, axes = _figure(3.6, 2.2)
        numbers = range(1, len(task.trials) + 1)
        best = [t.best for t in task.trials]
        costs = [(n, min(t.cost, _SLOW)) for n, t in zip(numbers, task.trials, strict=True) if t.cost is not None]
        failed = [(n, t.best) for n, t in zip(numbers, task.trials, strict=True) if t.cost is None]
        axes.axhline(1, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
        axes.scatter(*_columns(costs), s=7, color=FAINT, linewidths=0)
        axes.step([0, *numbers], [1, *best], where="post", color=BLUE, linewidth=1.6)
        axes.scatter(*_columns(failed), s=22, color=RED, marker="x", linewidths=1.2, zorder=3)
        low = min([1.0, *best])
        if task.best:
            upper = task.best.cost * (1 + task.best.noise)
            axes.axhline(upper, color=GREEN, linewidth=1.3)
            low = min(low, upper)
        high = max([1.05, *(cost for _, cost in costs)])
        axes.set_ylim(low - 0.06 * (high - low), high + 0.04 * (high - low))
        axes.set_xlim(0, max(len(task.trials), 1) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.set(xlabel="trials", ylabel="predicted time / default's" if task.key.predicted else "time / default's")
        return _svg(figure)


def roofline(profile: TaskProfile, ceilings: Ceilings) -> str:
    """Operations a second against operations a byte (Williams, Waterman and Patterson, "Roofline: An Insightful Visual
    Performance Model for Multicore Architectures", 2009). Kernels that move bytes alone have no place in it.

    Numbers are those of the table; a circle's area is the kernel's share of the time, a hollow one is before tuning.
    """
    with rc_context(_STYLE):
        figure, axes = _figure(7.2, 3.8)
        drawn = [(i, now, old) for i, (now, old) in enumerate(profile.operators, 1) if now.ops]
        total = profile.after.kernels
        families = sorted({_family(now.name) for _, now, _ in drawn})
        for i, now, old in drawn:
            x, y, color = now.ops / now.bytes, _speed(now), _color(families, _family(now.name))
            if old:
                axes.plot([x, x], [_speed(old), y], color=color, linewidth=0.8)
                area = _area(old.seconds / total)
                axes.scatter([x], [_speed(old)], s=area, facecolors="white", edgecolors=color, linewidths=1)
            axes.scatter([x], [y], s=_area(now.seconds / total), color=color, alpha=0.85, linewidths=0, zorder=3)
            if now.seconds >= _LABELLED * total:
                axes.annotate(str(i), (x, y), (6, -9), textcoords="offset points", fontsize=8)
        axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="Gop/s")
        _draw_ceilings(axes, ceilings, [now.ops / now.bytes for _, now, _ in drawn])
        for name in families:
            axes.scatter([], [], s=30, color=_color(families, name), label=name)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        if families:
            axes.legend(loc="lower right")
        return _svg(figure)


def _draw_ceilings(axes: Axes, ceilings: Ceilings, intensities: Sequence[float]) -> None:
    """The slope of memory up to the highest peak, and a level for each unit from where it meets that slope."""
    reads = ceilings.bandwidth / 1e9
    peaks = {unit: peak / 1e9 for unit, peak in ceilings.peaks.items()}
    ridges = [peak / reads for peak in peaks.values()]
    left, right = min(*intensities, *ridges) / 3, max(*intensities, *ridges) * 4
    axes.plot([left, max(ridges)], [left * reads, max(peaks.values())], color=INK, linewidth=1.3)
    axes.text(left * 1.2, left * 1.3 * reads, f"reads {reads:,.0f} GB/s", fontsize=8, rotation_mode="anchor",
              rotation=math.degrees(math.atan(reads)), transform_rotates_text=True)  # fmt: skip
    for unit, peak in peaks.items():
        axes.plot([peak / reads, right], [peak, peak], color=INK, linewidth=1.3)
        axes.text(right, peak * 1.06, f"{unit} {peak:,.0f} Gop/s", ha="right", va="bottom", fontsize=8)
    axes.set_xlim(left, right)


def predictions(quality: Quality) -> str:
    """Predicted against measured log2 of times relative to the default's; on the line they agree."""
    with rc_context(_STYLE):
        figure, axes = _figure(4.6, 4.0)
        families = sorted({t.template for t in quality.tasks})
        for name in families:
            xs = [x for t in quality.tasks if t.template == name for x in t.measured]
            ys = [y for t in quality.tasks if t.template == name for y in t.predicted]
            axes.scatter(xs, ys, s=10, color=_color(families, name), alpha=0.6, linewidths=0, label=name)
        both = [v for t in quality.tasks for v in (*t.measured, *t.predicted)]
        ends = [min(both), max(both)]
        axes.plot(ends, ends, color=FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        axes.set(xlabel="measured, log2(time / default's)", ylabel="predicted")
        axes.legend(loc="upper left", markerscale=1.6)
        return _svg(figure)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Sizes in inches; a page shows 72 points an inch, scaled to the room there is."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _svg(figure: Figure) -> str:
    """The figure as an element of a page: no prologue, no date, and no names that another figure has as well."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    return re.sub(r' id="[a-zA-Z.]+\d*_\d+"', "", text[text.index("<svg") :])


def _columns(pairs: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in pairs], [y for _, y in pairs]


def _family(kernel: str) -> str:
    """A kernel's template: kernels are named after it and numbered."""
    return re.sub(r"_\d+$", "", kernel)


def _color(families: Sequence[str], name: str) -> str:
    return PALETTE[families.index(name) % len(PALETTE)]


def _speed(operator: Operator) -> float:
    """In Gop/s."""
    return operator.ops / operator.seconds / 1e9


def _area(share: float) -> float:
    """Of a circle, in square points."""
    return 12 + 300 * share
