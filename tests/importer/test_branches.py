"""What a branch demands of sizes holds where it is taken, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import llmc
from llmc.errors import InputError
from llmc.importer import import_model
from tests.importer.helpers import BOOL, FLOAT, INT64, model, node, saved
from tests.importer.test_control import COUNTER, X, graph, x
from tests.importer.test_loops import GO_ON, run

C, D = ("c", BOOL, []), ("d", BOOL, [])
YES, NO = np.array(True), np.array(False)


def pooled(size: int) -> onnx.GraphProto:
    """Takes v [b, 1, n] where n // size is 1, as a test for that is exported with the Squeeze that it guards."""
    fits = graph([node("Squeeze", "p two", "s")], "s", two=np.array([2]))
    steps = [
        node("MaxPool", "v", "p", kernel_shape=[size], strides=[size]),
        node("Shape", "p", "shape"),
        node("Gather", "shape index", "length"),
        node("Equal", "length one", "single"),
        node("If", "single", "o", then_branch=fits, else_branch=graph([node("Identity", "p", "i")], "i")),
    ]
    return graph(steps, "o", index=np.array(2), one=np.array(1))


def test_each_branch_has_its_range(tmp_path: Path, rng: np.random.Generator) -> None:
    """As a voice detector for two sampling rates has them: the condition inside is known, the one outside is not."""
    nodes = [node("If", "c", "y", then_branch=pooled(4), else_branch=pooled(8))]
    path = saved(tmp_path, model(nodes, [("v", FLOAT, ["b", 1, "n"]), C], ["y"]))
    imported = import_model(path)
    assert (str(imported.types["y"]), imported.symbols["n"]) == ("float32[b, 1]", (4, 15))

    def feed(n: int, flag: np.ndarray) -> dict[str, np.ndarray]:
        return {"v": rng.standard_normal((2, 1, n)).astype(np.float32), "c": flag}

    run(path, [feed(n, flag) for n, flag in ((4, YES), (7, YES), (8, NO), (15, NO))])
    loaded = llmc.load(str(path.with_suffix(".llmc")))
    for n, flag, reason in (
        (9, YES, r"size n_in_y_then is 9, .* at most 7"),
        (5, NO, r"n_in_y_else is 5, .* at least 8"),
    ):
        with pytest.raises(InputError, match=reason):
            loaded(feed(n, flag))


def test_the_model_narrows_what_branches_take(tmp_path: Path) -> None:
    tail = [node("MaxPool", "v", "p", kernel_shape=[6], strides=[6]), node("Squeeze", "p two", "z")]
    nodes = [node("If", "c", "y", then_branch=pooled(4), else_branch=pooled(8)), *tail]
    proto = model(nodes, [("v", FLOAT, ["b", 1, "n"]), C], ["y", "z"], {"two": np.array([2])})
    assert import_model(saved(tmp_path, proto)).symbols["n"] == (6, 11)


def test_each_branch_has_its_number(tmp_path: Path, rng: np.random.Generator) -> None:
    """And what is behind the If takes either."""
    one, two = (graph([node("Add", "v w", "o")], "o", w=rng.standard_normal(n).astype(np.float32)) for n in (3, 5))
    nodes = [node("If", "c", "y", then_branch=one, else_branch=two), node("Relu", "y", "z")]
    path = saved(tmp_path, model(nodes, [("v", FLOAT, ["b", "n"]), C], ["z"]))
    feeds = [{"v": rng.standard_normal((2, n)).astype(np.float32), "c": flag} for n, flag in ((3, YES), (5, NO))]
    run(path, feeds)
    loaded = llmc.load(str(path.with_suffix(".llmc")))
    with pytest.raises(InputError, match="is 3, where the model needs 5"):
        loaded({**feeds[0], "c": NO})


def test_what_both_demand_holds_for_the_model(tmp_path: Path) -> None:
    one, two = (graph([node(op, "x p", "o")], "o") for op in ("Sub", "Mul"))
    nodes = [node("If", "c", "y", then_branch=one, else_branch=two)]
    imported = import_model(saved(tmp_path, model(nodes, [X, ("p", FLOAT, ["m", 4]), C], ["y"])))
    assert len(imported.symbols) == 1 and imported.types["x"] == imported.types["p"] == imported.types["y"]


def test_branches_nest_in_loops(tmp_path: Path, rng: np.random.Generator) -> None:
    """What p is matters where both flags are set, and the loop runs."""
    inner = node(
        "If",
        "d",
        "sum",
        then_branch=graph([node("Add", "h p", "a")], "a"),
        else_branch=graph([node("Neg", "h", "a")], "a"),
    )
    outer = node("If", "c", "h2", then_branch=graph([inner], "sum"), else_branch=graph([node("Abs", "h", "a")], "a"))
    nodes = [node("Loop", "n _ x", "y", body=graph([outer, GO_ON], "more h2", COUNTER))]
    inputs = [X, ("p", FLOAT, ["m", 4]), C, D, ("n", INT64, [])]
    path = saved(tmp_path, model(nodes, inputs, ["y"]))
    cases = [(3, YES, YES, 5), (2, YES, NO, 3), (2, NO, YES, 3), (5, NO, NO, 1)]
    feeds = [{"x": x(rng, 3), "p": x(rng, m), "c": c, "d": d, "n": np.array(n)} for m, c, d, n in cases]
    run(path, feeds)
    loaded = llmc.load(str(path.with_suffix(".llmc")))
    with pytest.raises(InputError, match=r"is \d, where the model needs \d"):
        loaded({**feeds[1], "d": YES})


def test_sizes_around_that_only_data_decides(tmp_path: Path) -> None:
    """One branch reads the size alone, of which the maker has to run before."""
    one = graph([node("ConstantOfShape", "shape", "f"), node("Cast", "f", "o", to=INT64)], "o")
    two = graph([node("Mul", "where where", "o")], "o")
    for branch in (one, two):
        branch.output[0].type.tensor_type.elem_type = INT64
    nodes = [
        node("NonZero", "v", "where"),
        node("Shape", "where", "shape"),
        node("If", "c", "y", then_branch=one, else_branch=two),
    ]
    path = saved(tmp_path, model(nodes, [("v", FLOAT, ["k"]), C], ["y"]))
    v = np.array([0, 1, 0, 2, 3], np.float32)
    run(path, [{"v": v, "c": YES}, {"v": v, "c": NO}, {"v": v[:1], "c": YES}])
