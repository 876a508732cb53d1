"""What a model says about its dimensions beyond naming them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llmc.errors import ShapeError
from llmc.importer import import_model

from .helpers import FLOAT, INT64, model, node, saved


def test_a_dimension_that_must_shrink_to_one_gets_a_range(tmp_path: Path) -> None:
    nodes = [
        node("MaxPool", "x", "p", kernel_shape=[3, 1], strides=[3, 1]),
        node("Squeeze", "p axes", "y"),
    ]
    proto = model(nodes, [("x", FLOAT, ["n", 2, "h", "w"])], ["y"], {"axes": np.array([2])})
    graph = import_model(saved(tmp_path, proto))
    assert graph.symbols["h"] == (3, 5)
    assert str(graph.types["y"]) == "float32[n, 2, w]"
    with pytest.raises(ShapeError, match="must be equal"):
        import_model(saved(tmp_path, proto), {"h": (6, 9)})


def test_two_pasts_are_one(tmp_path: Path) -> None:
    nodes = [
        node("Concat", "k x", "keys", axis=0),
        node("Concat", "v x", "values", axis=0),
        node("Add", "keys values", "y"),
    ]
    inputs = [("k", FLOAT, ["a", 4]), ("v", FLOAT, ["b", 4]), ("x", FLOAT, ["s", 4])]
    graph = import_model(saved(tmp_path, model(nodes, inputs, ["y"])))
    assert str(graph.types["k"]) == str(graph.types["v"])


def test_what_has_no_single_answer_says_how_to_go_on(tmp_path: Path) -> None:
    nodes = [node("MaxPool", "x", "p", kernel_shape=[2], strides=[2]), node("Concat", "p p", "d", axis=2)]
    nodes.append(node("Add", "d x", "y"))
    with pytest.raises(ShapeError, match="--dim w=SIZE"):
        import_model(saved(tmp_path, model(nodes, [("x", FLOAT, [1, 1, "w"])], ["y"])))


def test_minus_one_is_a_dimension_without_a_name(tmp_path: Path) -> None:
    graph = import_model(saved(tmp_path, model([node("Relu", "x", "y")], [("x", FLOAT, [-1, 3])], ["y"])))
    assert str(graph.types["x"]) == "float32[x_0, 3]"


def test_a_reshape_by_sizes_that_were_added(tmp_path: Path) -> None:
    """[B, H, P + S, D] → [-1, P + S, D], as torch.onnx turns keys."""
    nodes = [
        node("Concat", "past x", "k", axis=2),
        node("Shape", "k", "length", start=2, end=4),
        node("Concat", "rest length", "shape", axis=0),
        node("Reshape", "k shape", "y"),
    ]
    inputs = [("past", FLOAT, ["b", 2, "p", 4]), ("x", FLOAT, ["b", 2, "s", 4])]
    graph = import_model(saved(tmp_path, model(nodes, inputs, ["y"], {"rest": np.array([-1])})))
    assert str(graph.types["y"]) == "float32[b * 2, p + s, 4]"


def test_jax_slices_end_at_ten_to_the_nine(tmp_path: Path) -> None:
    constants = {"starts": np.array([0]), "ends": np.array([10**9])}
    proto = model([node("Slice", "x starts ends", "y")], [("x", INT64, ["n", 3])], ["y"], constants)
    assert str(import_model(saved(tmp_path, proto)).types["y"]) == "int64[n, 3]"
