"""Local functions, operators that the standard defines by others, and branches that are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, helper

from llmc.errors import ModelError, UnsupportedError
from llmc.graph import Graph
from llmc.importer import import_model
from llmc.ops import RULES
from tests.importer.helpers import FLOAT, model, node, saved

X = ("x", FLOAT, ["n", 4])
CONSTANTS = {"w": np.ones(4, np.float32), "axes": np.array([1])}
IMPORTS = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]


def ops(graph: Graph) -> list[str]:
    return [n.op for n in graph.nodes]


def ref(op: str, inputs: str, outputs: str, attribute: str, kind: int, source: str) -> onnx.NodeProto:
    """A node whose attribute refers to one of its function's."""
    made = node(op, inputs, outputs)
    made.attribute.append(AttributeProto(name=attribute, type=kind, ref_attr_name=source))  # type: ignore[arg-type]
    return made


def test_local_functions_nest_and_pass_attributes(tmp_path: Path) -> None:
    inner = helper.make_function(
        "local", "Inner", ["a"], ["b"], [ref("LeakyRelu", "a", "b", "alpha", AttributeProto.FLOAT, "slope")], IMPORTS,
        attributes=["slope"],
    )  # fmt: skip
    call = node("Inner", "a", "t", domain="local")
    call.attribute.append(AttributeProto(name="slope", type=AttributeProto.FLOAT, ref_attr_name="factor"))
    outer = helper.make_function(
        "local", "Outer", ["a", "b"], ["y", "same"], [call, node("Add", "t a", "y"), node("Identity", "b", "same")],
        IMPORTS, attribute_protos=[helper.make_attribute("factor", 0.5)],
    )  # fmt: skip
    nodes = [
        node("Outer", "x x", "y1 z1", domain="local"),
        node("Outer", "y1 z1", "y2 _", domain="local", factor=0.25),
    ]
    graph = import_model(saved(tmp_path, model(nodes, [X], ["y2"], functions=[inner, outer], domains={"local": 1})))
    assert ops(graph) == ["LeakyRelu", "Add", "LeakyRelu", "Add"]
    assert [n.attrs["alpha"] for n in graph.nodes if n.op == "LeakyRelu"] == [0.5, 0.25]
    assert graph.outputs == ("y2",)


def test_function_obeys_its_own_opset(tmp_path: Path) -> None:
    body = [node("ReduceSum", "a", "b", axes=[1])]
    function = helper.make_function("local", "Sum", ["a"], ["b"], body, [helper.make_opsetid("", 11)])
    proto = model([node("Sum", "x", "y", domain="local")], [X], ["y"], functions=[function], domains={"local": 1})
    graph = import_model(saved(tmp_path, proto))
    assert [(n.op, n.version) for n in graph.nodes] == [("ReduceSum", 11)]
    assert str(graph.types["y"]) == "float32[n, 1]"


def test_endless_functions_are_refused(tmp_path: Path) -> None:
    loop = helper.make_function("local", "F", ["a"], ["b"], [node("F", "a", "b", domain="local")], IMPORTS)
    proto = model([node("F", "x", "y", domain="local")], [X], ["y"], functions=[loop], domains={"local": 1})
    with pytest.raises(ModelError, match="calls itself"):
        import_model(saved(tmp_path, proto))


def test_exploding_functions_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmc.importer.trace.MAX_NODES", 1000)
    functions = []
    for i in range(12):
        inner = f"F{i + 1}" if i < 11 else "Relu"
        domain = "local" if i < 11 else ""
        body = [node(inner, "a", "t", domain=domain), node(inner, "t", "b", domain=domain)]
        functions.append(helper.make_function("local", f"F{i}", ["a"], ["b"], body, IMPORTS))
    proto = model([node("F0", "x", "y", domain="local")], [X], ["y"], functions=functions, domains={"local": 1})
    with pytest.raises(ModelError, match="unfold into more than"):
        import_model(saved(tmp_path, proto))


@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "opset"),
    [
        ("LayerNormalization", "x w", {"epsilon": 1e-5}, 17),
        ("Softplus", "x", {}, 18),
        ("HardSwish", "x", {}, 14),
        ("Celu", "x", {"alpha": 2.0}, 13),
        ("ReduceLogSumExp", "x axes", {"keepdims": 0}, 18),
        ("RMSNormalization", "x w", {}, 23),
    ],
)
def test_standard_definitions_replace_missing_rules(
    tmp_path: Path, op: str, inputs: str, attributes: dict[str, object], opset: int
) -> None:
    proto = model(
        [node(op, inputs, "y", **attributes)],
        [X],
        ["y"],
        {k: v for k, v in CONSTANTS.items() if k in inputs},
        opset=opset,
    )
    rules = {k: rule for k, rule in RULES.items() if k != ("", op)}
    path = saved(tmp_path, proto)
    graph = import_model(path, rules=rules)
    assert op not in ops(graph)
    assert str(graph.types["y"]) == str(import_model(path).types["y"])


def test_failure_inside_a_definition_names_the_users_node(tmp_path: Path) -> None:
    proto = model([node("HardSwish", "x", "y")], [X], ["y"])
    rules = {k: rule for k, rule in RULES.items() if k[1] not in ("HardSwish", "HardSigmoid", "Max", "Clip")}
    with pytest.raises(UnsupportedError, match=r"/y \(ai.onnx.HardSwish, opset 17\): its standard definition needs"):
        import_model(saved(tmp_path, proto), rules=rules)


@pytest.mark.parametrize("taken", [True, False])
def test_known_branch_is_taken(tmp_path: Path, taken: bool) -> None:
    def branch(op: str) -> onnx.GraphProto:
        out = helper.make_tensor_value_info("out", FLOAT, None)
        weight = onnx.numpy_helper.from_array(np.ones(4, np.float32), "w")
        return helper.make_graph([node("Add", "h w", "t"), node(op, "t", "out")], op, [], [out], [weight])

    nodes = [
        node("Relu", "x", "h"),
        node("Shape", "x", "s"),
        node("Gather", "s one", "d", axis=0),
        node("Equal", "d four", "c"),
        node("If", "c", "y", then_branch=branch("Exp"), else_branch=branch("Abs")),
    ]
    constants = {"one": np.array(1), "four": np.array(4 if taken else 5)}
    graph = import_model(saved(tmp_path, model(nodes, [X], ["y"], constants)))
    assert ops(graph) == ["Relu", "Add", "Exp" if taken else "Abs", "Identity"]
