"""kill -9 of a whole tuner: nothing that was stored is lost, nobody is left behind, and the next one goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from llmc.tune.database import Database

pytestmark = pytest.mark.alone
ROOT = Path(__file__).parents[2]


MANY = pytest.param(200, id="many", marks=[pytest.mark.slow, pytest.mark.timeout(1800)])


@pytest.mark.parametrize("kills", [pytest.param(6, id="few"), MANY])
def test_a_killed_tuner_loses_nothing_and_resumes(tmp_path: Path, kills: int) -> None:
    path = tmp_path / "t.db"
    command = [sys.executable, "-m", "tests.tune.killed", str(path), str(kills), "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    runs = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(runs) == kills and all(run["killed"] for run in runs)
    assert any(run["workers"] for run in runs) and not any(run["left"] for run in runs)
    told = Counter(json.dumps(record) for run in runs for record in run["told"])
    with Database(path) as database:
        found = Counter(
            json.dumps(
                [
                    f"{r.key.template}.{r.key.version}:{r.key.workload}",
                    sorted(r.measurement.config.items()),
                    r.measurement.verified,
                ]
            )
            for r in database.records()
        )
    assert told and told <= found
    assert (found - told).total() <= kills  # of each run at most the record that it had no time to tell of
    searched = [count for record, count in found.items() if record.endswith("false]")]
    assert max(searched) == 1  # no run measured what an earlier one had
