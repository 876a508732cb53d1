"""The fuzzer itself: same seed, same graphs; what fails is seen, made small, and kept."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from benchmarks import fuzz
from tests.fuzz import differential, isolation
from tests.fuzz.differential import Failure, check
from tests.fuzz.generator import generate
from tests.fuzz.isolation import isolated
from tests.fuzz.minimise import minimise
from tests.fuzz.program import Length, Node, Program, Value, feeds, load, save

N = Length.symbol("N")


def small() -> Program:
    """y = tanh(-x), z = x x, of any number of rows."""
    values = {name: Value(name, "float32", (N, 3), -2, 2, (1e-6, 1e-6)) for name in ("x", "h", "y")}
    values["z"] = Value("z", "float32", (N, 3), 0, 4, (1e-6, 1e-6))
    nodes = (Node("Neg", ("x",), ("h",)), Node("Tanh", ("h",), ("y",)), Node("Mul", ("x", "x"), ("z",)))
    return Program(21, ({"N": 2}, {"N": 5}), values, ("x",), {}, nodes, ("y", "z"))


def test_a_number_is_a_program() -> None:
    assert generate(3, 5) == generate(3, 5)
    assert generate(3, 5) != generate(3, 6)


def test_every_program_has_something_to_compare() -> None:
    """Of seed 13, what was 1876 gave values that are all too large to compare."""
    assert generate(13, 1876).outputs


def test_a_file_is_a_program(tmp_path: Path) -> None:
    for number in range(40):
        program = generate(0, number)
        save(program, tmp_path / "program.json")
        assert load(tmp_path / "program.json") == program


def test_lengths() -> None:
    length = (N + Length.symbol("S")) * 2 + -1
    assert length.at({"N": 3, "S": 4}) == 13
    assert str(length) == "2 * S + 2 * N - 1"
    assert N + 0 == N


def test_every_run_has_its_sizes() -> None:
    assert [feeds(small(), run)["x"].shape for run in (0, 1)] == [(2, 3), (5, 3)]


def test_wrong_results_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value, a type, a shape, and a function that cannot be called; the programs around it are fine."""
    real = differential.build_functions
    wrongs = [
        lambda y: y + np.float32(1e-4),
        lambda y: y.astype(np.float64),
        lambda y: y[:-1],
        lambda y: y * np.float32(np.nan),
        lambda y: 1 // 0,
    ]

    def build(graphs: Sequence[object], target: object) -> list[object]:
        calls = real(graphs, target)

        def broken(i: int) -> object:
            return lambda *inputs: [wrongs[i - 1](y) for y in calls[i](*inputs)]

        return [calls[0], *map(broken, range(1, len(wrongs) + 1)), calls[-1]]

    monkeypatch.setattr(differential, "build_functions", build)
    found = check([small()] * (len(wrongs) + 2))
    assert [f.kind if f else "" for f in found] == ["", "plain", "plain", "plain", "plain", "run plain", ""]


def test_a_reference_outside_of_its_bounds_blames_the_generator() -> None:
    program = small()
    program.values["z"] = Value("z", "float32", (N, 3), 0, 1, (1e-6, 1e-6))
    (failure,) = check([program])
    assert failure is not None and failure.kind == "bounds"


def test_a_process_that_dies_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def dying(programs: Sequence[Program], target: object) -> list[Failure | None]:
        if any(p.opset == 0 for p in programs):
            os._exit(7)
        return [None for _ in programs]

    monkeypatch.setattr(isolation, "check", dying)
    fine, fatal = small(), Program(0, (), {}, (), {}, (), ())
    found = isolated([fine, fine, fatal, fine])
    assert [f.kind if f else "" for f in found] == ["", "", "crash", ""]


def failing(op: str) -> object:
    def check(programs: Sequence[Program]) -> list[Failure | None]:
        return [Failure("plain", op) if any(n.op == op for n in p.nodes) else None for p in programs]

    return check


@pytest.mark.parametrize("op", ["Tanh", "Mul", "Neg"])
def test_a_failure_is_made_small(op: str) -> None:
    program = minimise(small(), "plain", failing(op))
    assert [n.op for n in program.nodes] == [op]
    assert program.sizes == ({}, {})
    assert program.values[program.inputs[0]].shape == (2, 3)
    assert len(program.values) == 2


def test_random_programs_are_made_small() -> None:
    for number in range(30):
        program = generate(1, number)
        op = program.nodes[-1].op
        assert [n.op for n in minimise(program, "plain", failing(op)).nodes][-1] == op


def test_failures_are_kept(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr(
        fuzz, "isolated", lambda programs, target: [None, *[Failure("plain", "wrong")] * (len(programs) - 1)]
    )
    monkeypatch.setattr(fuzz, "minimise", lambda program, kind, check: program)
    monkeypatch.setattr("sys.argv", f"fuzz.py --seed 5 --first 7 --graphs 2 --json --found {tmp_path}".split())
    assert fuzz.main() == 1
    figures = json.loads(capsys.readouterr().out)
    assert (figures["graphs"], figures["clean"], figures["failed"]) == (2, 1, {"plain": 1})
    assert load(tmp_path / "5-8.json") == generate(5, 8)
