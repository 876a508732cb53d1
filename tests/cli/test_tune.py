"""`llmc tune` on models: what is measured is kept and used; what a user may get wrong is one clear message."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc import pipeline
from llmc.targets.detect import machine, native
from llmc.tune import choose_configs, effort

from ..graphs import Decoder
from .conftest import Call
from .pretender import Pretender, records


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Decoder().plain(tmp_path_factory.mktemp("tune") / "toy.onnx")


@pytest.mark.alone
def test_a_model_is_tuned(llmc: Call, toy: Path, tmp_path: Path) -> None:
    """With real measurements."""
    db = tmp_path / "new" / "tuning.db"
    code, out, err = llmc("tune", toy, "--trials", 2, "--time-budget", "4s", "--seed", 3, "--db", db, "--json")
    assert code == 0, err
    answer = json.loads(out)
    found = records(db)
    assert not answer["interrupted"]
    assert 0 < sum(k["trials"] for k in answer["kernels"]) <= len(found)
    assert {r.key.workload for r in found} <= {k["workload"] for k in answer["kernels"]}
    assert any(r.measurement.status == "ok" for r in found), found


def test_a_second_run_is_warm(llmc: Call, toy: Path, tmp_path: Path, pretended: type[Pretender]) -> None:
    db = tmp_path / "tuning.db"
    assert llmc("tune", toy, "--trials", 2, "--db", db)[0] == 0
    first = pretended.asked
    code, out, err = llmc("tune", toy, "--trials", 2, "--db", db, "--json")
    assert code == 0, err
    assert first and all(asked not in first for asked in pretended.asked)
    tuned = [k for k in json.loads(out)["kernels"] if k["provenance"] == "tuned"]
    assert tuned and all(k["ratio"] == pytest.approx(0.9) for k in tuned)


def test_the_summary_for_people(llmc: Call, toy: Path, tmp_path: Path, pretended: type[Pretender]) -> None:
    code, out, _ = llmc("tune", toy, "--trials", 1, "--db", tmp_path / "t.db")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split()[:3] == ["kernel", "calls", "trials"]
    assert any("0.900" in line and "tuned" in line and "Workload(" in line for line in lines)
    assert any("1.000" in line and "default" in line for line in lines)


def test_compile_takes_what_it_found(
    toy: Path, tmp_path: Path, pretended: type[Pretender], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the lowering, which sees the configurations that won."""

    class Lowered(Exception):
        pass

    seen: dict[Any, Any] = {}

    def lower(plan: Any, configs: Any, target: Any) -> None:
        seen.update(configs)
        raise Lowered

    monkeypatch.setattr(pipeline, "lower", lower)
    stages: list[pipeline.StageEvent] = []
    db = tmp_path / "t.db"
    with pytest.raises(Lowered):
        pipeline.compile(toy, tune="quick", trials=2, database=db, progress=stages.append)
    assert pretended.asked and "tuned" in stages[-1].detail
    choices = choose_configs(seen, native(), db)
    assert {k: c.config for k, c in choices.items()} == seen
    assert any(c.provenance == "tuned" and c.config != k.template.default(k.workload, native())
               for k, c in choices.items())  # fmt: skip


def test_interrupting_keeps_what_was_measured(toy: Path, tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from llmc.cli import main\n"
        "from llmc.tune import stage\n"
        "from tests.cli.pretender import Pretender\n"
        "class Interrupted(Pretender):\n"
        "    def measure(self, task, configs, *, careful=False):\n"
        "        for m in super().measure(task, configs, careful=careful):\n"
        "            yield m\n"
        "            if not careful: os.kill(os.getpid(), signal.SIGINT)\n"
        "stage.Measurer = Interrupted\n"
        f"sys.exit(main(['tune', {str(toy)!r}, '--db', {str(tmp_path / 't.db')!r}, '--json']))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root)
    assert done.returncode == 130, done.stderr
    assert done.stderr.endswith("llmc: interrupted\n") and "Traceback" not in done.stderr
    answer = json.loads(done.stdout)
    assert answer["interrupted"] and sum(k["trials"] for k in answer["kernels"]) == 1
    assert [r.measurement.verified for r in records(tmp_path / "t.db")] == [False, True]


CASES: list[tuple[str, int, list[str]]] = [
    ("tune", 2, ["nothing to tune", "--workload"]),
    ("tune {absent}", 3, ["no such file", ".onnx or .llmc"]),
    ("tune {text}", 3, ["not an ONNX model"]),
    ("tune {zip}", 6, ["not an llmc artifact"]),
    ("tune {damaged}", 6, ["is not an llmc artifact, or is truncated"]),
    ("tune {toy} --rows 1", 2, ["--rows needs --workload"]),
    ("tune {damaged} --quantize w8a8", 2, ["--quantize needs an ONNX file"]),
    ("tune {toy} --effort hard", 2, ["no tuning effort 'hard'", "quick, full"]),
    ("tune {toy} --effort none", 2, ["nothing to do", "quick or full"]),
    ("tune {toy} --time-budget 10", 2, ["'10' is not a duration", "90s, 10m or 1h"]),
    ("tune {toy} --time-budget 0s", 2, ["'0s' is not a duration"]),
    ("tune {toy} --trials 0", 2, ["--trials"]),
    ("tune {toy} --target z80", 2, ["no target 'z80'"]),
    ("tune {toy} --db {text}", 1, ["text: ", "not a database", "--db"]),
    ("tune {toy} --db {text}/t.db", 1, ["the tuning database failed", "--db"]),
    ("compile {toy} -o {here}/o.llmc --tune hard", 2, ["no tuning effort 'hard'"]),
    ("compile {toy} -o {here}/o.llmc --trials 3", 2, ["without tuning", "--tune quick"]),
]


@pytest.mark.parametrize(("line", "code", "parts"), CASES, ids=[line for line, *_ in CASES])
def test_says_what_is_wrong(llmc: Call, toy: Path, tmp_path: Path, line: str, code: int, parts: list[str]) -> None:
    (tmp_path / "text").write_text("neither a log nor a database, whatever else it may be")
    (tmp_path / "damaged.llmc").write_text("{}")
    np.savez(tmp_path / "zip.npz", a=np.zeros(3))
    names = {"toy": toy, "here": tmp_path, "damaged": tmp_path / "damaged.llmc", "zip": tmp_path / "zip.npz"}
    names |= {name: tmp_path / name for name in ("absent", "text")}
    before = set(tmp_path.iterdir())
    got, out, err = llmc(*line.format(**names).split())
    assert (got, out) == (code, ""), err
    for part in parts:
        assert part in err
    assert set(tmp_path.iterdir()) == before


def test_a_target_of_another_machine(llmc: Call, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weak = dataclasses.replace(machine(), flags=frozenset())
    monkeypatch.setattr(effort, "machine", lambda: weak)
    code, out, err = llmc("tune", toy, "--target", "x86-avx512", "--db", tmp_path / "t.db")
    assert (code, out) == (2, "")
    assert "target x86-avx512" in err and "it lacks" in err and "avx512f" in err
    assert not (tmp_path / "t.db").exists()
