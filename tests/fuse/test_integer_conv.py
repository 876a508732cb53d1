"""Quantised convolutional networks, as onnxruntime's static quantisation writes them: bit for bit what it computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

import llmc
from benchmarks import conformance
from llmc.fuse import fuse
from llmc.graph import Editor
from llmc.importer import import_model
from llmc.quantize import quantize
from llmc.select import Plan, select
from llmc.targets.x86 import AVX2, AVX512
from tests.fuse.test_channels_last import Net

SHAPE = [2, 3, 17, 16]


class Images(CalibrationDataReader):
    def __init__(self) -> None:
        self.images: Iterator[dict[str, np.ndarray]] = iter([{"x": images(seed)} for seed in range(4)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.images, None)


def images(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(SHAPE, np.float32)


def network(path: Path) -> Path:
    net = Net()
    x = net.do("Relu", net.conv("x", 3, 8, 3, 3, pads=[1] * 4, strides=[2, 2]))
    x = net.do("MaxPool", x, kernel_shape=[3, 3], pads=[1] * 4, strides=[2, 2])
    y = net.do("Relu", net.conv(x, 8, 8, 3, 3, pads=[1] * 4, group=8))
    x = net.do("Relu", net.do("Add", net.conv(y, 8, 8, 1, 1), x))
    x = net.do("GlobalAveragePool", net.conv(x, 8, 20, 3, 3))
    x = net.do("Flatten", x, axis=1)
    return net.save(path, list(SHAPE), [net.do("Gemm", x, net.weight(5, 20), net.weight(5), transB=1)])


@pytest.fixture(scope="module", params=[QuantType.QUInt8, QuantType.QInt8], ids=["uint8", "int8"])
def quantised(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8")
    path = folder / "quantised.onnx"
    options = {"activation_type": request.param, "weight_type": QuantType.QInt8, "per_channel": True}
    quantize_static(network(folder / "net.onnx"), path, Images(), quant_format=QuantFormat.QOperator, **options)
    return path


def test_equals_onnxruntime(quantised: Path) -> None:
    llmc.compile(quantised).save(quantised.with_suffix(".llmc"))
    model = llmc.load(quantised.with_suffix(".llmc"))
    session = onnxruntime.InferenceSession(quantised, providers=["CPUExecutionProvider"])
    for seed in (10, 11):
        np.testing.assert_array_equal(model(x=images(seed)), session.run(None, {"x": images(seed)})[0])


def test_kernels_do_it(quantised: Path) -> None:
    """Bytes by VNNI where the target has it, else by way of floats; three channels never fill its steps of four."""
    graph = fuse(quantize(import_model(quantised), None))
    ops = Counter(node.op for node in graph.nodes)
    assert (ops["IntegerConv"], ops["Window"], ops["QLinearConv"], ops["Transpose"]) == (3, 2, 0, 1)
    unsigned = any(graph.types[node.inputs[0]].dtype == "uint8" for node in graph.nodes if node.op == "IntegerConv")
    for target, expected in ((AVX512, 2 if unsigned else 0), (AVX2, 0)):
        plan = select({"main": graph}, target)
        kernels = [k.template.name for kernels in plan.kernels.values() for k in kernels]
        assert kernels.count("integer_conv") == expected
        assert kernels.count("integer_conv") + kernels.count("conv") == 3


def test_the_rule_equals_onnxruntime(quantised: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conformance, "select", lambda functions, target: Plan(functions, {}))
    (function,) = conformance.build_functions([fuse(import_model(quantised))], AVX2)
    session = onnxruntime.InferenceSession(quantised, providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(function(images(13))[0], session.run(None, {"x": images(13)})[0])


def test_avx2_equals_onnxruntime(quantised: Path) -> None:
    path = quantised.with_suffix(".avx2.llmc")
    llmc.compile(quantised, target="x86-avx2").save(path)
    session = onnxruntime.InferenceSession(quantised, providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(llmc.load(path)(x=images(12)), session.run(None, {"x": images(12)})[0])


def test_sums_that_could_overflow_stay_integers(quantised: Path) -> None:
    edit = Editor(import_model(quantised))
    for node in edit.graph.nodes:
        if node.op == "QLinearConv":
            edit.constants[node.inputs[8]] = np.full_like(edit.constants[node.inputs[8]], 2**31 - 1)
    assert Counter(node.op for node in fuse(edit.finish()).nodes)["QLinearConv"] == 4
