"""Models whose dimensions the data decides, compiled, saved, loaded and run; narrow types at a model's edge."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import llmc
from llmc.errors import UnsupportedError
from llmc.importer import import_model


def save(path: Path, nodes: list[onnx.NodeProto], inputs: dict[str, tuple[int, list]], outputs: list[str]) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, t, s) for n, (t, s) in inputs.items()],
        [helper.make_value_info(o, onnx.TypeProto()) for o in outputs],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def run(path: Path, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    llmc.compile(str(path)).save(str(path.with_suffix(".llmc")))
    result = llmc.load(str(path.with_suffix(".llmc")))(inputs)
    return result if isinstance(result, dict) else {"": result}


def test_a_found_dimension_serves_other_nodes(tmp_path: Path) -> None:
    """The places of what is not 0, as many zeros by way of their shape, and both joined."""
    nodes = [
        helper.make_node("NonZero", ["x"], ["places"]),
        helper.make_node("Shape", ["places"], ["shape"]),
        helper.make_node(
            "ConstantOfShape", ["shape"], ["zeros"], value=helper.make_tensor("v", TensorProto.INT64, [1], [5])
        ),
        helper.make_node("Add", ["places", "zeros"], ["sum"]),
        helper.make_node("Transpose", ["sum"], ["turned"]),
        helper.make_node("GatherND", ["x", "found"], ["values"]),
        helper.make_node("Transpose", ["places"], ["found"]),
    ]
    path = save(tmp_path / "m.onnx", nodes, {"x": (TensorProto.FLOAT, ["n", 4])}, ["turned", "values", "shape"])
    llmc.compile(str(path)).save(str(tmp_path / "m.llmc"))
    model = llmc.load(str(tmp_path / "m.llmc"))
    for rows in (3, 0, 7):
        x = np.random.default_rng(rows).integers(0, 2, (rows, 4)).astype(np.float32)
        got, places = model(x=x), np.stack(np.nonzero(x))
        np.testing.assert_array_equal(got["turned"], places.T + 5)
        np.testing.assert_array_equal(got["values"], x[np.nonzero(x)])
        np.testing.assert_array_equal(got["shape"], places.shape)


def test_a_shape_alone_keeps_its_node_alive(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("NonZero", ["x"], ["places"]),
        helper.make_node("Shape", ["places"], ["shape"]),
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
    ]
    path = save(tmp_path / "m.onnx", nodes, {"x": (TensorProto.FLOAT, [4])}, ["zeros"])
    assert run(path, x=np.array([1, 0, 2, 3], np.float32))[""].shape == (1, 3)


def test_constants_are_still_folded(tmp_path: Path) -> None:
    """What a constant holds is known, so nothing is left to be found at run time."""
    value = helper.make_tensor("v", TensorProto.FLOAT, [4], [0.0, 1.0, 2.0, 0.0])
    nodes = [
        helper.make_node("Constant", [], ["c"], value=value),
        helper.make_node("NonZero", ["c"], ["places"]),
        helper.make_node("Add", ["places", "y"], ["z"]),
    ]
    graph = import_model(save(tmp_path / "m.onnx", nodes, {"y": (TensorProto.INT64, [1, 2])}, ["z"]))
    assert [node.op for node in graph.nodes] == ["Add"]


def test_a_dimension_that_would_have_to_be_equal(tmp_path: Path) -> None:
    nodes = [helper.make_node("NonZero", ["x"], ["places"]), helper.make_node("Add", ["places", "y"], ["z"])]
    inputs = {"x": (TensorProto.FLOAT, [4]), "y": (TensorProto.INT64, [1, 3])}
    path = save(tmp_path / "m.onnx", nodes, inputs, ["z"])
    with pytest.raises(UnsupportedError, match="known at run time only"):
        import_model(path)


@pytest.mark.parametrize("name", ["int4", "uint2", "float8_e4m3fn", "float4_e2m1fn"])
def test_narrow_types_at_the_edge(tmp_path: Path, name: str) -> None:
    dtype = np.dtype(getattr(ml_dtypes, name))
    code = helper.np_dtype_to_tensor_dtype(dtype)
    nodes = [
        helper.make_node("Transpose", ["x"], ["turned"]),
        helper.make_node("Cast", ["y"], ["narrow"], to=code),
    ]
    inputs = {"x": (code, [2, 2]), "y": (TensorProto.FLOAT, [3])}
    path = tmp_path / "m.onnx"
    save(path, nodes, inputs, ["turned", "narrow"])
    x, y = np.array([[0, 1], [2, 3]], np.float32).astype(dtype), np.array([1, 0, 2], np.float32)
    got = run(path, x=x, y=y)
    assert got["turned"].dtype == got["narrow"].dtype == dtype
    np.testing.assert_array_equal(got["turned"], x.T)
    np.testing.assert_array_equal(got["narrow"], y.astype(dtype))
