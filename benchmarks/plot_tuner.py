"""Draws docs/figures/tuner.svg: how fast the tuner learns, and how it stands beside MetaSchedule.

    python benchmarks/tuner.py --json > tuner.json
    python benchmarks/metaschedule.py --json > metaschedule.json
    python benchmarks/plot_tuner.py tuner.json --metaschedule metaschedule.json

A panel for each workload shows the best kernel after so many trials (time relative to the best-known: 1 is the least
there is), the median of all seeds, and from the best to the worst of them a band. A panel for each GEMM shows GFLOP/s
against wall time. The same numbers give the same file.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

FIGURE = Path(__file__).parent.parent / "docs" / "figures" / "tuner.svg"
COLUMNS = 4
WIDTH, HEIGHT = 2.8, 1.9  # inches of a panel
TITLE = 40  # characters
COLOURS = {"warm": "#0072b2", "cold": "#009e73", "random": "#e69f00", "llmc": "#0072b2", "MetaSchedule": "#d55e00"}
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # matplotlib brings it: the layout is the same everywhere
    "font.size": 7,
    "axes.titlesize": 6.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "llmc",
}


def padded(runs: Sequence[Sequence[float]]) -> np.ndarray:
    """Curves [run, trial] of one length: a search that ended earlier keeps what it had."""
    length = max(map(len, runs))
    return np.array([[*run, *[run[-1]] * (length - len(run))] for run in runs])


def corners(costs: np.ndarray) -> np.ndarray:
    """The trials, from 0, at which any of the curves changes, the first and the last: all that a file needs to hold."""
    changes = np.flatnonzero(np.any(np.diff(costs, axis=1) != 0, axis=0)) + 1
    return np.unique([0, *changes, costs.shape[1] - 1])


def draw_trials(ax: Axes, workload: str, curves: Mapping[str, Sequence[Sequence[float]]], best: float) -> None:
    """One workload: `curves` by strategy and seed; `best` is the best-known's time relative to the default."""
    for name in ("random", "cold", "warm"):
        costs = padded(curves[name])
        kept = corners(costs)
        trials, costs = kept + 1, costs[:, kept]
        band: dict[str, Any] = {"step": "post", "alpha": 0.2, "linewidth": 0, "color": COLOURS[name]}
        ax.fill_between(trials, costs.min(axis=0), costs.max(axis=0), **band)
        ax.step(trials, np.median(costs, axis=0), where="post", color=COLOURS[name], linewidth=1.2, label=name)
    ax.axhline(1 / best, color="grey", linestyle="--", linewidth=0.8, label="default")
    ax.set_title(workload if len(workload) <= TITLE else workload[: TITLE - 1] + "…")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("trials")
    ax.set_ylabel("time / best-known")


def draw_seconds(ax: Axes, result: Mapping[str, Any], seconds: float) -> None:
    """One GEMM of metaschedule.py: both tuners' best over time, the last of it kept to the end."""
    for name, key in (("MetaSchedule", "metaschedule"), ("llmc", "llmc")):
        if steps := result["curves"][key]:
            times, trials, speeds = zip(*steps, strict=True)
            label = f"{name}, {trials[-1]} trials"
            ax.step([*times, seconds], [*speeds, speeds[-1]], where="post", color=COLOURS[name], label=label)
    ax.axhline(result["default"], color="grey", linestyle="--", linewidth=0.8)
    ax.set_title(f"fp32 GEMM {result['shape']} (M x N x K)")
    ax.set_xlim(0, seconds)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("seconds")
    ax.set_ylabel("GFLOP/s")
    ax.legend(loc="lower right", frameon=False, fontsize=6)


def draw(tuner: Mapping[str, Any], metaschedule: Mapping[str, Any] | None, path: Path) -> None:
    """Write the figure: what `tuner.py --json` and `metaschedule.py --json` printed, as SVG."""
    best = {figures["task"]: figures["best"] for figures in tuner["by_workload"]}
    workloads, gemms = tuner["curves"], metaschedule["shapes"] if metaschedule else []
    first = math.ceil(len(workloads) / COLUMNS)  # rows of workloads; those of GEMMs follow
    rows = first + math.ceil(len(gemms) / COLUMNS)
    with plt.rc_context(STYLE):
        size = (COLUMNS * WIDTH, rows * HEIGHT)
        figure, grid = plt.subplots(rows, COLUMNS, figsize=size, squeeze=False, layout="constrained")
        for ax in grid.flat:
            ax.set_visible(False)
        for ax, (workload, curves) in zip(grid[:first].flat, workloads.items(), strict=False):
            ax.set_visible(True)
            draw_trials(ax, workload, curves, best[workload])
        for ax, result in zip(grid[first:].flat, gemms, strict=False):
            ax.set_visible(True)
            draw_seconds(ax, result, metaschedule["seconds"] if metaschedule else 0.0)
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tuner", type=Path, help="what tuner.py --json printed")
    parser.add_argument("--metaschedule", type=Path, help="what metaschedule.py --json printed")
    parser.add_argument("--output", "-o", type=Path, default=FIGURE)
    args = parser.parse_args()
    theirs = json.loads(args.metaschedule.read_text(encoding="utf-8")) if args.metaschedule else None
    draw(json.loads(args.tuner.read_text(encoding="utf-8")), theirs, args.output)


if __name__ == "__main__":
    main()
