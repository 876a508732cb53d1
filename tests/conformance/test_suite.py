"""The ONNX backend node suite: a sample of it, and the whole of it; and what the runner makes of wrong results."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from llmc.options import resolve_target

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "conformance.py"
SHARDS = 6


@pytest.fixture(scope="module")
def conformance() -> ModuleType:
    spec = importlib.util.spec_from_file_location("conformance", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cases(conformance: ModuleType) -> list[Any]:
    return list(conformance.collect())


def failures(conformance: ModuleType, cases: list[Any]) -> list[str]:
    outcomes = conformance.Suite(resolve_target("native")).run(cases)
    assert len(outcomes) == len(cases)
    return [f"{o.case}: {o.reason}" for o in outcomes if o.state == "failed"]


def test_a_sample_passes(conformance: ModuleType, cases: list[Any]) -> None:
    sample = cases[3::31]
    assert not failures(conformance, sample)
    assert sum(not conformance.excluded(c) for c in sample) > 40


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("shard", range(SHARDS))
def test_the_suite_passes(conformance: ModuleType, cases: list[Any], shard: int) -> None:
    assert not failures(conformance, cases[shard::SHARDS])


def test_wrong_results_fail(conformance: ModuleType, cases: list[Any]) -> None:
    (case,) = [c for c in cases if c.name == "test_add"]
    (right,) = case.outputs
    wrong = {
        "value": right + np.float32(0.01),
        "dtype": right.astype(np.float64),
        "shape": right[None],
    }
    made = [replace(case, name=name, outputs=[value]) for name, value in wrong.items()]
    outcomes = conformance.Suite(resolve_target("native")).run([case, *made])
    assert {o.case: o.state for o in outcomes} == {"test_add": "passed", **dict.fromkeys(wrong, "failed")}


def test_one_case_that_cannot_be_built_fails_alone(
    conformance: ModuleType, cases: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = [c for c in cases if c.name in ("test_add", "test_sub", "test_abs")]
    real = conformance.build_functions

    def build(graphs: list[Any], target: Any) -> Any:
        if any(node.op == "Sub" for graph in graphs for node in graph.nodes):
            raise RuntimeError("no code for it")
        return real(graphs, target)

    monkeypatch.setattr(conformance, "build_functions", build)
    outcomes = conformance.Suite(resolve_target("native")).run(chosen)
    assert {o.case: o.state for o in outcomes} == {"test_add": "passed", "test_sub": "failed", "test_abs": "passed"}


def test_an_unsupported_operator_fails(
    conformance: ModuleType, cases: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is neither supported nor left out with a reason does not go unseen."""
    (case,) = [c for c in cases if c.op == "ImageDecoder"][:1]
    monkeypatch.delitem(conformance.EXCLUDED, "ImageDecoder")
    (outcome,) = conformance.Suite(resolve_target("native")).run([case])
    assert outcome.state == "failed"
    assert "ImageDecoder" in outcome.reason


def test_inputs_are_made_constant_only_where_that_is_needed(conformance: ModuleType, cases: list[Any]) -> None:
    needed = {name: inputs for name, (inputs, _) in conformance.CONSTANT.items()}
    chosen = [c for c in cases if c.name in (*needed, "test_reshape_negative_dim")]
    outcomes = conformance.Suite(resolve_target("native")).run(chosen)
    assert {o.case: o.state for o in outcomes} == dict.fromkeys((c.name for c in chosen), "passed")
    assert {o.case: o.frozen for o in outcomes} == {**needed, "test_reshape_negative_dim": ()}


def test_every_exclusion_is_used(conformance: ModuleType, cases: list[Any]) -> None:
    """A reason for something that no case and no operator is called is out of date."""
    from fnmatch import fnmatchcase

    known = set(conformance._history())
    for key in conformance.EXCLUDED:
        assert key in known or any(fnmatchcase(c.name, key) for c in cases), key


def test_the_page_is_what_the_code_says(conformance: ModuleType) -> None:
    assert conformance.PAGE.read_text(encoding="utf-8") == conformance.page(), "run conformance.py --write-docs"
