"""The tuning database: what was committed stays, whatever happens to its writers; misses are explained."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from llmc.targets.detect import Machine, machine
from llmc.tune import database as module
from llmc.tune import record as record_module
from llmc.tune.database import Database, DatabaseError, default_path
from llmc.tune.record import Key, Record, best_of, parse_points, points_text
from llmc.tune.task import Point

from .records import POINTS, config, measured, task

ROOT = Path(__file__).parents[2]
SCHEMA_1 = """
CREATE TABLE records (
    id INTEGER PRIMARY KEY,
    template NOT NULL, version NOT NULL, workload NOT NULL, points NOT NULL, target NOT NULL, cpu NOT NULL,
    cores NOT NULL, tvm NOT NULL, config NOT NULL, status NOT NULL, timings NOT NULL, detail NOT NULL,
    build_seconds NOT NULL, verified NOT NULL, seed NOT NULL, time NOT NULL
);
CREATE INDEX by_workload ON records (template, workload);
PRAGMA user_version = 1;
"""
WRITER = """
    import sys
    from pathlib import Path
    from llmc.tune.database import Database
    from tests.tune.records import measured, task
    database, name = Database(Path(sys.argv[1])), int(sys.argv[2])
    work = task()
    for i in range(int(sys.argv[3])):
        database.add(work, measured(0.5, MR=name, KC=i), seed=name)
        print(i, flush=True)
"""


def writer(path: Path, name: int, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(path), str(name), str(count)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    measurements = [measured(0.8), measured(1.2, MR=6, verified=False), measured(0, "crash", MR=4)]
    with Database(tmp_path / "sub" / "t.db") as database:
        for m in measurements:
            database.add(task(), m, seed=7)
        database.add(task(N=48), measured(0.9))
    with Database(tmp_path / "sub" / "t.db") as database:
        assert [r.measurement for r in database.records(task())] == measurements
        assert {r.key for r in database.records(task())} == {Key.of(task())}
        assert len(database.records()) == len(database.records(target=task().target)) == 4
        other = dataclasses.replace(task().target, name="another")
        assert database.records(target=other) == []


def test_what_code_shows_is_kept(tmp_path: Path) -> None:
    shown = dataclasses.replace(measured(0.8), code={"spills": 3, "hot_loads": 0.25})
    with Database(tmp_path / "t.db") as database:
        database.add(task(), shown)
        database.add(task(), measured(0.9))
        assert [r.measurement.code for r in database.records(task())] == [shown.code, {}]


def _schema_1(path: Path) -> None:
    """A file as the first schema had it, with one record of `task()`."""
    row = (*dataclasses.astuple(Key.of(task())), json.dumps(config()), "crash", "{}", "because", 0.25, 0, 7, 1e9)
    with sqlite3.connect(path) as raw:
        raw.executescript(SCHEMA_1)
        raw.execute(f"INSERT INTO records VALUES (NULL, {', '.join('?' * len(row))})", row)
    raw.close()


def test_the_first_schema_is_brought_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    _schema_1(path)
    old = sqlite3.connect(path, isolation_level=None)  # an earlier llmc that goes on writing
    with Database(path) as database:
        (record,) = database.records()
        assert record == Record(Key.of(task()), measured(0, "crash", verified=False))
        database.add(task(), dataclasses.replace(measured(0.8), code={"spills": 3}))
        columns = "template, version, workload, points, target, cpu, cores, tvm, config, status, timings, detail"
        columns += ", build_seconds, verified, seed, time"
        old.execute(f"INSERT INTO records ({columns}) SELECT {columns} FROM records WHERE id = 1")
        old.close()
        assert [r.measurement.code for r in database.records()] == [{}, {"spills": 3}, {}]
    with Database(path) as database:  # once is enough
        assert len(database.records()) == 3


def test_an_update_that_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.db"
    _schema_1(path)
    monkeypatch.setattr(module, "_FROM_1", f"{module._FROM_1}; SELECT 1 FROM nowhere")
    with pytest.raises(DatabaseError, match="nowhere"):
        Database(path)
    with sqlite3.connect(path) as raw:
        assert raw.execute("PRAGMA user_version").fetchone() == (1,)
        assert "code" not in [row[1] for row in raw.execute("PRAGMA table_info(records)")]
    raw.close()


def test_best_beats_the_default_beyond_the_noise(tmp_path: Path) -> None:
    with Database(tmp_path / "t.db") as database:
        assert database.best(task()) is None
        for m in (
            measured(0.995, MR=3),  # within the noise
            measured(0.5, MR=4, verified=False),  # not measured with care
            measured(0.4, MR=5),  # failed at another time
            measured(0, "unstable", MR=5),
            measured(0.7, MR=6, spread=0.5),  # nobody knows
            measured(0.9, MR=9),
            measured(0.8, MR=7),
            measured(0.84, MR=7),
        ):
            database.add(task(), m)
        best = database.best(task())
        assert best is not None and best[0] == config(MR=7) and best[1] == pytest.approx(0.82)
        best = database.best(task(), allowed=lambda c: c["MR"] != 7)
        assert best is not None and best[0] == config(MR=9)
        assert best_of([], POINTS) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"points": (Point((("M", 1),)),)}, "points is M=1 1;M=32 0.5, not M=1 1"),
        ({"workload": 48}, "workload is DenseLinearWorkload(K=64,N=96"),
        ({"cpu": "Z80"}, "cpu is {cpu}, not Z80"),
        ({"cores": 640}, "cores is {cores}, not 640"),
        ({"tvm": "9.9"}, "tvm is"),
        ({"version": 99}, "version is"),
        ({"mcpu": "i486"}, "target is {target}, not {name}(i486)"),
    ],
)
def test_a_miss_says_what_differed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict, said: str) -> None:
    here, wanted = machine(), task()
    name, target = wanted.target.name, Key.of(wanted).target
    with Database(tmp_path / "t.db") as database:
        assert "holds no records" in database.explain_miss(wanted)
        database.add(task(), measured(1.1))
        assert "none beats the default" in database.explain_miss(wanted)
        database.add(task(N=4, K=4), measured(0.9))
        if "points" in change:
            wanted = dataclasses.replace(wanted, points=change["points"])
        elif "workload" in change:
            wanted = task(N=change["workload"])
        elif "mcpu" in change:
            wanted = dataclasses.replace(wanted, target=dataclasses.replace(wanted.target, mcpu="i486", mattr=()))
        elif "version" in change:
            monkeypatch.setattr(type(wanted.kernel.template), "version", 99)
        elif "tvm" in change:
            monkeypatch.setattr(record_module, "TVM_VERSION", "9.9")
        else:
            changed: Machine = dataclasses.replace(here, **change)
            monkeypatch.setattr(record_module, "machine", lambda: changed)
        assert database.best(wanted) is None
        text = database.explain_miss(wanted)
        assert said.format(cpu=here.cpu, cores=here.cores, target=target, name=name) in text
        assert text.count(" is ") == 1, text


def test_points_as_text() -> None:
    points = (Point((("B", 1), ("S", 12)), 0.25), Point((("B", 2), ("S", 1))))
    assert points_text(points) == "B=1,S=12 0.25;B=2,S=1 1"
    assert parse_points(points_text(points)) == points


def test_default_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_path() == tmp_path / "llmc" / "tuning.db"
    monkeypatch.delenv("XDG_DATA_HOME")
    assert default_path() == Path.home() / ".local/share/llmc/tuning.db"


def test_two_writers(tmp_path: Path) -> None:
    """Both create the file, and both write all the time."""
    path = tmp_path / "t.db"
    writers = [writer(path, name, 150) for name in (1, 2)]
    assert [w.wait(timeout=120) for w in writers] == [0, 0]
    for w in writers:
        assert w.stdout is not None
        w.stdout.close()
    with Database(path) as database:
        found = sorted((r.measurement.config["MR"], r.measurement.config["KC"]) for r in database.records())
    assert found == [(name, i) for name in (1, 2) for i in range(150)]


@pytest.mark.parametrize("kills", [pytest.param(25, id="few"), pytest.param(200, id="many", marks=pytest.mark.slow)])
def test_killed_writers_lose_nothing(tmp_path: Path, kills: int) -> None:
    """kill -9 at random moments: every record that `add` returned from is there, and the next writer goes on."""
    path, chance = tmp_path / "t.db", random.Random(0)
    work = task()
    committed: set[tuple[int, int]] = set()
    for name in range(kills):
        ours, theirs = os.pipe()
        if (child := os.fork()) == 0:
            with Database(path) as database:
                for i in itertools.count():
                    database.add(work, measured(0.5, MR=name, KC=i))
                    os.write(theirs, f"{i}\n".encode())
        os.close(theirs)
        first = os.read(ours, 1)  # it writes now
        time.sleep(chance.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with open(ours) as told:
            committed |= {(name, int(line)) for line in (first.decode() + told.read()).split()}
    assert len(committed) >= kills
    with Database(path) as database:
        found = {(int(r.measurement.config["MR"]), int(r.measurement.config["KC"])) for r in database.records()}
    assert committed <= found
    assert len(found - committed) <= kills  # of each writer at most the record that it had no time to tell of


def test_full_disk(tmp_path: Path) -> None:
    """A clear error, and what was there stays."""
    path = tmp_path / "t.db"
    with Database(path) as database:
        database.add(task(), measured(0.5))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writes then fail as they do on a full disk
    try:
        with Database(path) as database:
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limit[1]))
            with pytest.raises(DatabaseError, match="free some space"):
                for _ in range(1000):
                    database.add(task(), measured(0.5))
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            count = len(database.records())
            database.add(task(), measured(0.6))
            assert len(database.records()) == count + 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)


def test_unusable_files_are_errors(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.db"
    garbage.write_bytes(os.urandom(4096))
    with pytest.raises(DatabaseError, match="not a database"):
        Database(garbage)
    later = tmp_path / "later.db"
    with sqlite3.connect(later) as raw:
        raw.execute("PRAGMA user_version = 12")
    raw.close()
    with pytest.raises(DatabaseError, match="has schema 12, this llmc reads 3"):
        Database(later)
    with pytest.raises(DatabaseError):
        Database(garbage / "below.db")


def test_a_writer_that_never_ends_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BUSY_S", 0.1)
    with Database(tmp_path / "t.db") as database:
        other = sqlite3.connect(tmp_path / "t.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(DatabaseError, match="another process has held it"):
            database.add(task(), measured(0.5))
        other.execute("ROLLBACK")
        other.close()
        database.add(task(), measured(0.5))
        row = database._db.execute("SELECT config, seed FROM records").fetchone()
        assert json.loads(row[0]) == config() and row[1] == 0
