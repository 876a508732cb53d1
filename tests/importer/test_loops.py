"""Loops and branches that data decides, compiled, saved, loaded and run, give what onnxruntime gives."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import llmc
from llmc.errors import LlmcError, ModelError, UnsupportedError
from llmc.importer import import_model
from tests.importer.helpers import BOOL, FLOAT, INT64, model, node, saved
from tests.importer.test_control import COUNTER, X, graph, x

GO_ON = node("Identity", "go", "more")


def run(path: Path, feeds: Sequence[Mapping[str, np.ndarray]], *, tolerance: float = 1e-5) -> None:
    """The artifact of a model gives onnxruntime's outputs, types and shapes included, for all inputs."""
    artifact = path.with_suffix(".llmc")
    llmc.compile(str(path)).save(str(artifact))
    loaded = llmc.load(str(artifact))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for feed in feeds:
        result = loaded(feed)
        got = list(result.values()) if isinstance(result, dict) else [result]
        for g, w in zip(got, session.run(None, dict(feed)), strict=True):
            assert (g.dtype, g.shape) == (w.dtype, w.shape)
            np.testing.assert_allclose(g, w, rtol=tolerance, atol=1e-6)


# -- Loop -------------------------------------------------------------------------------------------------------
def test_number_of_iterations_is_an_input(tmp_path: Path, rng: np.random.Generator) -> None:
    steps = [
        node("Cast", "i", "iteration", to=FLOAT),
        node("Add", "h iteration", "t"),
        node("Mul", "t w", "h2"),
        node("ReduceSum", "h2", "s", keepdims=0),
        node("Identity", "h2", "all"),
        GO_ON,
    ]
    body = graph(steps, "more h2 s all", COUNTER, w=np.full(4, 0.5, np.float32))
    proto = model([node("Loop", "n _ x", "y sums states", body=body)], [X, ("n", INT64, [])], ["y", "sums", "states"])
    path = saved(tmp_path, proto)
    run(path, [{"x": x(rng, b), "n": np.array(n)} for b, n in ((1, 1), (3, 2), (2, 3), (4, 100))])
    nothing = llmc.load(str(path.with_suffix(".llmc")))({"x": x(rng), "n": np.array(0)})
    assert {name: a.shape for name, a in nothing.items()} == {"y": (3, 4), "sums": (0,), "states": (0, 3, 4)}


def test_condition_is_computed_by_the_body(tmp_path: Path, rng: np.random.Generator) -> None:
    """Doubles a tensor until it is large: as tf2onnx writes tf.while_loop, with a first condition that is computed."""
    steps = [
        node("Add", "h h", "h2"),
        node("ReduceMax", "h2", "m", keepdims=0),
        node("Less", "m limit", "more"),
    ]
    body = graph(steps, "more h2 m", COUNTER, limit=np.array(100, np.float32))
    nodes = [
        node("ReduceMax", "x", "first", keepdims=0),
        node("Less", "first limit", "begin"),
        node("Loop", "most begin x", "y tops", body=body),
    ]
    constants = {"limit": np.array(100, np.float32), "most": np.array(2**63 - 1)}
    path = saved(tmp_path, model(nodes, [X], ["y", ("tops", FLOAT, ["n"])], constants))
    run(path, [{"x": scale * (np.abs(x(rng, b)) + 0.1)} for b, scale in ((3, 1.0), (1, 30.0), (2, 1000.0), (2, 1e-4))])


def test_state_that_grows(tmp_path: Path) -> None:
    """As a beam search writes it: each iteration appends a token, and the loop ends where data says so."""
    steps = [
        node("Shape", "ids", "shape"),
        node("Gather", "shape one", "length"),
        node("Cast", "ids", "values", to=FLOAT),
        node("ReduceSum", "values axes", "total", keepdims=1),
        node("Cast", "total", "next0", to=INT64),
        node("Mod", "next0 seven", "next"),
        node("Concat", "ids next", "ids2", axis=1),
        node("ReduceMax", "next", "highest", keepdims=0),
        node("Less", "highest six", "more"),
        node("Cast", "length", "lengths", to=FLOAT),
    ]
    numbers = {"one": np.array(1), "axes": np.array([1]), "seven": np.array(7), "six": np.array(6)}
    body = graph(steps, "more ids2 lengths", [("i", INT64), ("go", BOOL), ("ids", FLOAT)], **numbers)
    for value in (body.input[2], body.output[1]):
        value.type.tensor_type.elem_type = INT64
    nodes = [node("Loop", "most yes ids0", "tokens lengths", body=body), node("Mul", "tokens tokens", "y")]
    constants = {"most": np.array(12), "yes": np.array(True)}
    proto = model(nodes, [("ids0", INT64, ["b", "t"])], ["y", "lengths"], constants)
    rng = np.random.default_rng(3)
    run(saved(tmp_path, proto), [{"ids0": rng.integers(1, 5, (b, t))} for b, t in ((1, 3), (2, 5), (3, 1))])


def test_state_that_begins_without_elements(tmp_path: Path, rng: np.random.Generator) -> None:
    """torch's zeros(0, 4), to which rows are appended; a branch that gives one."""
    append = graph([node("Concat", "h x", "t", axis=0)], "t")
    drop = graph([], "none", none=np.zeros((0, 4), np.float32))
    steps = [
        node("Greater", "i one", "late"),
        node("If", "late", "h2", then_branch=append, else_branch=drop),
        GO_ON,
    ]
    body = graph(steps, "more h2", COUNTER, one=np.array(1))
    nodes = [node("Loop", "n _ nothing", "y", body=body), node("Abs", "y", "z")]
    constants = {"nothing": np.zeros((0, 4), np.float32)}
    path = saved(tmp_path, model(nodes, [X, ("n", INT64, [])], ["z"], constants))
    run(path, [{"x": x(rng, b), "n": np.array(n)} for b, n in ((1, 0), (2, 2), (3, 5))])


def test_sizes_in_a_body_are_checked(tmp_path: Path) -> None:
    many = graph([node("Expand", "x shape", "t"), node("ReduceSum", "t", "o", keepdims=0)], "o")
    few = graph([node("ReduceSum", "x", "o", keepdims=0)], "o")
    nodes = [node("If", "c", "y", then_branch=many, else_branch=few)]
    constants = {"shape": np.array([2**40, 1, 4])}
    with pytest.raises(ModelError, match=r"declares more than 2.40 bytes"):
        import_model(saved(tmp_path, model(nodes, [X, ("c", BOOL, [])], ["y"], constants)))


def test_loops_and_branches_nest(tmp_path: Path, rng: np.random.Generator) -> None:
    wide = (rng.standard_normal((4, 4)) / 4).astype(np.float32)
    steps = [node("Identity", "on", "more2"), node("MatMul", "a wide", "a2"), node("Add", "a2 x", "a3")]
    inner = graph(steps, "more2 a3", [("j", INT64), ("on", BOOL), ("a", FLOAT)], wide=wide)
    yes = graph([node("Loop", "n _ h", "t", body=inner)], "t")
    no = graph([node("Neg", "h", "u")], "u")
    steps = [
        node("Greater", "i two", "large"),
        node("If", "large", "h2", then_branch=yes, else_branch=no),
        node("ReduceMean", "h2", "mean", keepdims=0),
        GO_ON,
    ]
    body = graph(steps, "more h2 mean", COUNTER, two=np.array(2))
    nodes = [node("Relu", "x0", "x"), node("Loop", "n yes x", "y means", body=body)]
    inputs = [("x0", FLOAT, ["b", 4]), ("n", INT64, [1])]
    path = saved(tmp_path, model(nodes, inputs, ["y", "means"], {"yes": np.array(True)}))
    run(path, [{"x0": x(rng, b), "n": np.array([n])} for b, n in ((3, 1), (2, 7))])


def test_weights_of_a_body_are_parameters(tmp_path: Path, rng: np.random.Generator) -> None:
    """A linear layer in a body and around it, with one weight, gets the template's kernel and one copy."""
    w, bias = ((rng.standard_normal(s) / 8).astype(np.float32) for s in ((64, 64), (64,)))
    steps = [node("MatMul", "h w", "t"), node("Add", "t bias", "t2"), node("Relu", "t2", "h2"), GO_ON]
    body = graph(steps, "more h2", COUNTER)
    nodes = [
        node("MatMul", "x w", "p"),
        node("Add", "p bias", "p2"),
        node("Relu", "p2", "h0"),
        node("Loop", "n _ h0", "y", body=body),
    ]
    inputs = [("x", FLOAT, ["b", 64]), ("n", INT64, [])]
    path = saved(tmp_path, model(nodes, inputs, ["y"], {"w": w, "bias": bias}))
    run(path, [{"x": rng.standard_normal((b, 64)).astype(np.float32), "n": np.array(n)} for b, n in ((1, 2), (3, 9))])
    manifest = llmc.compile(str(path)).manifest
    assert [k.template for k in manifest.kernels] == ["dense"] and manifest.kernels[0].calls == 2
    assert sum(np.prod(p.shape) for p in manifest.params.values()) < 2 * 64 * 64


def test_many_iterations_need_little_stack_and_memory(tmp_path: Path, rng: np.random.Generator) -> None:
    body = graph([node("Add", "h one", "h2"), GO_ON], "more h2", COUNTER, one=np.ones(4, np.float32))
    path = saved(tmp_path, model([node("Loop", "n _ x", "y", body=body)], [X, ("n", INT64, [])], ["y"]))
    llmc.compile(str(path)).save(str(path.with_suffix(".llmc")))
    loaded = llmc.load(str(path.with_suffix(".llmc")))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    y = loaded({"x": np.zeros((2, 4), np.float32), "n": np.array(30_000)})
    np.testing.assert_array_equal(y, np.full((2, 4), 30_000, np.float32))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20 << 10  # KiB


def test_known_but_long_loop_is_not_written_out(tmp_path: Path) -> None:
    body = graph([node("Add", "h one", "h2"), GO_ON], "more h2 h2", COUNTER, one=np.ones(4, np.float32))
    nodes = [node("Loop", "n _ x", "y all", body=body)]
    graph_ = import_model(saved(tmp_path, model(nodes, [X], ["y", "all"], {"n": np.array(5000)})))
    assert [n.op for n in graph_.nodes if n.domain == "llmc"] == ["Loop"]
    assert graph_.types["all"].shape[0] == 5000


def test_number_of_iterations_is_a_dimension(tmp_path: Path, rng: np.random.Generator) -> None:
    """torch.onnx's `for i in range(x.shape[0])`: what is collected has that dimension, and Add can tell."""
    steps = [node("Gather", "x i", "row"), node("Mul", "row h", "h2"), node("Identity", "h2", "all"), GO_ON]
    body = graph(steps, "more h2 all", COUNTER)
    nodes = [
        node("Shape", "x", "shape"),
        node("Gather", "shape zero", "n"),
        node("Loop", "n yes start", "y all", body=body),
        node("Add", "all x", "z"),
    ]
    constants = {"zero": np.array(0), "yes": np.array(True), "start": np.ones(4, np.float32)}
    path = saved(tmp_path, model(nodes, [X], ["z", "y"], constants))
    assert [str(d) for d in import_model(path).types["z"].shape] == ["b", "4"]
    run(path, [{"x": x(rng, b)} for b in (1, 2, 9)])


def test_elements_whose_size_the_first_iteration_finds(tmp_path: Path, rng: np.random.Generator) -> None:
    """x[i:i+1], of which the bounds are data; what has another size in a later iteration is an error."""
    steps = [
        node("Unsqueeze", "i axes", "start"),
        node("Add", "start step", "end"),
        node("Slice", "x start end", "row"),
        node("Identity", "row", "all"),
        node("Add", "h row", "h2"),
        GO_ON,
    ]
    body = graph(steps, "more h2 all", COUNTER, axes=np.array([0]))
    nodes = [node("Loop", "n _ zero", "y rows", body=body), node("Relu", "rows", "z")]
    inputs = [X, ("n", INT64, []), ("step", INT64, [1])]
    constants = {"zero": np.zeros((1, 4), np.float32)}
    path = saved(tmp_path, model(nodes, inputs, ["y", "z"], constants))
    one = np.array([1])
    run(path, [{"x": x(rng, b), "n": np.array(n), "step": one} for b, n in ((1, 1), (3, 3), (9, 7))])
    loaded = llmc.load(str(path.with_suffix(".llmc")))
    with pytest.raises(LlmcError):
        loaded({"x": x(rng, 3), "n": np.array(3), "step": np.array([2])})


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ([node("Cast", "h", "h2", to=INT64)], r"a state is float32\[b, 4\] before an iteration, and int64\[b, 4\]"),
        (
            [node("Unsqueeze", "h zero", "h2")],
            r"a state is float32\[b, 4\] before an iteration, and float32\[1, b, 4\]",
        ),
        (
            [node("Add", "h x", "t"), node("Concat", "t x", "h2", axis=0)],
            r"float32\[b \* 2, 4\].* its size has to stay b",
        ),
    ],
)
def test_states_that_change_are_refused(tmp_path: Path, steps: list[onnx.NodeProto], reason: str) -> None:
    body = graph([*steps, GO_ON], "more h2", COUNTER, zero=np.array([0]))
    proto = model([node("Loop", "n _ x", "y", body=body)], [X, ("n", INT64, [])], ["y"])
    with pytest.raises(UnsupportedError, match=reason):
        import_model(saved(tmp_path, proto))


def test_what_a_body_cannot_do_is_reported_once(tmp_path: Path) -> None:
    """Though the body is visited twice, because a state grows in it."""
    strange = onnx.helper.make_node("Strange", ["h"], ["s"], name="odd")
    steps = [node("Concat", "h x", "h2", axis=0), strange, GO_ON]
    body = graph(steps, "more h2 s", COUNTER)
    proto = model([node("Loop", "n _ x", "y s", body=body)], [X, ("n", INT64, [])], ["y", "s"])
    with pytest.raises(UnsupportedError, match=r"^test: 1 node cannot be compiled:\s+.*odd \(ai.onnx.Strange"):
        import_model(saved(tmp_path, proto))


# -- Scan -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "attrs",
    [
        {},
        {"scan_input_directions": [1], "scan_output_directions": [1, 0], "scan_output_axes": [1, -1]},
    ],
)
def test_scan_over_a_symbolic_axis(tmp_path: Path, rng: np.random.Generator, attrs: Mapping[str, Any]) -> None:
    w = rng.standard_normal((4, 4)).astype(np.float32)
    steps = [
        node("MatMul", "e w", "ew"),
        node("Add", "h ew", "t"),
        node("Tanh", "t", "h2"),
        node("Neg", "h2", "out"),
        node("Identity", "h2", "all"),
    ]
    body = graph(steps, "h2 out all", [("h", FLOAT), ("e", FLOAT)], w=w)
    nodes = [node("Scan", "x p", "y s r", body=body, num_scan_inputs=1, **attrs)]
    path = saved(tmp_path, model(nodes, [X, ("p", FLOAT, ["s", "b", 4])], ["y", "s", "r"]))
    feeds = [(b, rng.standard_normal((s, b, 4)).astype(np.float32)) for b, s in ((3, 1), (3, 5), (2, 20))]
    run(path, [{"x": x(rng, b), "p": p} for b, p in feeds], tolerance=1e-4)


def test_axes_of_one_scan_are_equal(tmp_path: Path, rng: np.random.Generator) -> None:
    body = graph([node("Add", "h a", "t"), node("Mul", "t e", "h2")], "h2", [("h", FLOAT), ("a", FLOAT), ("e", FLOAT)])
    nodes = [node("Scan", "x p q", "y", body=body, num_scan_inputs=2, scan_input_axes=[0, 1])]
    inputs = [X, ("p", FLOAT, ["s", "b", 4]), ("q", FLOAT, ["b", "t", 4])]
    path = saved(tmp_path, model(nodes, inputs, ["y"]))
    assert list(import_model(path).symbols) in (["b", "s"], ["b", "t"])


# -- If ---------------------------------------------------------------------------------------------------------
def test_branches_of_other_shapes(tmp_path: Path, rng: np.random.Generator) -> None:
    w = rng.standard_normal((4, 300)).astype(np.float32)
    one = graph([node("MatMul", "x w", "t"), node("Exp", "t", "o")], "o", w=w)
    two = graph([node("Transpose", "x", "o")], "o")
    nodes = [node("If", "c", "y", then_branch=one, else_branch=two), node("Relu", "y", "z")]
    path = saved(tmp_path, model(nodes, [X, ("c", BOOL, [])], ["y", "z"]))
    run(path, [{"x": x(rng, b), "c": np.array(c)} for b in (1, 3) for c in (True, False)])


def test_only_the_branch_taken_divides(tmp_path: Path) -> None:
    """Integers by zero would end the process."""
    one, two = graph([node("Div", "n k", "o")], "o"), graph([node("Identity", "n", "o")], "o")
    for branch in (one, two):
        branch.output[0].type.tensor_type.elem_type = INT64
    inputs = [("n", INT64, []), ("k", INT64, []), ("c", BOOL, [])]
    path = saved(tmp_path, model([node("If", "c", "y", then_branch=one, else_branch=two)], inputs, ["y"]))
    run(path, [{"n": np.array(7), "k": np.array(k), "c": np.array(bool(k))} for k in (2, 0)])


def test_branches_of_known_shapes_keep_them(tmp_path: Path) -> None:
    one, two = graph([node("Abs", "x", "o")], "o"), graph([node("Neg", "x", "o")], "o")
    nodes = [node("If", "c", "y", then_branch=one, else_branch=two), node("Add", "y x", "z")]
    assert str(import_model(saved(tmp_path, model(nodes, [X, ("c", BOOL, [])], ["z"]))).types["y"]) == "float32[b, 4]"


def test_no_compiler_is_needed(tmp_path: Path) -> None:
    body = graph([node("Add", "h one", "h2"), GO_ON], "more h2", COUNTER, one=np.ones(4, np.float32))
    path = saved(tmp_path, model([node("Loop", "n _ x", "y", body=body)], [X, ("n", INT64, [])], ["y"]))
    llmc.compile(str(path)).save(str(path.with_suffix(".llmc")))
    code = """
import sys
import numpy as np
import llmc
y = llmc.load(sys.argv[1])(x=np.zeros((2, 4), np.float32), n=np.array(77))
assert (y == 77).all() and y.shape == (2, 4)
assert 'tvm' not in sys.modules and not any('tvm_compiler' in line for line in open('/proc/self/maps'))
"""
    done = subprocess.run([sys.executable, "-c", code, path.with_suffix(".llmc")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
