"""Every kind of hostile file is refused by the command line: at once, in little memory, in one line that says why."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

from tests.importer.helpers import FLOAT, model, node
from tests.security.all_kinds import KINDS

ROOT = Path(__file__).parent.parent.parent
SECONDS = 1.0
BYTES = 256 << 20
CODES = {".onnx": {3, 4, 5}, ".llmc": {6}}


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By kind: what a process with limits said. One process serves all kinds; it dies of none."""
    folder = tmp_path_factory.mktemp("hostile")
    warm_up = folder / "foreign.onnx"
    foreign = helper.make_node("Foo", ["x"], ["y"], domain="my")
    onnx.save(model([foreign, node("If", "c", "z")], [("x", FLOAT, [4]), ("c", 9, [])], ["y"]), warm_up)
    paths: dict[str, Path] = {}
    for name, kind in KINDS.items():
        (folder / name).mkdir()
        path = kind.make(folder / name)
        if path is not None:
            paths[str(path)] = folder / name
    command = [sys.executable, "-m", "tests.security.victim", str(warm_up), *paths]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    found = {paths[report["file"]].name: report for report in told}
    assert done.returncode == 0, f"died of {told[-1]['file'] if told else 'nothing'}: {done.stderr[-2000:]}"
    return found


@pytest.mark.parametrize("name", KINDS)
def test_refused(refusals: dict[str, dict[str, Any]], name: str) -> None:
    if name not in refusals:
        pytest.skip("this system cannot make such a file")
    report = refusals[name]
    lines = report["says"].splitlines()
    while lines and not lines[0].startswith("llmc: "):  # progress
        lines.pop(0)
    assert KINDS[name].says in "".join(lines)
    assert report["code"] in CODES[Path(report["file"]).suffix]
    assert "Traceback" not in report["says"]
    assert all(line.startswith("  ") for line in lines[1:]), "one reason; a node that cannot be compiled, a hint"
    assert len(lines) <= 3 and max(map(len, lines)) < 1000
    assert report["seconds"] < SECONDS
    assert report["grown"] < BYTES


def test_there_are_enough() -> None:
    assert sum(kind.make.__module__.endswith("artifacts") for kind in KINDS.values()) >= 40
    assert len(KINDS) >= 180
