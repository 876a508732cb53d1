"""`llmc report`: a page about a database and about real artifacts; what a user may get wrong is one clear message."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from llmc import ceilings, profile
from llmc.cli import app
from llmc.package.reader import open_artifact
from llmc.pipeline import compile
from llmc.schedules.base import Kernel
from llmc.schedules.norm.norm import NORM, NormWorkload
from llmc.targets.x86 import AVX2
from llmc.tune.database import Database
from llmc.tune.task import Measurement, Task, Timing
from llmc.tune.tasks import points_of

from ..graphs import F32, Builder
from ..tune.records import measured, task
from .conftest import Call


@pytest.fixture
def db(tmp_path: Path) -> Path:
    """One task: two candidates, one of which failed, and the winner."""
    with Database(tmp_path / "t.db") as database:
        for m in (measured(0.9, verified=False), measured(0, "build", verified=False, MR=6), measured(0.92)):
            database.add(task(), m)
    return tmp_path / "t.db"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A norm and a linear layer: `old` untuned, and `new` with another configuration for the norm."""
    folder = tmp_path_factory.mktemp("reported")
    builder = Builder()
    x = builder.input("x", F32, ["rows", 48])
    scale, weight = builder.const("scale", np.ones(48), np.float32), builder.const("w", np.ones((48, 96)), np.float32)
    builder.op("MatMul", [builder.op("LayerNormalization", [x, scale], "normed"), weight], "y")
    builder.output("y", F32, ["rows", 96])
    onnx = builder.save(folder / "model.onnx", 17)
    compile(onnx, target="x86-avx2").save(folder / "old.llmc")
    (spec,) = (k for k in open_artifact(folder / "old.llmc").manifest.kernels if k.template == "norm")
    kernel = Kernel(NORM, NormWorkload(**spec.workload))
    other = next(c for c in NORM.space(kernel.workload, AVX2) if c != spec.config)
    faster = Task(kernel, AVX2, points_of(kernel))
    with Database(folder / "t.db") as database:
        timings = {str(p): Timing(0.5e-5, 1e-5, 0.01) for p in faster.points}
        database.add(faster, Measurement(other, "ok", timings, verified=True))
    compile(onnx, target="x86-avx2", database=folder / "t.db").save(folder / "new.llmc")
    return {name: folder / f"{name}.llmc" for name in ("old", "new")}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "SECONDS", 0.02)
    monkeypatch.setattr(ceilings, "peak", lambda target, unit: 1e11 if unit == "fma" else 4e11)
    monkeypatch.setattr(ceilings, "read_bandwidth", lambda target: 1e10)


def test_help_has_an_example() -> None:
    result = CliRunner().invoke(app, ["report", "--help"])
    assert result.exit_code == 0 and "Example:\n    llmc report" in result.output and "--json" in result.output


def test_a_database(llmc: Call, db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = llmc("report", "--db", db)
    assert (code, out) == (0, "") and "wrote report.html" in err
    text = (tmp_path / "report.html").read_text()
    assert "0.920" in text and "1 build" in text and "Fewer than two tasks" in text
    code, out, _ = llmc("report", "--db", db, "--target", "native", "--json", "-o", "other.html")
    data = json.loads(out)
    assert code == 0 and (tmp_path / "other.html").read_text() == text
    assert data["records"] == 3 and data["profiles"] is None and data["quality"] is None
    (only,) = data["tasks"]
    assert [t["status"] for t in only["trials"]] == ["ok", "build"]
    assert only["trials"][1]["cost"] is None and only["best"]["cost"] == pytest.approx(0.92)


def test_data_alone_write_nothing(llmc: Call, db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert llmc("report", "--db", db, "--json")[0] == 0
    assert {f.suffix for f in tmp_path.iterdir()} <= {".db", ".db-wal", ".db-shm"}


@pytest.mark.usefixtures("quick")
def test_before_and_after(llmc: Call, models: dict[str, Path], db: Path, tmp_path: Path) -> None:
    configs = [{k.template: k.config for k in open_artifact(m).manifest.kernels} for m in models.values()]
    assert configs[0]["dense"] == configs[1]["dense"] and configs[0]["norm"] != configs[1]["norm"]
    page = tmp_path / "r.html"
    words = ("report", models["new"], "--before", models["old"], "--seconds", 4, "--db", db, "-o", page, "--json")
    code, out, err = llmc(*words)
    assert code == 0, err
    data = json.loads(out)["profiles"]
    assert data["ceilings"] == {"peaks": {"fma": 1e11, "dot": 4e11}, "bandwidth": 1e10}
    ((name, pair),) = data["tasks"].items()
    after, before = ({o["name"]: o for o in pair[side]["operators"]} for side in ("after", "before"))
    assert name == "rows=128" and after.keys() == before.keys() and {"norm_0", "dense_1"} <= after.keys()
    assert after["dense_1"]["ops"] == before["dense_1"]["ops"] == 2 * 128 * 48 * 96
    text = page.read_text()
    assert text.count("<svg") == 2 and "ratio" in text and "dot 400 Gop/s" in text
    for o in (before["dense_1"], after["dense_1"]):
        assert f"{o['seconds'] * 1e3:.3f}" in text


@pytest.mark.usefixtures("quick")
def test_a_decoder(llmc: Call, decoder: Path, db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "resolve_target", lambda name: AVX2)  # the toy names none of llmc's
    code, out, err = llmc("report", decoder, "--seconds", 1, "--db", db, "--json")
    assert code == 0, err
    tasks = json.loads(out)["profiles"]["tasks"]
    assert set(tasks) == {"prefill 128", "decode 1"}
    assert all(t["before"] is None and t["after"]["operators"] for t in tasks.values())


CASES: list[tuple[str, int, list[str]]] = [
    ("report --db {absent}", 2, ["no such tuning database", "llmc tune"]),
    ("report --db {text}", 1, ["not a database"]),
    ("report --db {db} --before {old}", 2, ["--before needs an artifact", "llmc report"]),
    ("report {absent} --db {db}", 6, ["absent: cannot be read"]),
    ("report {new} --before {text} --db {db}", 6, ["text: "]),
    ("report {new} --before {mlp} --db {db}", 2, ["mlp.llmc: does not compare", "untuned and tuned"]),
    ("report --db {db} --target z80", 2, ["no target 'z80'"]),
    ("report {new} --db {db} --seconds 0", 2, ["--seconds"]),
    ("report {new} --db {db} -o {absent}/r.html", 2, ["absent: no such folder", "--output"]),
]


@pytest.mark.parametrize(("line", "code", "parts"), CASES, ids=[line for line, *_ in CASES])
def test_says_what_is_wrong(
    llmc: Call, models: dict[str, Path], mlp: Path, db: Path, tmp_path: Path, line: str, code: int, parts: list[str]
) -> None:
    (tmp_path / "text").write_text("neither an artifact nor a database, whatever else it may be")
    names = {"db": db, "absent": tmp_path / "absent", "text": tmp_path / "text", "mlp": mlp, **models}
    got, out, err = llmc(*line.format(**names).split())
    assert (got, out) == (code, ""), err
    assert all(part in err for part in parts), err
    assert not list(tmp_path.glob("*.html"))


def test_without_matplotlib_there_are_data(db: Path, tmp_path: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        line = ["report", "--db", str(db), *words]
        script = f"import sys; sys.modules['matplotlib'] = None; from llmc.cli import main; sys.exit(main({line}))"
        return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)

    page = run("-o", str(tmp_path / "r.html"))
    assert page.returncode == 2 and "module matplotlib, which is not installed" in page.stderr
    assert "pip install 'llmc[report]'" in page.stderr and not (tmp_path / "r.html").exists()
    data = run("--json")
    assert data.returncode == 0 and json.loads(data.stdout)["records"] == 3
