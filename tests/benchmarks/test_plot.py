"""The tuner's figure, from made-up numbers of the form that the benchmarks print."""

from __future__ import annotations

import importlib.util
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "plot_tuner.py"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def plot() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plot_tuner", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tuner(workloads: int = 14, trials: int = 64, seeds: int = 5) -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def runs(pace: float) -> list[list[float]]:
        costs = 1 + rng.random((seeds, trials)) ** pace
        return [list(run[: trials - seed]) for seed, run in enumerate(np.minimum.accumulate(costs, axis=1))]

    names = [f"dense M=128 N={64 * (i + 1)},K=576" for i in range(workloads)]
    strategies = {"random": 1.0, "cold": 2.0, "warm": 4.0}
    return {
        "by_workload": [{"task": name, "best": 0.8} for name in names],
        "curves": {name: {s: runs(pace) for s, pace in strategies.items()} for name in names},
    }


def metaschedule() -> dict[str, Any]:
    curves = {"llmc": [[0.0, 0, 100.0], [5.0, 3, 120.0]], "metaschedule": [[20.0, 16, 60.0], [40.0, 32, 90.0]]}
    found = {"shape": "128x576x576", "default": 100.0, "llmc": 120.0, "metaschedule": 90.0, "curves": curves}
    nothing = found | {"shape": "1x1024x2048", "metaschedule": None, "curves": curves | {"metaschedule": []}}
    return {"seconds": 60.0, "shapes": [found, nothing]}


def texts(path: Path) -> list[str]:
    return ["".join(element.itertext()) for element in ET.parse(path).iter(f"{SVG}text")]


def test_the_figure_names_everything_once(plot: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "figures" / "tuner.svg"
    plot.draw(tuner(), metaschedule(), path)
    written = texts(path)
    for name in ("warm", "cold", "random", "default", "dense M=128 N=64,K=576", "fp32 GEMM 1x1024x2048 (M x N x K)"):
        assert written.count(name) == 1
    assert written.count("MetaSchedule, 32 trials") == 1  # the other shape's found nothing
    assert written.count("llmc, 3 trials") == 2
    assert path.stat().st_size < 300_000


def test_the_same_numbers_give_the_same_file(plot: ModuleType, tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        plot.draw(tuner(workloads=1), None, tmp_path / name)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    assert not re.search(r"<dc:date>|20\d\d-\d\d-\d\d", text)
    plot.draw(tuner(workloads=1, seeds=4), None, tmp_path / "c.svg")
    assert text != (tmp_path / "c.svg").read_text()


def test_a_search_that_ended_keeps_its_best(plot: ModuleType) -> None:
    assert plot.padded([[3.0, 2.0, 1.0], [2.0]]).tolist() == [[3.0, 2.0, 1.0], [2.0, 2.0, 2.0]]


def test_points_between_corners_are_left_out(plot: ModuleType) -> None:
    costs = np.array([[3.0, 3.0, 2.0, 2.0, 2.0], [3.0, 3.0, 3.0, 3.0, 3.0]])
    assert plot.corners(costs).tolist() == [0, 2, 4]


def test_curves_are_drawn_where_the_numbers_are(plot: ModuleType) -> None:
    figure, ax = plot.plt.subplots()
    plot.draw_trials(ax, "w", {"random": [[3.0], [2.0], [1.0]], "cold": [[2.0]], "warm": [[1.5, 1.0]]}, best=0.5)
    lines = {line.get_label(): list(line.get_ydata()) for line in ax.get_lines()}
    assert lines == {"random": [2.0], "cold": [2.0], "warm": [1.5, 1.0], "default": [2.0, 2.0]}
    plot.plt.close(figure)
    figure, ax = plot.plt.subplots()
    plot.draw_seconds(ax, metaschedule()["shapes"][0], 60.0)
    theirs = next(line for line in ax.get_lines() if "MetaSchedule" in str(line.get_label()))
    assert theirs.get_xydata().tolist() == [[20.0, 60.0], [40.0, 90.0], [60.0, 90.0]]
    plot.plt.close(figure)
