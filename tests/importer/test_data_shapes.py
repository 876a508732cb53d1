"""Models whose dimensions the data decides, compiled, saved, loaded and run; narrow types at a model's edge."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import llmc
from llmc.errors import InputError, UnsupportedError
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


def test_dimensions_that_have_to_be_equal(tmp_path: Path) -> None:
    """A found dimension that another one, a number or another found one has to equal is that: the run looks."""
    nodes = [
        helper.make_node("NonZero", ["x"], ["places"]),
        helper.make_node("Add", ["places", "three"], ["of a number"]),
        helper.make_node("NonZero", ["y"], ["others"]),
        helper.make_node("NonZero", ["z"], ["yet others"]),
        helper.make_node("Add", ["others", "yet others"], ["of another"]),
        helper.make_node("NonZero", ["u"], ["more"]),
        helper.make_node("Add", ["more", "v"], ["of a symbol"]),
    ]
    inputs = {
        "x": (TensorProto.FLOAT, [4]),
        "three": (TensorProto.INT64, [3]),
        **dict.fromkeys(("y", "z", "u"), (TensorProto.FLOAT, [4])),
        "v": (TensorProto.INT64, ["n"]),
    }
    path = save(tmp_path / "m.onnx", nodes, inputs, ["of a number", "of another", "of a symbol"])
    llmc.compile(str(path)).save(str(tmp_path / "m.llmc"))
    model = llmc.load(str(tmp_path / "m.llmc"))
    x, y, z = (np.array(v, np.float32) for v in ([1, 0, 1, 1], [0, 1, 1, 0], [1, 0, 0, 1]))
    fed = {"x": x, "three": np.arange(3), "y": y, "z": z, "u": z, "v": np.arange(2)}
    got = model(fed)
    np.testing.assert_array_equal(got["of a number"], [[0, 3, 5]])
    np.testing.assert_array_equal(got["of another"], [[1, 5]])
    np.testing.assert_array_equal(got["of a symbol"], [[0, 4]])
    for wrong in ({"x": z}, {"y": x}, {"u": x}, {"v": np.arange(3)}):
        with pytest.raises(InputError, match=r"a size or flag that they decide is \d, where the model needs \d"):
            model({**fed, **wrong})


def test_what_would_have_to_equal_a_later_dimension(tmp_path: Path) -> None:
    """Places that are found twice over have no size that is known when the first is found."""
    nodes = [
        helper.make_node("NonZero", ["x"], ["places"]),
        helper.make_node("NonZero", ["y"], ["others"]),
        helper.make_node("Concat", ["others", "others"], ["twice"], axis=1),
        helper.make_node("Add", ["places", "twice"], ["z"]),
    ]
    inputs = {"x": (TensorProto.FLOAT, [4]), "y": (TensorProto.FLOAT, [4])}
    with pytest.raises(UnsupportedError, match="known at run time only"):
        import_model(save(tmp_path / "m.onnx", nodes, inputs, ["z"]))


def test_an_expansion_that_fits_no_dimension(tmp_path: Path) -> None:
    """A size of run time is 1, the dimension's own, or refused; it used to be ignored."""
    inputs = {"x": (TensorProto.FLOAT, ["n", 3, 1]), "sizes": (TensorProto.INT64, [4])}
    path = save(tmp_path / "m.onnx", [helper.make_node("Expand", ["x", "sizes"], ["y"])], inputs, ["y"])
    llmc.compile(path).save(tmp_path / "m.llmc")
    model, x = llmc.load(tmp_path / "m.llmc"), np.arange(6, dtype=np.float32).reshape(2, 3, 1)
    for sizes in ([2, 1, 3, 4], [1, 2, 1, 1], [2, 2, 3, 2]):
        np.testing.assert_array_equal(model(x=x, sizes=np.array(sizes)), x * np.ones(sizes, np.float32))
    for sizes in ([2, 2, 4, 2], [2, 5, 3, 1]):
        with pytest.raises(InputError, match="a size or flag that they decide"):
            model(x=x, sizes=np.array(sizes))


def test_sizes_that_make_no_sense(tmp_path: Path) -> None:
    """Whatever the data asks for, the run fails before it does harm."""
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["reshaped"]),
        helper.make_node("ConstantOfShape", ["size"], ["zeros"]),
        helper.make_node("Dropout", ["x", "ratio", "training"], ["kept"]),
        helper.make_node("Split", ["x", "parts"], ["first", "second"], axis=0),
    ]
    inputs = {
        "x": (TensorProto.FLOAT, [4]),
        **dict.fromkeys(("shape", "size", "parts"), (TensorProto.INT64, [2])),
        "ratio": (TensorProto.FLOAT, []),
        "training": (TensorProto.BOOL, []),
    }
    path = save(tmp_path / "m.onnx", nodes, inputs, ["reshaped", "zeros", "kept", "first", "second"])
    llmc.compile(str(path)).save(str(tmp_path / "m.llmc"))
    model, x = llmc.load(str(tmp_path / "m.llmc")), np.arange(4, dtype=np.float32)
    two, half = np.array([2, 2]), np.array(0.5, np.float32)
    fed = {"x": x, "shape": two, "size": two, "ratio": half, "training": np.array(False), "parts": np.array([1, 3])}
    got = model(fed)
    assert got["reshaped"].shape == got["zeros"].shape == (2, 2)
    np.testing.assert_array_equal(got["kept"], x)
    np.testing.assert_array_equal(got["second"], x[1:])
    for shape in ([100000, 10000], [-1, -1], [3, 1], [2**32, 2**32]):
        with pytest.raises(InputError, match="refused these inputs"):
            model({**fed, "shape": np.array(shape)})
    for size in ([-2, 2], [2**31, 2**31], [2**40, 2], [-(2**62), -4]):
        with pytest.raises(InputError, match="negative, or more than any memory holds"):
            model({**fed, "size": np.array(size)})
    with pytest.raises(InputError, match="is 1, where the model needs 0"):
        model({**fed, "training": np.array(True)})
    model({**fed, "training": np.array(True), "ratio": np.array(0, np.float32)})
    parts = model({**fed, "parts": np.array([7, 9])})  # of what there is not, nothing is read
    np.testing.assert_array_equal(parts["first"], x)
    assert parts["second"].shape == (0,)


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
