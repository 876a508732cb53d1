"""Nodes that change nothing are gone before any pattern is looked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llmc.fuse.no_ops import drop_no_ops
from llmc.importer import import_model
from tests.importer.helpers import BOOL, FLOAT, model, node, saved

CONSTANTS = {"one": np.float32(1), "two": np.float32(2), "shape": np.array([0, 4])}


def left(folder: Path, *nodes: tuple[str, str, str, dict[str, int]], outputs: tuple[str, ...] = ("y",)) -> list[str]:
    made = [node(op, inputs, out, **attrs) for op, inputs, out, attrs in nodes]
    proto = model(made, [("x", FLOAT, ["n", 4])], list(outputs), CONSTANTS)
    return [n.op for n in drop_no_ops(import_model(saved(folder, proto))).nodes]


def test_chains_go(tmp_path: Path) -> None:
    chain = [
        ("Cast", "x", "a", {"to": FLOAT}),
        ("Mul", "one a", "b", {}),
        ("Concat", "b", "c", {"axis": 0}),
        ("Reshape", "c shape", "d", {}),
        ("Identity", "d", "e", {}),
        ("Relu", "e", "y", {}),
    ]
    assert left(tmp_path, *chain) == ["Relu"]


def test_what_changes_something_stays(tmp_path: Path) -> None:
    assert left(tmp_path, ("Mul", "two x", "a", {}), ("Cast", "a", "y", {"to": 11})) == ["Mul", "Cast"]


def test_outputs_keep_their_names(tmp_path: Path) -> None:
    nodes = [("Relu", "x", "a", {}), ("Identity", "a", "y", {}), ("Identity", "a", "z", {}), ("Identity", "x", "w", {})]
    assert left(tmp_path, *nodes, outputs=("y", "z", "w")) == ["Relu", "Identity", "Identity"]


def test_dropout_that_a_run_may_turn_on_stays(tmp_path: Path) -> None:
    inputs = [("x", FLOAT, ["n"]), ("training", BOOL, [])]
    for given, left in (("x", 0), ("x _ training", 1)):
        path = saved(tmp_path, model([node("Dropout", given, "d"), node("Abs", "d", "y")], inputs, ["y"]))
        assert sum(n.op == "Dropout" for n in drop_no_ops(import_model(path)).nodes) == left
