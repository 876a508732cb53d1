"""Tuning logs as text, and the choice of configurations from database, shipped logs and templates."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmc import tune
from llmc.schedules.base import Kernel
from llmc.schedules.embedding.dense import EMBEDDING_DENSE, EmbeddingDenseWorkload
from llmc.schedules.gemm.dense import DENSE
from llmc.targets.x86 import TARGETS
from llmc.tune import choose_configs, logs
from llmc.tune.database import Database
from llmc.tune.logs import LogError
from llmc.tune.record import Key, Record
from llmc.tune.task import Point

from .records import config, measured, task


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with Database(tmp_path / "t.db") as database:
        yield database


def test_export_and_import_round_trip(database: Database, tmp_path: Path) -> None:
    for m in (measured(0.8), measured(1.2, MR=6, verified=False), measured(0, "timeout", MR=4)):
        database.add(task(), m)
    log = tmp_path / "a.jsonl"
    assert logs.export(database, log, task().target) == 3
    with Database(tmp_path / "other.db") as other:
        assert logs.import_(other, log) == 3
        assert logs.import_(other, log) == 0
        assert sorted(r.to_json() for r in other.records()) == log.read_text().splitlines()
        again = tmp_path / "b.jsonl"
        logs.export(other, again)
        assert again.read_bytes() == log.read_bytes()
        best, before = other.best(task()), database.best(task())
        assert best is not None and before is not None
        assert best[0] == before[0] and best[1] == pytest.approx(before[1])
    record = next(r for r in logs.read(log) if r.measurement.config["MR"] == 8)
    assert record.key == Key.of(task()) and record.measurement.cost(task().points) == pytest.approx(0.8)
    assert record.measurement.verified and record.measurement.timings["M=1"].default_seconds == pytest.approx(1e-5)


def test_lines_tell_what_code_shows_if_it_is_known(tmp_path: Path) -> None:
    plain = measured(0.8)
    shown = dataclasses.replace(plain, code={"looped": 1234567, "hot_loads": 0.123456})
    lines = [Record(Key.of(task()), m).to_json() for m in (plain, shown)]
    assert "b" not in json.loads(lines[0])
    assert json.loads(lines[1])["b"] == {"looped": 1234567, "hot_loads": 0.1235}
    assert {k: v for k, v in json.loads(lines[1]).items() if k != "b"} == json.loads(lines[0])
    log = tmp_path / "a.jsonl"
    log.write_text("\n".join(lines))
    assert [r.measurement.code for r in logs.read(log)] == [{}, {"looped": 1234567, "hot_loads": 0.1235}]


def test_lines_are_sorted_and_do_not_depend_on_order(database: Database, tmp_path: Path) -> None:
    records = [Record(Key.of(task(N)), measured(0.5 + i / 100, KC=i)) for N in (96, 48) for i in range(5)]
    texts = []
    for order in (records, records[::-1]):
        with Database(tmp_path / f"{id(order)}.db") as other:
            other.insert(order)
            logs.export(other, tmp_path / "x.jsonl")
        texts.append((tmp_path / "x.jsonl").read_text())
    assert texts[0] == texts[1]
    assert texts[0].splitlines() == sorted(texts[0].splitlines())
    reordered = dataclasses.replace(measured(0.5), config=dict(reversed(list(config().items()))))
    assert Record(Key.of(task()), reordered).to_json() == Record(Key.of(task()), measured(0.5)).to_json()


def test_merge_is_a_union(database: Database, tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    database.add(task(), measured(0.8))
    logs.export(database, first)
    database.add(task(), measured(0.9, MR=6))
    logs.export(database, second)
    assert logs.merge([first, second, first], first) == 2
    assert first.read_bytes() == second.read_bytes()


def test_prune_keeps_the_best_and_a_sample(database: Database, tmp_path: Path) -> None:
    for i in range(40):
        database.add(task(), measured(1 + i / 100, verified=False, KC=i))
    for i in range(5):
        database.add(task(), measured(0, "crash", verified=False, KC=100 + i))
    database.add(task(), measured(0.9, KC=200))
    database.add(task(N=48), measured(0.9))
    log = tmp_path / "a.jsonl"
    logs.export(database, log)
    assert logs.prune(log, keep=10) == 11
    kept = [r.measurement for r in logs.read(log) if r.key == Key.of(task())]
    assert {200, 0, 1, 2, 3} <= {m.config["KC"] for m in kept}
    assert max(int(m.config["KC"]) for m in kept if m.status == "ok" and not m.verified) > 25
    assert any(m.status == "crash" for m in kept)
    assert logs.prune(log, keep=100) == 11


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda d: d.pop("w"), "'w' is missing"),
        (lambda d: d.update(cores="two"), "wrong type"),
        (lambda d: d.update(c=[1]), "wrong type"),
        (lambda d: d.update(s="fine"), "status 'fine' is unknown"),
        (lambda d: d.update(b={"spills": "many"}), "wrong type"),
        (lambda d: d.update(us={"M=1": [1, 1, 0]}), "not those of its points"),
        (lambda d: d.update(us={"M=1": [1, 0, 0], "M=32": [1, 1, 0]}), "not those of its points"),
        (lambda d: d.update(us={"M=1": [1], "M=32": [1, 1, 0]}), "no tuning record"),
        (lambda d: d.update(p="M"), "no tuning record"),
        (lambda d: d.update(k="dense"), "no tuning record"),
    ],
)
def test_malformed_lines_are_refused(database: Database, tmp_path: Path, edit: object, said: str) -> None:
    good = Record(Key.of(task()), measured(0.8)).to_json()
    data = json.loads(good)
    edit(data)  # type: ignore[operator]
    log = tmp_path / "a.jsonl"
    log.write_text(f"{good}\n\n{json.dumps(data)}\n")
    with pytest.raises(LogError, match="no tuning record") as info:
        logs.import_(database, log)
    assert f"{log}:3" in str(info.value) and said in str(info.value)
    assert database.records() == []


def test_cut_off_and_unreadable_files(tmp_path: Path) -> None:
    log = tmp_path / "a.jsonl"
    log.write_text(Record(Key.of(task()), measured(0.8)).to_json()[:-9])
    with pytest.raises(LogError, match=r"a\.jsonl:1"):
        logs.read(log)
    log.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LogError, match="cannot be read"):
        logs.read(log)
    with pytest.raises(LogError, match="cannot be read"):
        logs.read(tmp_path / "absent")


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "a.jsonl"
    log.write_text(Record(Key.of(task()), measured(0.8)).to_json() + "\n")
    before = log.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(logs.os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        logs.prune(log, 1)
    assert log.read_bytes() == before and list(tmp_path.iterdir()) == [log]


@pytest.mark.parametrize("target", TARGETS.values(), ids=str)
def test_shipped_logs_are_well_formed(target: object) -> None:
    records = logs.shipped(target)  # type: ignore[arg-type]
    lines = [r.to_json() for r in records]
    assert lines == sorted(set(lines))


def choose(database: Database, kernel: Kernel, *others: Kernel) -> tuple[object, str]:
    choice = choose_configs([kernel, *others], task().target, database.path)[kernel]
    return choice.config, choice.provenance


def test_choice_prefers_own_records_then_shipped_ones(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, key = task().kernel, Key.of(task())
    default = DENSE.default(kernel.workload, task().target)
    assert choose(database, kernel) == (default, "default")
    elsewhere = dataclasses.replace(key, cpu="Another CPU", tvm="0.0")
    shipped = [Record(elsewhere, measured(0.7, MR=6)), Record(dataclasses.replace(key, version=0), measured(0.1, MR=4))]
    monkeypatch.setattr(tune, "shipped", lambda target: tuple(shipped))
    assert choose(database, kernel) == (config(MR=6), "shipped")
    database.insert([Record(elsewhere, measured(0.2, MR=5))])  # of another TVM
    assert choose(database, kernel) == (config(MR=6), "shipped")
    database.add(task(), measured(0.1, MR=99))  # no longer in the template's space
    database.add(task(), measured(0.9, MR=7))
    assert choose(database, kernel) == (config(MR=7), "tuned")
    assert choose_configs([kernel], task().target, database.path.parent / "absent.db")[kernel].provenance == "shipped"


def test_other_machines_records_serve_until_this_one_has_its_own(database: Database) -> None:
    """Of a device, or imported: without own records they decide, with own ones they are not asked."""
    kernel, device = task().kernel, dataclasses.replace(Key.of(task()), cpu="rpc:board", cores=0)
    database.insert([Record(device, measured(0.8, MR=6))])
    assert choose(database, kernel) == (config(MR=6), "tuned")
    database.add(task(), measured(1.0, MR=6))  # here it brings nothing
    assert choose(database, kernel) == (DENSE.default(kernel.workload, task().target), "default")
    database.add(task(), measured(0.9, MR=7))
    assert choose(database, kernel) == (config(MR=7), "tuned")


def test_records_with_more_points_go_first(database: Database) -> None:
    one = (Point((("M", 1),)),)
    database.add(task(points=one), measured(0.2, MR=6, points=one))
    assert choose(database, task().kernel) == (config(MR=6), "tuned")
    database.add(task(), measured(0.8, MR=7))
    assert choose(database, task().kernel) == (config(MR=7), "tuned")


def test_a_shared_weight_keeps_its_layout(database: Database) -> None:
    """An embedding reads the output layer's panels: a faster configuration with other panels must not be chosen."""
    kernel = task().kernel
    panel = 3 * task().target.lanes
    embedding = Kernel(EMBEDDING_DENSE, EmbeddingDenseWorkload(96, 64, panel))
    default = DENSE.default(kernel.workload, task().target)
    other = 1 if default["NV"] != 1 else 2
    database.add(task(), measured(0.5, NV=other, MR=6))
    assert choose(database, kernel)[1] == "tuned"
    assert choose(database, kernel, embedding) == (default, "default")
    database.add(task(), measured(0.8, **(default | {"MR": 5})))  # type: ignore[arg-type]
    assert choose(database, kernel, embedding) == (default | {"MR": 5}, "tuned")
