"""LSTM, GRU and RNN: which become a `Linear` and a `Recurrent`, and that these compute what onnxruntime does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import llmc
from llmc.fuse import fuse
from llmc.importer import import_model

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
WIDTH = 10
RNG = np.random.default_rng(0)


class Layers:
    """A model of layers that all read x [steps, batch, WIDTH]; their outputs are the model's."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.states: dict[str, list[int | str]] = {}

    def weight(self, *shape: int) -> str:
        name = f"w{len(self.weights)}"
        values = RNG.standard_normal(shape, np.float32) / np.float32(shape[-1] ** 0.5)
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def state(self, directions: int, hidden: int) -> str:
        name = f"s{len(self.states)}"
        self.states[name] = [directions, "batch", hidden]
        return name

    def add(
        self, op: str, hidden: int = 21, *, bias: bool = True, initial: bool = False, outputs: str = "all", **attrs: Any
    ) -> Layers:
        D, G, n = 2 if attrs.get("direction") == "bidirectional" else 1, GATES[op], len(self.nodes)
        inputs = ["x", self.weight(D, G * hidden, WIDTH), self.weight(D, G * hidden, hidden)]
        inputs += [self.weight(D, 2 * G * hidden) if bias else "", ""]
        if initial:
            inputs += [self.state(D, hidden) for _ in range(2 if op == "LSTM" else 1)]
        names = [f"y{n}", f"h{n}", f"c{n}"][: 3 if op == "LSTM" else 2]
        if outputs == "last":
            names = ["", names[1]]
        self.nodes.append(helper.make_node(op, inputs, names, f"layer{n}", hidden_size=hidden, **attrs))
        return self

    def model(self) -> onnx.ModelProto:
        shapes = {"x": ["steps", "batch", WIDTH], **self.states}
        inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]
        outputs = [onnx.ValueInfoProto(name=o) for node in self.nodes for o in node.output if o]
        graph = helper.make_graph(self.nodes, "layers", inputs, outputs, self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

    def save(self, folder: Path) -> Path:
        onnx.save(self.model(), folder / "model.onnx")
        return folder / "model.onnx"


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """One model with every kind of layer, compiled, and as onnxruntime has it."""
    layers = (
        Layers()
        .add("LSTM", direction="bidirectional", initial=True)
        .add("LSTM", 16, bias=False, outputs="last")
        .add("GRU", direction="reverse", linear_before_reset=1)
        .add("GRU", bias=False, linear_before_reset=1, initial=True, direction="bidirectional")
        .add("GRU", 35, direction="bidirectional")
        .add("RNN", initial=True, activations=["Tanh"], direction="reverse")
        .add("LSTM", activations=["HardSigmoid", "Tanh", "Tanh"])  # by rule
    )
    path = layers.save(tmp_path_factory.mktemp("recurrent"))
    counts = [n.op for n in fuse(import_model(path)).nodes]
    assert (counts.count("Recurrent"), counts.count("Linear"), counts.count("LSTM")) == (6, 6, 1)
    llmc.compile(path, target="x86-avx2").save(path.with_suffix(".llmc"))
    return llmc.load(path.with_suffix(".llmc")), onnxruntime.InferenceSession(path.read_bytes())


@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (6, 1), (2, 5), (9, 14)])
def test_equals_onnxruntime(both: tuple[Any, Any], steps: int, batch: int) -> None:
    ours, theirs = both
    sizes = {"steps": steps, "batch": batch}
    inputs = {i.name: RNG.standard_normal([sizes.get(d, d) for d in i.shape], np.float32) for i in theirs.get_inputs()}
    got = ours(inputs)
    for output, want in zip(theirs.get_outputs(), theirs.run(None, inputs), strict=True):
        np.testing.assert_allclose(got[output.name], want, rtol=0, atol=2e-6, err_msg=output.name)


@pytest.mark.parametrize(
    "attrs",
    [
        {"clip": 0.5},
        {"input_forget": 1},
        {"activations": ["Sigmoid", "Relu", "Tanh"]},
    ],
    ids=lambda attrs: next(iter(attrs)),
)
def test_rarer_attributes_are_left_to_the_rule(tmp_path: Path, attrs: dict[str, Any]) -> None:
    graph = fuse(import_model(Layers().add("LSTM", **attrs).save(tmp_path)))
    assert [n.op for n in graph.nodes] == ["LSTM"]


@pytest.mark.parametrize("place", [4, 7], ids=["lengths", "peepholes"])
def test_rarer_inputs_are_left_to_the_rule(tmp_path: Path, place: int) -> None:
    layers = Layers().add("LSTM")
    extra = {4: np.array([2], np.int32), 7: np.zeros((1, 3 * 21), np.float32)}[place]
    layers.weights.append(numpy_helper.from_array(extra, "extra"))
    node = layers.nodes[0]
    names = [*node.input, *[""] * (place + 1 - len(node.input))]
    names[place] = "extra"
    del node.input[:]
    node.input.extend(names)
    assert [n.op for n in fuse(import_model(layers.save(tmp_path))).nodes] == ["LSTM"]


def test_weights_that_are_inputs_are_left_to_the_rule(tmp_path: Path) -> None:
    layers = Layers().add("RNN")
    layers.states["w1"] = [1, 21, 21]
    layers.weights = [w for w in layers.weights if w.name != "w1"]
    assert [n.op for n in fuse(import_model(layers.save(tmp_path))).nodes] == ["RNN"]
