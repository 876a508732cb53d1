"""Convolutional networks: what is left of them after the rewrites, and that they compute what onnxruntime does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

import llmc
from benchmarks import conformance
from llmc.fuse import fuse
from llmc.importer import import_model
from llmc.select import Plan
from llmc.targets.x86 import AVX2
from tests.graphs import Builder

MS = "com.microsoft"


class Net(Builder):
    """Writes one network; `conv` makes weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng(0)

    def weight(self, *shape: int) -> str:
        scale = np.float32(np.prod(shape[1:]) ** -0.5) if len(shape) > 1 else np.float32(0.1)
        return self.const(f"w{len(self.tensors)}", self.rng.standard_normal(shape, np.float32) * scale)

    def do(self, op: str, *inputs: str, **attrs: Any) -> str:
        return self.op(op, list(inputs), f"{op}{len(self.nodes)}", **attrs)

    def conv(self, x: str, C: int, N: int, *size: int, bias: bool = True, **attrs: Any) -> str:
        parts = [self.weight(N, C // attrs.get("group", 1), *size), *([self.weight(N)] if bias else [])]
        return self.do("Conv", x, *parts, **attrs)

    def batch_norm(self, x: str, C: int) -> str:
        variance = self.const(f"w{len(self.tensors)}", self.rng.uniform(0.5, 2, C).astype(np.float32))
        return self.do("BatchNormalization", x, *(self.weight(C) for _ in range(3)), variance, epsilon=1e-3)

    def scalar(self, value: float) -> str:
        return self.const(f"s{value}", value, np.float32)

    def relu6(self, x: str) -> str:
        return self.do("Clip", x, self.scalar(0), self.scalar(6))

    def save(self, path: Path, shape: list[int | str], outputs: list[str]) -> Path:
        image = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
        results = [onnx.ValueInfoProto(name=name) for name in outputs]
        constants = [onnx.numpy_helper.from_array(value, name) for name, value in self.tensors.items()]
        graph = helper.make_graph(self.nodes, "net", [image], results, constants)
        domains = [helper.make_opsetid("", 17), helper.make_opsetid(MS, 1)]
        onnx.save(helper.make_model(graph, opset_imports=domains, ir_version=8), path)
        return path


@dataclass(frozen=True)
class Case:
    """`build` writes a network that reads "x" and returns its outputs; `left` are the operators that stay, by name."""

    build: Callable[[Net], list[str]]
    shape: list[int | str]
    left: Mapping[str, int]
    sizes: list[tuple[int, ...]] = field(default_factory=list)


def residual(net: Net) -> list[str]:
    x = net.do("Relu", net.batch_norm(net.conv("x", 3, 8, 7, 7, strides=[2, 2], pads=[3] * 4, bias=False), 8))
    x = net.do("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    y = net.do("Relu", net.batch_norm(net.conv(x, 8, 8, 3, 3, pads=[1] * 4), 8))
    x = net.do("Relu", net.do("Add", net.batch_norm(net.conv(y, 8, 8, 3, 3, pads=[1] * 4), 8), x))
    y = net.do("Relu", net.conv(x, 8, 20, 3, 3, strides=[2, 2], pads=[1] * 4))
    x = net.do("Relu", net.do("Add", net.conv(x, 8, 20, 1, 1, strides=[2, 2]), net.conv(y, 20, 20, 3, 3, pads=[1] * 4)))
    x = net.do("Flatten", net.do("GlobalAveragePool", x))
    return [net.do("Gemm", x, net.weight(10, 20), net.weight(10), transB=1)]


def inverted(net: Net) -> list[str]:
    """Depthwise, squeeze and excite, the three spellings of hard swish, and a residual without activation."""
    x = net.relu6(net.conv("x", 3, 16, 3, 3, pads=[1] * 4, strides=[2, 2]))
    y = net.conv(x, 16, 40, 1, 1)
    y = net.do("Mul", y, net.do("HardSigmoid", y, alpha=1 / 6, beta=0.5))
    y = net.conv(y, 40, 40, 5, 5, pads=[2] * 4, group=40)
    three = net.relu6(net.do("Add", y, net.scalar(3)))
    y = net.do("Div", net.do("Mul", y, three), net.scalar(6))
    gate = net.do("Relu", net.conv(net.do("GlobalAveragePool", y), 40, 8, 1, 1))
    y = net.do("Mul", y, net.do("HardSigmoid", net.conv(gate, 8, 40, 1, 1), alpha=1 / 6, beta=0.5))
    x = net.do("Add", x, net.conv(y, 40, 16, 1, 1))
    return [net.do("ReduceMean", net.do("HardSwish", x), axes=[2, 3], keepdims=0)]


def pyramid(net: Net) -> list[str]:
    """What detectors and segmenters have between convolutions."""
    silu = net.conv("x", 3, 12, 3, 3, pads=[1] * 4)
    x = net.do("Mul", silu, net.do("Sigmoid", silu))
    a = net.op("Split", [x, net.ints(4, 8)], "split", outputs=["a", "b"], axis=1)
    small = net.do("AveragePool", "b", kernel_shape=[2, 2], strides=[2, 2])
    y = net.do("LeakyRelu", net.conv(small, 8, 6, 1, 1), alpha=0.1)
    up = net.do("Resize", y, "", net.const("scales", [1, 1, 2, 2], np.float32), mode="nearest")
    x = net.batch_norm(net.do("Concat", a, up, axis=1), 10)
    x = net.do("PRelu", x, net.const("slope", net.rng.uniform(0, 1, (10, 1, 1)), np.float32))
    x = net.do("Mul", x, net.const("per_channel", net.rng.uniform(0, 1, (1, 10, 1, 1)), np.float32))
    pooled = net.do("AveragePool", x, kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=1)
    floor = net.do("MaxPool", pooled, kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)
    heads = net.do("Reshape", net.conv(floor, 10, 6, 1, 1), net.ints(0, 6, -1))
    return [net.do("Transpose", heads, perm=[0, 2, 1]), net.do("Softmax", pooled, axis=1)]


def speech(net: Net) -> list[str]:
    """One spatial dimension, as in a speech encoder: convolutions, then positions as rows of matrices."""
    x = net.do("Relu", net.conv("x", 20, 24, 3, pads=[1, 1]))
    x = net.do("Tanh", net.conv(x, 24, 24, 3, pads=[1, 1], strides=[2], group=24))
    x = net.conv(x, 24, 36, 5, pads=[4, 0], dilations=[1], group=4)
    x = net.do("MaxPool", x, kernel_shape=[2], strides=[2])
    rows = net.do("Transpose", x, perm=[0, 2, 1])
    return [net.do("MatMul", rows, net.weight(36, 10))]


def from_channels_last(net: Net) -> list[str]:
    """As tf2onnx writes a network whose tensors have their channels last: every convolution between two transposes."""

    def conv(x: str, *shape: int, **attrs: Any) -> str:
        y = net.conv(net.do("Transpose", x, perm=[0, 3, 1, 2]), *shape, **attrs)
        return net.do("Transpose", y, perm=[0, 2, 3, 1])

    x = net.do("Relu", conv("x", 3, 8, 3, 3, strides=[2, 2], auto_pad="SAME_UPPER"))
    x = net.do("Add", conv(x, 8, 8, 3, 3, auto_pad="SAME_LOWER"), x)
    x = net.do("Pad", net.do("Transpose", x, perm=[0, 3, 1, 2]), net.ints(0, 0, 0, 1, 0, 0, 1, 0))
    x = net.do("Transpose", net.conv(x, 8, 8, 3, 3, group=8), perm=[0, 2, 3, 1])
    return [net.do("ReduceMean", x, axes=[1, 2], keepdims=0)]


def optimised(net: Net) -> list[str]:
    """As onnxruntime saves a model that it optimised."""
    x = net.op("FusedConv", ["x", net.weight(8, 3, 3, 3), net.weight(8)], "f1", domain=MS, activation="Relu")
    parts = [x, net.weight(8, 8, 3, 3), net.weight(8), x]
    x = net.op("FusedConv", parts, "f2", domain=MS, activation="Relu", pads=[1] * 4)
    attrs = {"activation": "LeakyRelu", "activation_params": [0.2]}
    return [net.op("FusedConv", [x, net.weight(5, 8, 1, 1)], "f3", domain=MS, **attrs)]


def vocoder(net: Net) -> list[str]:
    """Transposed convolutions of one dimension, as in speech synthesis: more taps than the stride, cut ends."""
    x = net.do("LeakyRelu", net.conv("x", 8, 12, 7, pads=[3, 3]), alpha=0.1)
    x = net.do("Tanh", net.do("ConvTranspose", x, net.weight(12, 6, 16), net.weight(6), strides=[8], pads=[4, 4]))
    return [net.do("ConvTranspose", x, net.weight(6, 5, 3), strides=[2], pads=[1, 0], output_padding=[1])]


def upsampling(net: Net) -> list[str]:
    """Transposed convolutions of images: of stride 1, 2 and unlike ones. What no kernel takes stays: groups."""
    x = net.do("ConvTranspose", net.conv("x", 3, 8, 1, 1), net.weight(8, 6, 2, 2), net.weight(6), strides=[2, 2])
    x = net.do("ConvTranspose", x, net.weight(6, 5, 3, 4), strides=[2, 3], pads=[1, 1, 0, 0])
    x = net.do("ConvTranspose", net.do("Relu", x), net.weight(5, 6, 3, 3), pads=[1, 1, 1, 1])
    return [net.do("ConvTranspose", x, net.weight(6, 1, 2, 2), group=3)]


def alone(net: Net) -> list[str]:
    """Weights that arrive with the data, places of maxima, three dimensions: all by their rules, beside a kernel."""
    kernels = net.do("Reshape", net.do("ReduceMean", "x", axes=[0], keepdims=1), net.ints(4, 3, 4, 3))
    y = net.do("Conv", "x", kernels)
    net.op("MaxPool", [net.conv("x", 3, 5, 1, 1)], "top", outputs=["top", "places"], kernel_shape=[2, 2])
    cubes = net.do("Unsqueeze", "x", net.ints(1))
    return [y, "top", "places", net.conv(cubes, 1, 2, 2, 2, 2)]


CASES = {
    "residual": Case(residual, ["n", 3, 32, 32], {"Conv": 6, "Window": 1, "Transpose": 1, "Add": 0}, [(2, 3, 32, 32)]),
    "inverted": Case(
        inverted,
        ["n", 3, "h", "w"],
        {"Conv": 5, "Window": 1, "Transpose": 1, "Activation": 0, "HardSigmoid": 1, "Mul": 1},
        [(1, 3, 16, 16), (2, 3, 33, 18), (1, 3, 1, 2)],
    ),
    "pyramid": Case(pyramid, [1, 3, 16, 24], {"Conv": 3, "Window": 3, "Transpose": 4}, [(1, 3, 16, 24)]),
    "speech": Case(speech, ["n", 20, "t"], {"Conv": 2, "Window": 2, "Transpose": 1}, [(1, 20, 8), (3, 20, 51)]),
    "from_channels_last": Case(
        from_channels_last, [1, 15, 14, 3], {"Conv": 2, "Window": 1, "Transpose": 0}, [(1, 15, 14, 3)]
    ),
    "optimised": Case(optimised, ["n", 3, 9, 9], {"Conv": 3, "Transpose": 2, "Add": 0}, [(2, 3, 9, 9)]),
    "vocoder": Case(vocoder, ["n", 8, "t"], {"Conv": 3, "ConvTranspose": 0}, [(1, 8, 5), (2, 8, 33)]),
    "upsampling": Case(upsampling, ["n", 3, "h", "w"], {"Conv": 4, "ConvTranspose": 1}, [(1, 3, 4, 5), (2, 3, 7, 3)]),
    "alone": Case(alone, ["n", 3, 12, 4], {"Conv": 3, "MaxPool": 1}, [(2, 3, 12, 4)]),
}


@pytest.fixture(params=CASES, scope="module")
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path]:
    case = CASES[request.param]
    net = Net()
    outputs = case.build(net)
    return case, net.save(tmp_path_factory.mktemp("nets") / "net.onnx", case.shape, outputs)


def test_equals_onnxruntime(saved: tuple[Case, Path]) -> None:
    case, path = saved
    llmc.compile(path).save(path.with_suffix(".llmc"))
    model = llmc.load(path.with_suffix(".llmc"))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for seed, size in enumerate(case.sizes):
        x = np.random.default_rng(seed).standard_normal(size, np.float32)
        got = model.main({"x": x})
        for info, want in zip(session.get_outputs(), session.run(None, {"x": x}), strict=True):
            np.testing.assert_allclose(got[info.name], want, rtol=0, atol=2e-6 * max(1.0, float(np.abs(want).max())))


def test_what_is_left(saved: tuple[Case, Path]) -> None:
    case, path = saved
    ops = Counter(node.op for node in fuse(import_model(path)).nodes)
    assert {op: ops[op] for op in case.left} == case.left
    assert not ops["BatchNormalization"]


def test_rules_compute_what_kernels_do(saved: tuple[Case, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a target has no kernels for is left to the fused operators' rules."""
    case, path = saved
    monkeypatch.setattr(conformance, "select", lambda functions, target: Plan(functions, {}))
    graph = fuse(import_model(path))
    (function,) = conformance.build_functions([graph], AVX2)
    x = np.random.default_rng(7).standard_normal(case.sizes[0], np.float32)
    wanted = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    for got, want in zip(function(x), wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * max(1.0, float(np.abs(want).max())))
