"""Whole models: types over symbols, symbols that turn out equal, and every unsupported node at once."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from llmc.errors import LlmcError, ModelError, OptionError, ShapeError, UnsupportedError
from llmc.graph import Graph, TensorType
from llmc.importer import import_model
from tests.importer.helpers import BOOL, FLOAT, INT64, Edge, model, node, saved

IDS: Edge = ("ids", INT64, ["batch", "seq"])
MASK: Edge = ("mask", INT64, ["batch", "total"])
PAST: Edge = ("past_k", FLOAT, ["batch", 2, "past", 4])


def ops(graph: Graph) -> list[str]:
    return [n.op for n in graph.nodes]


def shape(graph: Graph, name: str) -> str:
    return str(graph.types[name])


def complete(graph: Graph) -> None:
    """Every value has a type, and every value that is read is made."""
    made = {*graph.inputs, *graph.constants}
    for n in graph.nodes:
        assert made.issuperset(filter(None, n.inputs)), n
        made.update(n.outputs)
    assert made.issuperset(graph.outputs)
    assert set(graph.types) >= {m for m in made if m}
    assert str(graph).startswith("graph ")


def decoder(present: list[int | str | None] | None = None) -> onnx.ModelProto:
    """Embedding, a head split, a cache append and a causal mask, as exporters write them."""
    nodes = [
        node("Shape", "ids", "shape"),
        node("Gather", "shape c0", "B", axis=0),
        node("Gather", "shape c1", "S", axis=0),
        node("Shape", "past_k", "past_shape"),
        node("Gather", "past_shape c2", "P", axis=0),
        node("Add", "P S", "T"),
        node("Gather", "table ids", "embedded"),
        node("Unsqueeze", "B v0", "B1"),
        node("Unsqueeze", "S v0", "S1"),
        node("Concat", "B1 S1 heads", "split", axis=0),
        node("Reshape", "embedded split", "h4"),
        node("Transpose", "h4", "k", perm=[0, 2, 1, 3]),
        node("Concat", "past_k k", "present_k", axis=2),
        node("Range", "P T c1", "rows"),
        node("Range", "c0 T c1", "columns"),
        node("Unsqueeze", "rows v1", "rows2"),
        node("Unsqueeze", "columns v0", "columns2"),
        node("LessOrEqual", "columns2 rows2", "causal"),
    ]
    if present is None:
        nodes += [
            node("Cast", "mask", "mask_bool", to=BOOL),
            node("Unsqueeze", "mask_bool v1", "mask3"),
            node("And", "mask3 causal", "both"),
        ]
    constants = {
        "c0": np.array(0),
        "c1": np.array(1),
        "c2": np.array(2),
        "v0": np.array([0]),
        "v1": np.array([1]),
        "heads": np.array([2, 4]),
        "table": np.ones((10, 8), np.float32),
    }
    outputs: list[Edge | str] = ["both", "present_k"] if present is None else [("present_k", FLOAT, present)]
    return model(nodes, [IDS, MASK, PAST], outputs, constants)


def test_shape_arithmetic_goes_and_symbols_unify(tmp_path: Path) -> None:
    graph = import_model(saved(tmp_path, decoder()))
    complete(graph)
    assert shape(graph, "mask") == "int64[batch, past + seq]"
    assert shape(graph, "present_k") == "float32[batch, 2, past + seq, 4]"
    assert shape(graph, "both") == "bool[batch, seq, past + seq]"
    assert not {"Shape", "Add"}.intersection(ops(graph))
    assert set(graph.symbols) == {"batch", "seq", "past"}
    values = [str(list(n.attrs["value"].flat)) for n in graph.nodes if n.op == "ShapeValue"]
    assert "[batch, seq, 2, 4]" in values


def test_declared_outputs_name_what_is_computed(tmp_path: Path) -> None:
    graph = import_model(saved(tmp_path, decoder(["batch", 2, "total", 4])))
    assert shape(graph, "mask") == "int64[batch, past + seq]"
    graph = import_model(saved(tmp_path, decoder(["batch", 2, "else", 4])))
    assert shape(graph, "mask") == "int64[batch, total]"


def test_expressions_in_dim_params(tmp_path: Path) -> None:
    inputs: list[Edge] = [
        ("x", FLOAT, ["n", "past_len"]),
        ("y", FLOAT, ["n", "past_len + 2*n"]),
        ("z", FLOAT, ["odd name!", "n // unknown"]),
    ]
    nodes = [node("Concat", "x y z2", "out", axis=1), node("Reshape", "z r", "z2")]
    graph = import_model(saved(tmp_path, model(nodes, inputs, ["out"], {"r": np.array([0, -1])})), {"odd name!": 3})
    assert shape(graph, "y") == "float32[3, past_len + 6]", "n must be 3, as z has 3 rows"
    assert shape(graph, "z") == "float32[3, n_unknown]"


def test_dims_fix_and_bound(tmp_path: Path) -> None:
    path = saved(tmp_path, decoder())
    graph = import_model(path, {"batch": 1, "seq": 4, "past": (0, 12)})
    assert shape(graph, "mask") == "int64[1, past + 4]"
    assert graph.symbols == {"past": (0, 12)}
    assert shape(import_model(path, {"batch": 1, "seq": 4, "past": 12}), "mask") == "int64[1, 16]"
    with pytest.raises(OptionError, match="no dimension 'sequence'"):
        import_model(path, {"sequence": 4})
    with pytest.raises(OptionError, match="cannot be"):
        import_model(path, {"seq": (9, 3)})
    with pytest.raises(ShapeError, match="'total' must be 16, outside of its range 0 to 9"):
        import_model(path, {"seq": 4, "past": 12, "total": (0, 9)})
    with pytest.raises(ShapeError, match="17 and 16 must be equal"):
        import_model(path, {"seq": 4, "past": 12, "total": 17})


def test_unnamed_dimensions_are_called_after_their_input(tmp_path: Path) -> None:
    proto = model([node("Add", "a b", "y")], [("a", FLOAT, [None, 3]), ("b", FLOAT, [None, 3])], ["y"])
    assert shape(import_model(saved(tmp_path, proto)), "y") in ("float32[a_0, 3]", "float32[b_0, 3]")
    assert shape(import_model(saved(tmp_path, proto), {"a_0": 7}), "b") == "float32[7, 3]"


def test_all_unsupported_nodes_at_once(tmp_path: Path) -> None:
    nodes = [
        node("Mystery", "x", "a", domain="com.example"),
        node("Relu", "a", "b"),
        node("StringNormalizer", "s", "c"),
        node("Enigma", "b", "d", domain="com.example"),
        node("Abs", "x", "e"),
    ]
    inputs: list[Edge] = [("x", FLOAT, ["n"]), ("s", TensorProto.STRING, [2])]
    path = saved(tmp_path, model(nodes, inputs, ["b", "c", "d", "e"], domains={"com.example": 3}))
    with pytest.raises(UnsupportedError) as caught:
        import_model(path)
    lines = str(caught.value).splitlines()
    assert lines[0] == "test: 3 nodes cannot be compiled:"
    assert [line.strip().split(": ")[0] for line in lines[1:]] == [
        "/a (com.example.Mystery, opset 3)",
        "/c (ai.onnx.StringNormalizer, opset 17)",
        "/d (com.example.Enigma, opset 3)",
        "hint",
    ]


def test_unsupported_but_dead_nodes_do_not_matter(tmp_path: Path) -> None:
    nodes = [node("Mystery", "x", "a", domain="com.example"), node("Relu", "x", "y")]
    path = saved(tmp_path, model(nodes, [("x", FLOAT, ["n"])], ["y"], domains={"com.example": 1}))
    assert ops(import_model(path)) == ["Relu"]


def test_wrong_operands_are_a_reason(tmp_path: Path) -> None:
    nodes = [node("Concat", "x z", "y", axis=0)]
    path = saved(tmp_path, model(nodes, [("x", FLOAT, ["n", 3]), ("z", FLOAT, ["n", 4])], ["y"]))
    with pytest.raises(ModelError, match="dimensions 3 and 4 must be equal"):
        import_model(path)


def test_inputs_that_are_no_tensors(tmp_path: Path) -> None:
    proto = model([node("Identity", "x", "y")], [], ["y"])
    proto.graph.input.append(
        helper.make_value_info("x", helper.make_sequence_type_proto(helper.make_tensor_type_proto(1, [1])))
    )
    with pytest.raises(UnsupportedError, match="inputs must be tensors, not sequence"):
        import_model(saved(tmp_path, proto))
    proto = model([node("Identity", "x", "y")], [("x", FLOAT, None)], ["y"])
    with pytest.raises(UnsupportedError, match="rank is not declared"):
        import_model(saved(tmp_path, proto))


def test_constants_fold_but_not_quantised_weights(tmp_path: Path, rng: np.random.Generator) -> None:
    constants = {
        "a": rng.standard_normal((4, 5)).astype(np.float32),
        "w": rng.integers(0, 255, (5, 6)).astype(np.uint8),
        "scale": np.float32(0.1),
        "zero": np.uint8(8),
        "many": np.array([2**14, 2**14]),
    }
    nodes = [
        node("Constant", "", "c", value_floats=[1.0, 2.0, 3.0, 4.0, 5.0]),
        node("Mul", "a c", "m"),
        node("Tanh", "m", "t"),
        node("Add", "x t", "y"),
        node("DequantizeLinear", "w scale zero", "wf"),
        node("ConstantOfShape", "many", "huge"),
        node("ReduceMax", "huge", "most", keepdims=0),
        node("Add", "x most", "z"),
    ]
    proto = model(nodes[:4] + nodes[5:], [("x", FLOAT, ["n", 4, 5])], ["y", "z"], constants)
    graph = import_model(saved(tmp_path, proto))
    complete(graph)
    assert ops(graph) == ["Add", "ConstantOfShape", "ReduceMax", "Add"], "a small file must not allocate a gigabyte"
    np.testing.assert_allclose(graph.constants["t"], np.tanh(constants["a"] * np.arange(1, 6)), rtol=1e-6)
    assert set(graph.constants) == {"t", "many"}


def test_large_models_are_not_read(tmp_path: Path) -> None:
    """4 GiB of weights in a sparse file, and 3,000 nodes: neither time nor memory may follow the weights."""
    size = 2**15
    weight = TensorProto(name="w", data_type=FLOAT, dims=[size, size], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="w.data")
    with (tmp_path / "w.data").open("wb") as file:
        file.truncate(size * size * 4)
    nodes = [node("MatMul", "x w", "v0")]
    for i in range(1000):
        nodes += [
            node("Relu", f"v{i}", f"r{i}"),
            node("Shape", f"r{i}", f"s{i}"),
            node("Reshape", f"r{i} s{i}", f"v{i + 1}"),
        ]
    proto = model(nodes, [("x", FLOAT, ["n", size])], ["v1000"])
    proto.graph.initializer.append(weight)
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    before = resource.getrusage(resource.RUSAGE_SELF)
    graph = import_model(path)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert shape(graph, "v1000") == f"float32[n, {size}]"
    assert after.ru_maxrss - before.ru_maxrss < 200 * 1024, "kB"
    assert after.ru_utime - before.ru_utime < 6


def test_attributes_are_python_values(tmp_path: Path) -> None:
    nodes = [
        node("Transpose", "x", "t", perm=[1, 0]),
        node("Gelu", "t", "g", approximate="tanh"),
        node("Softmax", "g", "y", axis=1),
    ]
    graph = import_model(saved(tmp_path, model(nodes, [("x", FLOAT, ["n", 3])], ["y"], opset=20)))
    assert [dict(n.attrs) for n in graph.nodes] == [{"perm": (1, 0)}, {"approximate": "tanh"}, {"axis": 1}]
    assert [n.version for n in graph.nodes] == [20, 20, 20]


def test_input_that_is_output(tmp_path: Path) -> None:
    nodes = [node("Identity", "x", "y"), node("Shape", "x", "s")]
    graph = import_model(saved(tmp_path, model(nodes, [("x", FLOAT, ["n", 3])], ["y", "s"])))
    complete(graph)
    assert graph.types["y"] == graph.types["x"]
    assert graph.types["s"] == TensorType((2,), "int64")


def test_damaged_models_end_in_an_error_of_ours(tmp_path: Path, rng: np.random.Generator) -> None:
    content = decoder().SerializeToString()
    path = tmp_path / "model.onnx"
    imported = 0
    for _ in range(400):
        damaged = bytearray(content)
        for i in rng.integers(len(content), size=rng.integers(1, 4)):
            damaged[i] = rng.integers(256)
        path.write_bytes(damaged)
        with contextlib.suppress(LlmcError):
            import_model(path)
            imported += 1
    assert 0 < imported < 200, "some damage is harmless, most is not"


def test_names_that_are_not_text(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(decoder().SerializeToString().replace(b"total", b"\x9cotal"))
    with pytest.raises(ModelError, match="not text"):
        import_model(path)


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        (node("Add", "x", "y"), "input size 1"),
        (node("Cast", "x", "y"), "'to' is missing"),
        (node("Softmax", "x", "y", axis=0.5), "Mismatched attribute type"),
        (node("Relu", "x", "y", speed=3), "Unrecognized attribute"),
        (node("Upsample", "x x", "y"), "deprecated"),
    ],
)
def test_nodes_that_break_the_standard(tmp_path: Path, broken: onnx.NodeProto, text: str) -> None:
    with pytest.raises(ModelError, match=text):
        import_model(saved(tmp_path, model([broken], [("x", FLOAT, ["n"])], ["y"])))


def test_contrib_op_in_the_default_domain(tmp_path: Path) -> None:
    nodes = [node("SimplifiedLayerNormalization", "x w", "y", axis=-1, epsilon=1e-5)]
    proto = model(nodes, [("x", FLOAT, ["n", 8])], ["y"], {"w": np.ones(8, np.float32)})
    graph = import_model(saved(tmp_path, proto))
    assert shape(graph, "y") == "float32[n, 8]"
