"""Random graphs, and graphs that once failed: llmc with its rewrites, without them, and onnxruntime agree."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.differential import Quick, check
from tests.fuzz.generator import generate
from tests.fuzz.program import Program, load

FOUND = sorted((Path(__file__).parent / "found").glob("*.json"))
SEED, GRAPHS = 20, 16


def failures(programs: dict[str, Program], target: Quick | None = None) -> list[str]:
    found = check(list(programs.values()), target)
    return [f"{name}: {failure}" for name, failure in zip(programs, found, strict=True) if failure]


@pytest.mark.timeout(900)
def test_random_graphs_agree() -> None:
    assert not failures({str(i): generate(SEED, i) for i in range(GRAPHS)})


@pytest.mark.timeout(900)
def test_what_once_failed_agrees() -> None:
    assert not failures({path.stem: load(path) for path in FOUND}, Quick.native())


def test_most_bounds_are_tight() -> None:
    """A bound that nothing can break finds nothing: of the float results, few may err by a hundredth of their size."""
    values = [
        value
        for number in range(200)
        for program in [generate(SEED, number)]
        for value in map(program.values.__getitem__, program.outputs)
        if value.dtype == "float32"
    ]
    loose = [v for v in values if max(v.error) > 0.01 * max(abs(v.low), abs(v.high))]
    tight = [v for v in values if max(v.error) < 1e-4 * max(abs(v.low), abs(v.high))]
    assert len(loose) < 0.1 * len(values)
    assert len(tight) > 0.7 * len(values)
