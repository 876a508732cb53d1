"""Tuning for GPUs without one: whatever nobody measured says so, wherever it is shown."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmc.emulator.emulator import available
from llmc.tune import effort, predicted, stage
from llmc.tune.task import Measurement, Task
from tests.gpu.tools import needs_compiler

from ..graphs import linear
from .conftest import Call
from .pretender import Pretender, records

NORM = "norm_cuda NormWorkload(K=576)"
FIGURE = re.compile(r"\b0\.\d\d\d\b( predicted)?")


class Foreteller(Pretender):
    """Stands for `Predictor`."""

    def measure(self, task: Task, configs: Any, *, careful: bool = False) -> Iterator[Measurement]:
        for m in super().measure(task, configs, careful=careful):
            yield dataclasses.replace(m, predicted="emulated" if careful else "ranked")


@pytest.fixture
def foretold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effort, "compute_capability", lambda: None)
    monkeypatch.setattr(effort, "find_toolchain", lambda: None)
    monkeypatch.setattr(stage, "shipped", lambda target: ())
    monkeypatch.setattr(predicted, "Predictor", Foreteller)


def test_every_figure_says_that_it_is_predicted(llmc: Call, tmp_path: Path, foretold: None) -> None:
    db = tmp_path / "t.db"
    code, out, err = llmc("tune", "--target", "cuda-sm80", "--workload", NORM, "--trials", 2, "--db", db)
    assert code == 0 and "predicted+emulated" in out, err
    assert llmc("logs", "export", tmp_path / "x.jsonl", "--target", "cuda-sm80", "--db", db)[0] == 0
    log = (tmp_path / "x.jsonl").read_text()
    assert '"predicted_us"' in log and '"us"' not in log
    for words in (("logs", "list"), ("logs", "best", "--target", "cuda-sm80")):
        code, shown, _ = llmc(*words, "--db", db)
        assert code == 0 and "predicted by model" in shown
        out += shown
    figures = [match[1] for match in FIGURE.finditer(out)]
    assert len(figures) >= 3 and all(figures), out
    (best,) = json.loads(llmc("logs", "best", "--json", "--db", db)[1])
    assert best["predicted"] is True and best["best"]["predicted"] == "emulated"


def test_a_page_says_so_too(llmc: Call, tmp_path: Path, foretold: None) -> None:
    pytest.importorskip("matplotlib")
    db, page = tmp_path / "t.db", tmp_path / "r.html"
    assert llmc("tune", "--target", "cuda-sm80", "--workload", NORM, "--trials", 2, "--db", db)[0] == 0
    code, _, err = llmc("report", "--db", db, "-o", page)
    text = page.read_text()
    assert code == 0 and "0.900 predicted" in text and "predicted time / default" in text, err
    assert "0 cores" not in text and "Fewer than two tasks were timed" in text


@needs_compiler
def test_a_model_is_compiled_with_what_was_predicted(llmc: Call, tmp_path: Path, foretold: None) -> None:
    linear(tmp_path / "m.onnx", 8)
    artifact, db = tmp_path / "m.llmc", tmp_path / "t.db"
    words = ("--target", "cuda-sm80", "--tune", "quick", "--trials", 1, "--db", db, "-o", artifact)
    code, _, err = llmc("compile", tmp_path / "m.onnx", *words)
    assert code == 0 and "predicted+emulated" in err, err
    assert all(r.key.predicted and r.key.target_name == "cuda-sm80" for r in records(db))
    code, out, _ = llmc("inspect", artifact, "--json")
    assert code == 0 and "predicted+emulated" in {k["provenance"] for k in json.loads(out)["kernels"]}
    code, out, _ = llmc("logs", "explain-miss", artifact, "--db", db)
    assert code == 0 and "nobody measured it" in out and all(m[1] for m in FIGURE.finditer(out))


@needs_compiler
@pytest.mark.skipif(not available(), reason="the emulator needs g++")
def test_a_kernel_is_tuned_as_a_user_types_it(llmc: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is pretended."""
    monkeypatch.setattr(effort, "compute_capability", lambda: None)
    words = ("--target", "cuda-sm90", "--workload", NORM, "--rows", "1,8", "--trials", 8, "--db", tmp_path / "t.db")
    code, out, err = llmc("tune", *words, "--json")
    assert code == 0, err
    (kernel,) = json.loads(out)["kernels"]
    assert kernel["trials"] == 4 and not kernel["error"] and kernel["provenance"] in ("default", "predicted+emulated")
    assert {r.key.points for r in records(tmp_path / "t.db")} == {"M=1 1;M=8 1"}
