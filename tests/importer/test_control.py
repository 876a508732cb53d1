"""Control flow that the importer opens computes what onnxruntime computes; the rest is refused with its reason.

The loops that run in the artifact have a file of their own, `test_loops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import NodeProto, helper, numpy_helper

from llmc.errors import UnsupportedError
from llmc.importer import import_model
from tests.importer.helpers import BOOL, FLOAT, INT64, model, node, saved
from tests.importer.test_run import check

X = ("x", FLOAT, ["b", 4])


def graph(
    nodes: Sequence[NodeProto], outputs: str, inputs: Sequence[tuple[str, int]] = (), **constants: np.ndarray
) -> onnx.GraphProto:
    """A subgraph; numbers and flags are scalars, floats have no declared shape."""
    return helper.make_graph(
        list(nodes),
        "body",
        [helper.make_tensor_value_info(name, dtype, None if dtype == FLOAT else []) for name, dtype in inputs],
        [helper.make_tensor_value_info(o, BOOL if o.startswith("more") else FLOAT, None) for o in outputs.split()],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )


def x(rng: np.random.Generator, batch: int = 3) -> np.ndarray:
    return rng.standard_normal((batch, 4)).astype(np.float32)


# -- If ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [[], [1]])
def test_branches_are_chosen_at_run_time(tmp_path: Path, rng: np.random.Generator, shape: list[int]) -> None:
    one = graph([node("Add", "h w", "t"), node("Exp", "t", "out")], "out", w=np.ones(4, np.float32))
    two = graph([node("Mul", "h w", "out")], "out", w=np.full(4, 3, np.float32))
    nodes = [node("Relu", "x", "h"), node("If", "c", "y", then_branch=one, else_branch=two)]
    path = saved(tmp_path, model(nodes, [X, ("c", BOOL, shape)], ["y"]))
    check(path, [{"x": x(rng), "c": np.full(shape, c)} for c in (True, False)])


def test_branches_nest_and_give_several_outputs(tmp_path: Path, rng: np.random.Generator) -> None:
    inner = node(
        "If",
        "d",
        "o",
        then_branch=graph([node("Neg", "x", "p")], "p"),
        else_branch=graph([node("Identity", "x", "p")], "p"),
    )
    one = graph([inner, node("Abs", "x", "q")], "o q")
    two = graph([node("Sqrt", "x2", "r"), node("Identity", "x", "q")], "r q")
    nodes = [node("Mul", "x x", "x2"), node("If", "c", "y z", then_branch=one, else_branch=two)]
    path = saved(tmp_path, model(nodes, [X, ("c", BOOL, []), ("d", BOOL, [])], ["y", "z"]))
    flags = [(True, True), (True, False), (False, True)]
    check(path, [{"x": x(rng), "c": np.array(c), "d": np.array(d)} for c, d in flags])


def test_branches_of_other_ranks_are_refused(tmp_path: Path) -> None:
    one, two = graph([node("Abs", "x", "o")], "o"), graph([node("ReduceSum", "x", "o", keepdims=0)], "o")
    proto = model([node("If", "c", "y", then_branch=one, else_branch=two)], [X, ("c", BOOL, [])], ["y"])
    reason = r"/y \(ai.onnx.If, opset 17\): its condition is known at run time only.*\[b, 4\].*\[\]"
    with pytest.raises(UnsupportedError, match=reason):
        import_model(saved(tmp_path, proto))


def test_what_a_branch_cannot_do_is_reported_once(tmp_path: Path) -> None:
    strange = graph([helper.make_node("Strange", ["x"], ["o"], name="odd")], "o")
    proto = model([node("If", "c", "y", then_branch=strange, else_branch=graph([], "x"))], [X, ("c", BOOL, [])], ["y"])
    with pytest.raises(UnsupportedError, match=r"^test: 1 node cannot be compiled:\s+y/then/odd \(ai.onnx.Strange"):
        import_model(saved(tmp_path, proto))


# -- Loop -------------------------------------------------------------------------------------------------------
COUNTER = [("i", INT64), ("go", BOOL), ("h", FLOAT)]


@pytest.mark.parametrize("opset", [11, 17])
def test_loop_is_unrolled(tmp_path: Path, rng: np.random.Generator, opset: int) -> None:
    steps = [
        node("Cast", "i", "iteration", to=FLOAT),
        node("Add", "h iteration", "t"),
        node("Mul", "t w", "h2"),
        node("ReduceSum", "h2", "s", keepdims=0),
        node("Identity", "go", "more"),
    ]
    body = graph(steps, "more h2 s h2", COUNTER, w=np.full(4, 0.5, np.float32))
    nodes = [node("Loop", "trips yes x", "y sums states", body=body)]
    constants = {"trips": np.array(3), "yes": np.array(True)}
    path = saved(tmp_path, model(nodes, [X], ["y", "sums", "states"], constants, opset=opset))
    check(path, [{"x": x(rng, batch)} for batch in (1, 3)])


def test_loop_ends_where_its_condition_does(tmp_path: Path, rng: np.random.Generator) -> None:
    steps = [node("Less", "i four", "more"), node("Tanh", "h", "h2")]
    body = graph(steps, "more h2", COUNTER, four=np.array(4))
    nodes = [node("Loop", "_ yes x", "y", body=body)]
    path = saved(tmp_path, model(nodes, [X], ["y"], {"yes": np.array(True)}))
    check(path, [{"x": x(rng)}])


def test_loop_that_never_runs(tmp_path: Path, rng: np.random.Generator) -> None:
    body = graph([node("Identity", "go", "more"), node("Tanh", "h", "h2")], "more h2", COUNTER)
    path = saved(tmp_path, model([node("Loop", "trips _ x", "y", body=body)], [X], ["y"], {"trips": np.array(0)}))
    check(path, [{"x": x(rng)}])


# -- Scan -------------------------------------------------------------------------------------------------------
def test_scan_is_unrolled(tmp_path: Path, rng: np.random.Generator) -> None:
    """Two inputs along different axes, one of them backwards, and outputs along another axis and backwards."""
    steps = [node("Add", "h a", "t"), node("Mul", "t e", "h2"), node("Neg", "h2", "out"), node("Identity", "h2", "o2")]
    body = graph(steps, "h2 out o2", [("h", FLOAT), ("a", FLOAT), ("e", FLOAT)])
    attrs = {"scan_input_axes": [0, 1], "scan_input_directions": [0, 1]}
    attrs |= {"scan_output_axes": [1, 0], "scan_output_directions": [0, 1]}
    nodes = [node("Scan", "x p q", "y s r", body=body, num_scan_inputs=2, **attrs)]
    inputs = [X, ("p", FLOAT, [5, "b", 4]), ("q", FLOAT, ["b", 5, 4])]
    path = saved(tmp_path, model(nodes, inputs, ["y", "s", "r"]))
    p, q = (rng.standard_normal(s).astype(np.float32) for s in ((5, 3, 4), (3, 5, 4)))
    check(path, [{"x": x(rng), "p": p, "q": q}])


@pytest.mark.parametrize(
    ("attrs", "reason"),
    [
        ({"num_scan_inputs": 3}, "num_scan_inputs = 3 of 2 inputs"),
        ({"num_scan_inputs": 1, "scan_input_axes": [5]}, "scan_input_axes has 5 for a tensor of rank 3"),
        ({"num_scan_inputs": 1, "scan_input_axes": [0, 1]}, "scan_input_axes has 2 numbers for 1 values"),
    ],
)
def test_scan_that_does_not_fit_is_refused(tmp_path: Path, attrs: dict[str, Any], reason: str) -> None:
    body = graph([node("Add", "h a", "h2")], "h2", [("h", FLOAT), ("a", FLOAT)])
    proto = model([node("Scan", "x p", "y", body=body, **attrs)], [X, ("p", FLOAT, [5, "b", 4])], ["y"])
    with pytest.raises(UnsupportedError, match=reason):
        import_model(saved(tmp_path, proto))


def test_condition_without_elements_is_refused(tmp_path: Path) -> None:
    branch = graph([node("Abs", "x", "o")], "o")
    nodes = [node("If", "c", "y", then_branch=branch, else_branch=branch)]
    proto = model(nodes, [X], ["y"], {"c": np.zeros(0, bool)})
    with pytest.raises(UnsupportedError, match="'c' has 0 elements, where one is needed"):
        import_model(saved(tmp_path, proto))
