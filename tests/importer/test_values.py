"""Shape arithmetic is evaluated at import, over symbols, and equals onnxruntime's for every size tried."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.graph import Graph
from llmc.importer import import_model
from llmc.tvm_shim import Analyzer, substitute, tirx
from tests.importer.helpers import BOOL, FLOAT, INT64, model, node, saved

I64_MAX = 2**63 - 1
SHAPE = node("Shape", "x", "s")  # [batch, seq, 8]
CONSTANTS = {
    "zero": 0,
    "one": 1,
    "i0": [0],
    "i1": [1],
    "i2": [2],
    "i3": [3],
    "m1": [-1],
    "big": [I64_MAX],
    "k4": 4,
    "s2": [2, 1],
    "idx": [[1, 0], [2, -1]],
    "row": [[3, 1, 2]],
    "minus": [-1, -1, -1],
}
GATHERS = [node("Gather", "s zero", "b", axis=0), node("Gather", "s one", "t", axis=0)]

# name: nodes that compute "y" from "s", the scalars b = batch and t = seq, and the constants
CASES: dict[str, list[onnx.NodeProto]] = {
    "shape": [node("Identity", "s", "y")],
    "shape range": [node("Shape", "x", "y", start=-2, end=3)],
    "size": [node("Size", "x", "y")],
    "scalar arithmetic": [node("Add", "b t", "a"), node("Mul", "a k4", "c"), node("Sub", "c b", "y")],
    "division": [node("Mul", "t k4", "a"), node("Div", "a k4", "y")],
    "division that stays": [node("Div", "t k4", "y")],
    "modulo": [node("Mod", "t k4", "y")],
    "division by a symbol": [node("Mul", "t k4", "a"), node("Mul", "b a", "c"), node("Div", "c b", "y")],
    "negation": [node("Neg", "t", "a"), node("Abs", "b", "c"), node("Add", "a c", "y")],
    "min and max": [node("Min", "b t k4", "a"), node("Max", "a one", "y")],
    "concat": [node("Unsqueeze", "t i0", "u"), node("Concat", "u i3 s m1", "y", axis=0)],
    "slice": [node("Slice", "s i1 big", "y")],
    "slice backwards": [node("Sub", "m1 big", "a"), node("Slice", "s m1 a i0 m1", "y")],
    "slice step": [node("Slice", "s i0 big i0 i2", "y")],
    "gather table": [node("Gather", "s idx", "y")],
    "squeeze": [node("Slice", "s i1 i2", "a"), node("Squeeze", "a i0", "y")],
    "reshape": [node("Concat", "s i3", "a", axis=0), node("Reshape", "a s2m", "y")],
    "transpose": [node("Unsqueeze", "s i0", "a"), node("Transpose", "a", "c"), node("Flatten", "c", "y", axis=0)],
    "expand": [node("Expand", "t i3", "y")],
    "tile": [node("Tile", "s i2", "y")],
    "constant of shape": [
        node("ConstantOfShape", "i3", "a"),
        node("Cast", "a", "c", to=INT64),
        node("Add", "c s", "y"),
    ],
    "where on known": [node("Equal", "s minus", "e"), node("Where", "e row minus", "y")],
    "where": [node("Equal", "s minus", "e"), node("Where", "e row s", "y")],
    "compare": [node("GreaterOrEqual", "s i0", "e"), node("Not", "e", "f"), node("Where", "f row s", "y")],
    "logic": [
        node("Equal", "b m1", "e"),
        node("Less", "t i0", "f"),
        node("Or", "e f", "g"),
        node("And", "g e", "h"),
        node("Where", "h row s", "y"),
    ],
    "cast": [node("Cast", "t", "a", to=6), node("Add", "a k4i", "c"), node("Cast", "c", "y", to=INT64)],
    "reduce": [node("ReduceProd", "s", "y", keepdims=0)],
    "reduce sum": [node("ReduceSum", "s i0", "y", keepdims=1)],
    "reduce max": [node("ReduceMax", "s", "y", keepdims=1)],
    "split": [node("Split", "s s2", "a c", axis=0), node("Mul", "a c", "y")],
    "range": [node("Range", "zero k4 one", "a"), node("Add", "a t", "y")],
}


def build(name: str) -> onnx.ModelProto:
    constants = {k: np.array(v, np.int64) for k, v in CONSTANTS.items()}
    constants |= {"s2m": np.array([2, -1]), "k4i": np.array(4, np.int32)}
    return model([SHAPE, *GATHERS, *CASES[name]], [("x", FLOAT, ["batch", "seq", 8])], ["y"], constants)


def number(graph: Graph, value: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
    """A shape value for given sizes of the symbols."""
    values = {d: sizes[d.name] for t in graph.types.values() for d in t.shape if isinstance(d, tirx.Var)}
    out = np.empty(value.shape, np.int64)
    for index, v in np.ndenumerate(value):
        out[index] = v if isinstance(v, int) else int(Analyzer().simplify(substitute(v, values)))
    return out


@pytest.mark.parametrize("name", CASES)
def test_equals_onnxruntime(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path, build(name))
    graph = import_model(path)
    assert {n.op for n in graph.nodes} <= {"ShapeValue"}, str(graph)
    value = graph.constants["y"] if "y" in graph.constants else graph.nodes[-1].attrs["value"]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch, seq in [(1, 1), (2, 5), (3, 8), (7, 2)]:
        (want,) = session.run(None, {"x": np.zeros((batch, seq, 8), np.float32)})
        got = number(graph, value, {"batch": batch, "seq": seq})
        assert got.shape == want.shape == graph.types["y"].shape
        np.testing.assert_array_equal(got, want)


def test_what_depends_on_data_stays(tmp_path: Path) -> None:
    nodes = [
        node("Gather", "s i", "g"),
        node("Equal", "g k", "e"),
        node("Where", "e g k", "y"),
        node("Shape", "x", "s"),
    ]
    constants = {"i": np.array([0]), "k": np.array([5])}
    graph = import_model(saved(tmp_path, model(nodes, [("x", FLOAT, ["n"])], ["y"], constants)))
    assert [n.op for n in graph.nodes] == ["ShapeValue", "Equal", "Where"], "n == 5 cannot be proven"


def test_bounds_decide_comparisons(tmp_path: Path) -> None:
    nodes = [node("Shape", "x", "s"), node("Less", "s k", "y")]
    path = saved(tmp_path, model(nodes, [("x", FLOAT, ["n"])], [("y", BOOL, [1])], {"k": np.array([5])}))
    assert [n.op for n in import_model(path).nodes] == ["ShapeValue", "Less"]
    assert import_model(path, {"n": (1, 4)}).constants["y"].tolist() == [True]
    assert import_model(path, {"n": (5, 9)}).constants["y"].tolist() == [False]


_OPS = st.sampled_from(["Add", "Sub", "Mul", "Min", "Max"])


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(st.tuples(_OPS, st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=6))
def test_random_arithmetic(tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int]]) -> None:
    names = ["b", "t", "one", "k4"]
    nodes = [SHAPE, *GATHERS]
    for i, (op, left, right) in enumerate(steps):
        nodes.append(node(op, f"{names[left % len(names)]} {names[right % len(names)]}", f"v{i}"))
        names.append(f"v{i}")
    nodes.append(node("Identity", names[-1], "y"))
    constants = {k: np.array(CONSTANTS[k], np.int64) for k in ("zero", "one", "k4")}
    path = saved(tmp_path_factory.mktemp("random"), model(nodes, [("x", FLOAT, ["batch", "seq", 8])], ["y"], constants))
    graph = import_model(path)
    value = graph.constants["y"] if "y" in graph.constants else graph.nodes[-1].attrs["value"]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch, seq in [(1, 2), (4, 3)]:
        (want,) = session.run(None, {"x": np.zeros((batch, seq, 8), np.float32)})
        np.testing.assert_array_equal(number(graph, value, {"batch": batch, "seq": seq}), want)
