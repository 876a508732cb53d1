"""Graphs and functions whose names and references do not hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto, helper

from tests.importer.helpers import BOOL, FLOAT, model, node, saved
from tests.security.kinds import kind

X = ("x", FLOAT, [4])
C = ("c", BOOL, [])
IMPORTS = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]


def graph_of(folder: Path, *nodes: NodeProto, outputs: list[str] | None = None) -> Path:
    return saved(folder, model(nodes, [X], ["y"] if outputs is None else outputs))


@kind("cycle")
def a_cycle(folder: Path) -> Path:
    return graph_of(folder, node("Add", "x b", "a"), node("Relu", "a", "b"), node("Relu", "b", "y"))


@kind("cycle")
def a_node_that_reads_itself(folder: Path) -> Path:
    return graph_of(folder, node("Add", "x y", "y"))


@kind("cycle")
def a_long_cycle(folder: Path) -> Path:
    names = [f"v{i}" for i in range(30_000)]
    nodes = [NodeProto(op_type="Relu", input=[a], output=[b]) for a, b in zip([names[-1], *names], names, strict=False)]
    return graph_of(folder, *nodes, outputs=["v7"])


@kind("'z' is made by nothing")
def a_dangling_input(folder: Path) -> Path:
    return graph_of(folder, node("Relu", "z", "y"))


@kind("output 'q' is made by nothing")
def a_dangling_output(folder: Path) -> Path:
    return graph_of(folder, node("Relu", "x", "y"), outputs=["q"])


@kind("'y' is made twice")
def a_value_made_twice(folder: Path) -> Path:
    return graph_of(folder, node("Relu", "x", "y"), node("Abs", "x", "y"))


@kind("'x' is made twice")
def an_input_made_again(folder: Path) -> Path:
    return graph_of(folder, node("Relu", "x", "x"), node("Relu", "x", "y"))


@kind("outputs are missing or named twice")
def an_output_named_twice(folder: Path) -> Path:
    return graph_of(folder, node("Relu", "x", "y"), outputs=["y", "y"])


@kind("outputs are missing or named twice")
def no_outputs(folder: Path) -> Path:
    return graph_of(folder, node("Relu", "x", "y"), outputs=[])


@kind("initializer 'w' is given twice")
def an_initializer_twice(folder: Path) -> Path:
    proto = model([node("Add", "x w", "y")], [X], ["y"], {"w": np.ones(4, np.float32)})
    proto.graph.initializer.append(proto.graph.initializer[0])
    return saved(folder, proto)


@kind("has no name")
def an_initializer_without_a_name(folder: Path) -> Path:
    return saved(folder, model([node("Relu", "x", "y")], [X], ["y"], {"": np.ones(4, np.float32)}))


@kind("names no operator")
def a_node_without_an_operator(folder: Path) -> Path:
    return graph_of(folder, NodeProto(input=["x"], output=["y"]))


# -- attributes ---------------------------------------------------------------------------------------------------
def with_attributes(folder: Path, *attributes: AttributeProto) -> Path:
    relu = node("LeakyRelu", "x", "y")
    relu.attribute.extend(attributes)
    return graph_of(folder, relu)


@kind("attribute 'alpha' is given twice")
def an_attribute_twice(folder: Path) -> Path:
    alpha = helper.make_attribute("alpha", 0.5)
    return with_attributes(folder, alpha, alpha)


@kind("is not of its type")
def an_attribute_without_a_type(folder: Path) -> Path:
    return with_attributes(folder, AttributeProto(name="alpha", f=0.5))


@kind("is not of its type")
def a_graph_that_hides_in_a_number(folder: Path) -> Path:
    return with_attributes(folder, AttributeProto(name="alpha", type=AttributeProto.FLOAT, f=0.5, g=GraphProto()))


@kind("is not of its type")
def a_number_that_says_it_is_a_tensor(folder: Path) -> Path:
    return with_attributes(folder, AttributeProto(name="alpha", type=AttributeProto.TENSOR, f=0.5))


@kind("has no value")
def a_graph_that_is_not_there(folder: Path) -> Path:
    return with_attributes(folder, AttributeProto(name="body", type=AttributeProto.GRAPH))


@kind("refers to an attribute of a function that is not around it")
def a_reference_to_no_function(folder: Path) -> Path:
    return with_attributes(folder, AttributeProto(name="alpha", type=AttributeProto.FLOAT, ref_attr_name="beta"))


# -- subgraphs ----------------------------------------------------------------------------------------------------
def with_branch(folder: Path, *nodes: NodeProto) -> Path:
    """An If whose condition is an input, with these nodes in both branches."""
    branch = helper.make_graph(nodes, "branch", [], [onnx.ValueInfoProto(name="o")])
    nodes_ = [node("If", "c", "y", then_branch=branch, else_branch=branch)]
    return saved(folder, model(nodes_, [X, C], ["y"]))


@kind("'z' is made by nothing")
def a_branch_that_dangles(folder: Path) -> Path:
    return with_branch(folder, node("Add", "x z", "o"))


@kind("output 'o' is made by nothing")
def a_branch_without_its_output(folder: Path) -> Path:
    return with_branch(folder, node("Relu", "x", "p"))


@kind("'o' is made twice")
def a_branch_that_makes_a_value_twice(folder: Path) -> Path:
    return with_branch(folder, node("Relu", "x", "o"), node("Abs", "x", "o"))


@kind("cycle")
def a_cycle_in_a_branch(folder: Path) -> Path:
    return with_branch(folder, node("Add", "x o", "p"), node("Relu", "p", "o"))


@kind("cycle")
def a_cycle_through_a_branch(folder: Path) -> Path:
    branch = helper.make_graph([node("Relu", "z", "o")], "branch", [], [onnx.ValueInfoProto(name="o")])
    nodes = [node("If", "c", "y", then_branch=branch, else_branch=branch), node("Relu", "y", "z")]
    return saved(folder, model(nodes, [X, C], ["y"]))


# -- functions ----------------------------------------------------------------------------------------------------
def function(name: str, *nodes: NodeProto, outputs: str = "b") -> FunctionProto:
    return helper.make_function("local", name, ["a"], outputs.split(), nodes, IMPORTS)


def call(name: str, argument: str = "a", result: str = "b") -> NodeProto:
    return node(name, argument, result, domain="local")


def with_functions(folder: Path, *functions: FunctionProto) -> Path:
    """A model that calls the first of them."""
    nodes = [call(functions[0].name, "x", "y")]
    return saved(folder, model(nodes, [X], ["y"], functions=functions, domains={"local": 1}))


@kind("calls itself")
def a_function_that_calls_itself(folder: Path) -> Path:
    return with_functions(folder, function("F", call("F")))


@kind("calls itself")
def functions_that_call_each_other(folder: Path) -> Path:
    return with_functions(folder, function("F", call("G")), function("G", call("H")), function("H", call("F")))


@kind("unfold into more than 250000 nodes")
def functions_that_double(folder: Path) -> Path:
    bodies = [function(f"F{i}", call(f"F{i + 1}", "a", "t"), call(f"F{i + 1}", "t", "b")) for i in range(64)]
    return with_functions(folder, *bodies, function("F64", node("Relu", "a", "b")))


@kind("nests too deep")
def functions_in_functions(folder: Path) -> Path:
    bodies = [function(f"F{i}", call(f"F{i + 1}")) for i in range(5_000)]
    return with_functions(folder, *bodies, function("F5000", node("Relu", "a", "b")))


@kind("function 'F' is given twice")
def a_function_twice(folder: Path) -> Path:
    return with_functions(folder, function("F", node("Relu", "a", "b")), function("F", node("Abs", "a", "b")))


@kind("function 'F' is overloaded")
def an_overloaded_function(folder: Path) -> Path:
    first, second = function("F", node("Relu", "a", "b")), function("F", node("Abs", "a", "b"))
    second.overload = "other"
    return with_functions(folder, first, second)


@kind("'z' is made by nothing")
def a_function_that_dangles(folder: Path) -> Path:
    return with_functions(folder, function("F", node("Add", "a z", "b")))


@kind("output 'b' is made by nothing")
def a_function_without_its_output(folder: Path) -> Path:
    return with_functions(folder, function("F", node("Relu", "a", "t")))


@kind("cycle")
def a_cycle_in_a_function(folder: Path) -> Path:
    return with_functions(folder, function("F", node("Add", "a b", "t"), node("Relu", "t", "b")))
