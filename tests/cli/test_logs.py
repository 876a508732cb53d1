"""`llmc logs`: records travel, misses and the cost model are explained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmc.schedules.base import Kernel
from llmc.schedules.norm.norm import NORM, NormWorkload
from llmc.targets.detect import native
from llmc.tune import record
from llmc.tune.database import Database
from llmc.tune.record import Record
from llmc.tvm_shim import TVM_VERSION

from ..graphs import Decoder
from .conftest import Call
from .pretender import NORM_64, Pretender, artifact, records, spec


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Decoder().plain(tmp_path_factory.mktemp("tune") / "toy.onnx")


def test_misses_are_explained(
    llmc: Call, tmp_path: Path, pretended: type[Pretender], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = artifact(tmp_path / "a.llmc", spec(NORM_64, 2), spec(Kernel(NORM, NormWorkload(65)), 2))
    db = tmp_path / "t.db"
    assert llmc("logs", "explain-miss", made, "--db", db)[0] == 2  # no database
    assert llmc("tune", "--workload", str(NORM_64), "--rows", 4, "--trials", 1, "--db", db)[0] == 0

    def found() -> dict[str, tuple[str, str]]:
        code, out, err = llmc("logs", "explain-miss", made, "--db", db, "--json")
        assert code == 0, err
        return {f["workload"]: (f["provenance"], f["miss"]) for f in json.loads(out)}

    tuned, other = (Kernel(NORM, NormWorkload(K)).workload.key() for K in (64, 65))
    assert found() == {tuned: ("tuned", ""), other: ("default", "no record of this workload")}
    with monkeypatch.context() as patch:
        patch.setattr(record, "TVM_VERSION", "9.9")
        provenance, miss = found()[tuned]
    assert provenance == "default" and f"tvm is {TVM_VERSION}, not 9.9" in miss

    monkeypatch.setattr(Pretender, "RATIO", 1.2)
    assert llmc("tune", "--workload", "norm NormWorkload(K=65)", "--trials", 2, "--db", db)[0] == 0
    assert found()[other] == ("default", "no record of it beats the default beyond the noise")
    code, out, _ = llmc("logs", "explain-miss", made, "--db", db)
    assert code == 0 and "no record of it beats" in out and "0.900" in out


def test_logs_round_trip(llmc: Call, toy: Path, tmp_path: Path, pretended: type[Pretender]) -> None:
    db, other, log, both = (tmp_path / name for name in ("a.db", "b.db", "a.jsonl", "both.jsonl"))
    assert llmc("tune", toy, "--trials", 3, "--db", db)[0] == 0
    count = len(log_lines(records(db)))

    assert llmc("logs", "export", log, "--db", db)[0] == 0
    lines = log.read_text().splitlines()
    assert len(lines) == count and lines == sorted(lines)
    code, _, err = llmc("logs", "import", log, "--db", other)
    assert code == 0 and f"{count} new records" in err
    assert "0 new records" in llmc("logs", "import", log, "--db", other)[2]
    assert log_lines(records(other)) == log_lines(records(db))

    assert llmc("logs", "merge", log, log, "-o", both)[0] == 0
    assert both.read_text() == log.read_text()
    assert llmc("logs", "prune", both, "--keep", 1)[0] == 0
    assert len(both.read_text().splitlines()) == len({r.key for r in records(db)})

    listed = json.loads(llmc("logs", "list", "--db", other, "--json")[1])
    assert sum(sum(entry["records"].values()) for entry in listed) == count
    best = json.loads(llmc("logs", "best", "--db", other, "--json")[1])
    assert best and all(entry["best"]["cost"] == pytest.approx(0.9) for entry in best)
    assert "0.900" in llmc("logs", "best", "--db", other, "--target", "native")[1]
    assert json.loads(llmc("logs", "best", "--db", other, "--target", "x86-avx2", "--json")[1]) == [] or (
        native().name == "x86-avx2"
    )


def test_explaining_the_cost_model(llmc: Call, toy: Path, tmp_path: Path, pretended: type[Pretender]) -> None:
    assert llmc("tune", toy, "--trials", 3, "--db", tmp_path / "t.db")[0] == 0
    answer = json.loads(llmc("logs", "explain", "--db", tmp_path / "t.db", "--json")[1])
    assert answer["kind"] in ("regression", "ranking")
    assert {"regression", "ranking"} <= set(answer["kendall_tau"])


def test_a_cost_model_is_kept(llmc: Call, tmp_path: Path, pretended: type[Pretender]) -> None:
    db, kept = tmp_path / "t.db", tmp_path / "model.json"
    Database(db).close()
    code, _, err = llmc("logs", "train", "-o", kept, "--db", db)
    assert code == 2 and "nothing was measured yet" in err and not kept.exists()
    words = ("--workload", str(NORM_64), "--workload", "norm NormWorkload(K=65)")
    assert llmc("tune", *words, "--trials", 4, "--db", db)[0] == 0
    code, out, err = llmc("logs", "train", "-o", kept, "--db", db, "--json")
    assert code == 0, err
    told = json.loads(out)
    fresh = json.loads(llmc("logs", "explain", "--db", db, "--json")[1])
    loaded = json.loads(llmc("logs", "explain", "--model", kept, "--json")[1])  # without any database
    assert loaded == fresh
    assert (loaded["kind"], loaded["kendall_tau"]) == (told["kind"], told["kendall_tau"])
    code, _, err = llmc("logs", "train", "-o", kept, "--db", db)
    assert code == 0 and "regression" in err and "ranking" in err and "Kendall's tau" in err


def log_lines(found: list[Record]) -> set[str]:
    return {r.to_json() for r in found}


CASES: list[tuple[str, int, list[str]]] = [
    ("logs list --db {absent}", 2, ["no such tuning database", "llmc tune"]),
    ("logs explain --db {absent}", 2, ["no such tuning database"]),
    ("logs explain --model {text}", 2, ["text: is no cost model", "llmc logs train"]),
    ("logs explain --model {other}", 2, ["of another version", "train it again"]),
    ("logs explain --model {absent}", 1, ["absent: No such file"]),
    ("logs train -o {here}/m.json --db {absent}", 2, ["no such tuning database"]),
    ("logs explain-miss {text} --db {absent}", 6, ["not an llmc artifact"]),
    ("logs import {text} --db {absent}", 1, ["text:1", "no tuning record"]),
    ("logs import {absent} --db {absent}", 1, ["cannot be read"]),
    ("logs best --db {text}", 1, ["not a database"]),
]


@pytest.mark.parametrize(("line", "code", "parts"), CASES, ids=[line for line, *_ in CASES])
def test_says_what_is_wrong(llmc: Call, tmp_path: Path, line: str, code: int, parts: list[str]) -> None:
    (tmp_path / "text").write_text("neither a log nor a database, whatever else it may be")
    (tmp_path / "other.json").write_text("{}")
    names = {
        "here": tmp_path,
        "absent": tmp_path / "absent",
        "text": tmp_path / "text",
        "other": tmp_path / "other.json",
    }
    before = set(tmp_path.iterdir())
    got, out, err = llmc(*line.format(**names).split())
    assert (got, out) == (code, ""), err
    for part in parts:
        assert part in err
    assert set(tmp_path.iterdir()) == before
