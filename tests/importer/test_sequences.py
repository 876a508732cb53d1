"""Sequences and optionals are gone after import, and what is left computes what the standard says."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from llmc.errors import UnsupportedError
from llmc.importer import import_model
from llmc.tvm_shim import tvm
from tests.importer.helpers import BOOL, FLOAT, INT64, model, node, saved
from tests.importer.test_control import X, graph, x
from tests.importer.test_loops import run
from tests.importer.test_run import check, compiled

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from onnx.backend.test.case.node import collect_testcases


# -- the backend suite's cases, whose sequences are made and taken apart inside of the model --------------------
def _edge(name: str, value: Any, kind: onnx.TypeProto, proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> None:
    """Put nodes in front of a graph that make its input `name` of tensors, which `feeds` gets."""

    def tensor(name: str, array: np.ndarray) -> str:
        feeds[name] = array
        info = helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        proto.graph.input.append(info)
        return name

    def sequence(values: list[np.ndarray], output: str) -> onnx.NodeProto:
        if not values:
            return helper.make_node("SequenceEmpty", [], [output])
        return helper.make_node("SequenceConstruct", [tensor(f"{name}.{n}", v) for n, v in enumerate(values)], [output])

    if kind.HasField("tensor_type") and value.dtype.kind in "ib":  # a position, a length, a condition
        proto.graph.initializer.append(numpy_helper.from_array(value, name))
    elif kind.HasField("tensor_type"):
        tensor(name, value)
    elif kind.HasField("sequence_type"):
        proto.graph.node.insert(0, sequence(list(value), name))
    elif value is None:
        proto.graph.node.insert(0, helper.make_node("Optional", [], [name], type=kind.optional_type.elem_type))
    else:
        proto.graph.node.insert(0, helper.make_node("Optional", [f"{name}.value"], [name]))
        _edge(f"{name}.value", value, kind.optional_type.elem_type, proto, feeds)


def opened(case: Any) -> tuple[onnx.ModelProto, dict[str, np.ndarray], list[np.ndarray]]:
    """A case's model with tensors at its edge, its inputs and the outputs that it is to give."""
    proto, ((inputs, outputs),) = onnx.ModelProto(), case.data_sets
    proto.CopyFrom(case.model)
    del proto.graph.input[:], proto.graph.output[:]
    feeds: dict[str, np.ndarray] = {}
    for info, value in zip(case.model.graph.input, inputs, strict=True):
        _edge(info.name, array(value), info.type, proto, feeds)
    wanted: list[np.ndarray] = []
    for info, value in zip(case.model.graph.output, outputs, strict=True):
        name = info.name
        if info.type.HasField("optional_type"):
            proto.graph.node.append(helper.make_node("OptionalGetElement", [name], [f"{name}.value"]))
            name = f"{name}.value"
        if not isinstance(value, list):
            proto.graph.output.append(onnx.ValueInfoProto(name=name))
            wanted.append(array(value))
            continue
        proto.graph.node.append(helper.make_node("SequenceLength", [name], [f"{name}.length"]))
        proto.graph.output.append(onnx.ValueInfoProto(name=f"{name}.length"))
        wanted.append(np.array(len(value)))
        for n, element in enumerate(value):
            proto.graph.initializer.append(numpy_helper.from_array(np.array(n), f"{name}.place.{n}"))
            proto.graph.node.append(helper.make_node("SequenceAt", [name, f"{name}.place.{n}"], [f"{name}.{n}"]))
            proto.graph.output.append(onnx.ValueInfoProto(name=f"{name}.{n}"))
            wanted.append(array(element))
    return proto, feeds, wanted


def array(value: Any) -> Any:
    if isinstance(value, TensorProto):
        return numpy_helper.to_array(value)
    return [array(v) for v in value] if isinstance(value, list) else value


def cases() -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = collect_testcases(None)
    kinds = [
        (case, [i.type.WhichOneof("value") for i in (*case.model.graph.input, *case.model.graph.output)])
        for case in found
    ]
    chosen = [case for case, edge in kinds if set(edge) & {"sequence_type", "optional_type"}]
    return [case for case in chosen if "string" not in case.name]  # string operators are refused: test_refused.py


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in cases()])
def test_backend_suite(tmp_path: Path, case: Any) -> None:
    proto, feeds, wanted = opened(case)
    imported = import_model(saved(tmp_path, proto))
    assert not any("Sequence" in n.op or "Optional" in n.op for n in imported.nodes)
    machine = compiled(imported)
    got = machine["main"](*(tvm.runtime.tensor(feeds[name]) for name in imported.inputs))
    for g, w in zip(got, wanted, strict=True):
        assert (g.numpy().dtype, g.numpy().shape) == (w.dtype, w.shape)
        np.testing.assert_allclose(g.numpy(), w, rtol=case.rtol, atol=case.atol)


# -- as exporters write them ------------------------------------------------------------------------------------
def listed(trips: str) -> onnx.ModelProto:
    """torch.onnx's list that a loop appends to, stacked behind it."""
    steps = [
        node("Gather", "x i", "row"),
        node("Exp", "row", "e"),
        node("SequenceInsert", "list e", "list2"),
        node("Identity", "go", "more"),
    ]
    body = graph(steps, "more list2", [("i", INT64), ("go", BOOL), ("list", FLOAT)])
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(FLOAT, None))
    body.input[2].type.CopyFrom(kind)
    body.output[1].type.CopyFrom(kind)
    nodes = [
        helper.make_node("SequenceEmpty", [], ["empty"]),
        node("Loop", f"{trips} yes empty", "full", body=body),
        node("ConcatFromSequence", "full", "y", axis=0, new_axis=1),
        node("SequenceLength", "full", "n"),
    ]
    constants = {"three": np.array(3), "yes": np.array(True)}
    return model(nodes, [X, ("trips", INT64, [])], ["y", "n"], constants)


def test_list_of_a_loop(tmp_path: Path, rng: np.random.Generator) -> None:
    proto = listed("three")
    del proto.graph.input[1]
    check(saved(tmp_path, proto), [{"x": x(rng, batch)} for batch in (3, 5)])


@pytest.mark.parametrize(
    ("nodes", "output", "reason"),
    [
        ([node("SequenceConstruct", "x x", "s"), node("SequenceAt", "s n", "y")], "y", "position is known at run time"),
        (
            [node("SequenceConstruct", "x x", "s"), node("SequenceAt", "s two", "y")],
            "y",
            "2 is outside of a seq",
        ),
        (
            [node("SplitToSequence", "x", "s"), node("SequenceAt", "s n", "y")],
            "y",
            "as dimension b says",
        ),
        ([node("SequenceConstruct", "x", "s"), node("Neg", "s", "y")], "y", "Neg, opset 17.: it works on a sequence"),
        ([node("Optional", "x", "o"), node("SequenceLength", "o", "y")], "y", "'o' is no sequence"),
        ([node("SequenceConstruct", "x", "s")], "s", "output 's' is a sequence"),
        ([node("Optional", "x", "o")], "o", "output 'o' is an optional"),
    ],
)
def test_what_cannot_be_resolved_is_refused(
    tmp_path: Path, nodes: list[onnx.NodeProto], output: str, reason: str
) -> None:
    proto = model(nodes, [X, ("n", INT64, [])], [output], {"two": np.array(2)})
    with pytest.raises(UnsupportedError, match=reason):
        import_model(saved(tmp_path, proto))


@pytest.mark.parametrize(("axis", "new_axis"), [(0, 1), (-1, 1), (0, 0), (1, 0)])
def test_list_of_a_loop_whose_length_is_data(
    tmp_path: Path, rng: np.random.Generator, axis: int, new_axis: int
) -> None:
    proto = listed("trips")
    if not new_axis:  # elements of two dimensions
        row = proto.graph.node[1].attribute[0].g.node[0]
        row.CopyFrom(node("Mul", "x x", "row"))
    del proto.graph.node[2].attribute[:]
    proto.graph.node[2].attribute.extend(
        [helper.make_attribute("axis", axis), helper.make_attribute("new_axis", new_axis)]
    )
    proto.graph.node.append(node("SequenceAt", "full trips_less_1", "last"))
    proto.graph.node.append(node("Sub", "trips one", "trips_less_1"))
    proto.graph.initializer.append(numpy_helper.from_array(np.array(1), "one"))
    proto.graph.output.append(onnx.ValueInfoProto(name="last"))
    run(saved(tmp_path, proto), [{"x": x(rng, b), "trips": np.array(n)} for b, n in ((3, 1), (5, 4))])


def test_list_that_a_loop_does_more_to(tmp_path: Path) -> None:
    proto = listed("trips")
    body = proto.graph.node[1].attribute[0].g
    body.node.append(node("SequenceInsert", "list2 row", "list3"))
    body.output[1].name = "list3"
    with pytest.raises(UnsupportedError, match="each does more to a list than append"):
        import_model(saved(tmp_path, proto))
    body.node[-1].CopyFrom(node("SequenceErase", "list2", "list3"))
    with pytest.raises(UnsupportedError, match=r"'.*', which a loop makes, is known at run time only"):
        import_model(saved(tmp_path, proto))


def test_empty_optional_has_no_element(tmp_path: Path) -> None:
    kind = helper.make_tensor_type_proto(FLOAT, [4])
    nodes = [helper.make_node("Optional", [], ["o"], type=kind), node("OptionalGetElement", "o", "y")]
    with pytest.raises(UnsupportedError, match="the optional is empty"):
        import_model(saved(tmp_path, model(nodes, [X], ["y"])))
