"""Shape arithmetic that grows: what an importer follows symbolically can explode where numbers alone would not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from llmc.errors import LlmcError, ShapeError
from llmc.importer import import_model
from tests.importer.helpers import FLOAT, model, node, saved


def chain(op: str, length: int, dim: int | str) -> onnx.ModelProto:
    """The size of x, doubled or squared so many times."""
    nodes = [node(op, f"v{i} v{i}", f"v{i + 1}") for i in range(length)]
    nodes = [node("Shape", "x", "v0"), *nodes, node("Cast", f"v{length}", "y", to=FLOAT)]
    return model(nodes, [("x", FLOAT, [dim])], ["y"])


@pytest.mark.parametrize(("op", "length", "dim"), [("Mul", 40, 4), ("Add", 300, "n")])
def test_values_past_64_bits_are_refused(tmp_path: Path, op: str, length: int, dim: int | str) -> None:
    with pytest.raises(ShapeError, match="too large for a shape"):
        import_model(saved(tmp_path, chain(op, length, dim)))


def test_powers_of_a_symbol_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, chain("Mul", 40, "n"))
    code = "import sys; from llmc.importer import import_model; print('ready', flush=True); import_model(sys.argv[1])"
    with subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stderr is not None
        child.stdout.readline()
        try:
            assert child.wait(timeout=10) == 1
            assert b"llmc.errors" in child.stderr.read()
        finally:
            child.kill()


def test_a_condition_without_a_value_is_refused(tmp_path: Path) -> None:
    branch = helper.make_graph([node("Relu", "x", "o")], "b", [], [onnx.ValueInfoProto(name="o")])
    nodes = [node("If", "c", "y", then_branch=branch, else_branch=branch)]
    proto = model(nodes, [("x", FLOAT, [4])], ["y"], {"c": np.zeros(0, bool)})
    with pytest.raises(LlmcError):
        import_model(saved(tmp_path, proto))


def test_a_dimension_that_overflows_is_a_name(tmp_path: Path) -> None:
    """It means nothing that could be computed, so it is one size, of its own."""
    deep = "(" * 150 + "n" + ")" * 150
    dims = ["n", "n*99999999999999999999", "2147483647*2147483647*n", "-" * 900 + "n", "n" + "+n" * 2000, deep]
    proto = model([node("Relu", "x", "y")], [("x", FLOAT, dims)], ["y"])
    assert len(import_model(saved(tmp_path, proto)).symbols) >= 5
