"""Convolutional networks against onnxruntime and OpenVINO in one interleaved run: graphs like ResNet and MobileNet.

    python benchmarks/vision.py [--models resnet50,mobilenet_v2] [--int8 QOperator] [--json]

Weights are random: times do not depend on them. Graphs are written as exporters of trained networks write them, batch
norms folded. Times are ms a call of one image, least and median of the rounds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

import llmc
from llmc.bench import Contestant, Result, Task, compare
from llmc.engines import open_engine


class Network:
    """Writes a graph of convolutions; every method adds operators after the value `x` and returns the new value."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    def constant(self, value: np.ndarray) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(value, name))
        return name

    def conv(self, x: str, C: int, N: int, k: int, stride: int = 1, groups: int = 1) -> str:
        fan_in = C // groups * k * k
        weight = self.rng.standard_normal((N, C // groups, k, k), np.float32) * np.float32((2 / fan_in) ** 0.5)
        bias = self.rng.standard_normal(N, np.float32) * np.float32(0.1)
        pads, strides = [k // 2] * 4, [stride] * 2
        parts = (self.constant(weight), self.constant(bias))
        return self.op("Conv", x, *parts, kernel_shape=[k, k], pads=pads, strides=strides, group=groups)

    def relu6(self, x: str) -> str:
        return self.op("Clip", x, self.constant(np.float32(0)), self.constant(np.float32(6)))

    def classifier(self, x: str, C: int) -> str:
        x = self.op("Flatten", self.op("GlobalAveragePool", x), axis=1)
        weight = self.rng.standard_normal((1000, C), np.float32) * np.float32(C**-0.5)
        return self.op("Gemm", x, self.constant(weight), self.constant(np.zeros(1000, np.float32)), transB=1)

    def model(self, y: str) -> onnx.ModelProto:
        image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 224, 224])
        logits = helper.make_tensor_value_info(y, TensorProto.FLOAT, [1, 1000])
        graph = helper.make_graph(self.nodes, "network", [image], [logits], self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def resnet(depths: Sequence[int], bottleneck: bool) -> onnx.ModelProto:
    """He et al., "Deep Residual Learning for Image Recognition": ResNet-18 and -34 of basic blocks, -50 of bottlenecks,
    with the stride at the 3x3 convolution."""
    net = Network()
    x = net.op("Relu", net.conv("image", 3, 64, 7, 2))
    x = net.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    C = 64
    for stage, depth in enumerate(depths):
        width = 64 << stage
        out = width * 4 if bottleneck else width
        for i in range(depth):
            stride = 2 if stage and not i else 1
            shortcut = net.conv(x, C, out, 1, stride) if stride > 1 or out != C else x
            if bottleneck:
                y = net.op("Relu", net.conv(x, C, width, 1))
                y = net.conv(net.op("Relu", net.conv(y, width, width, 3, stride)), width, out, 1)
            else:
                y = net.conv(net.op("Relu", net.conv(x, C, width, 3, stride)), width, out, 3)
            x, C = net.op("Relu", net.op("Add", y, shortcut)), out
    return net.model(net.classifier(x, C))


def mobilenet_v2() -> onnx.ModelProto:
    """Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks"."""
    net = Network()
    x, C = net.relu6(net.conv("image", 3, 32, 3, 2)), 32
    table = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    for expand, out, depth, first in table:
        for i in range(depth):
            stride, wide = first if i == 0 else 1, C * expand
            y = net.relu6(net.conv(x, C, wide, 1)) if expand > 1 else x
            y = net.conv(net.relu6(net.conv(y, wide, wide, 3, stride, wide)), wide, out, 1)
            x, C = net.op("Add", x, y) if stride == 1 and out == C else y, out
    return net.model(net.classifier(net.relu6(net.conv(x, C, 1280, 1)), 1280))


def mobilenet_v3() -> onnx.ModelProto:
    """Howard et al., "Searching for MobileNetV3", the small network: squeeze and excite, hard swish."""
    net = Network()

    def act(x: str, swish: bool) -> str:
        return net.op("HardSwish", x) if swish else net.op("Relu", x)

    def excite(x: str, C: int) -> str:
        y = net.op("Relu", net.conv(net.op("GlobalAveragePool", x), C, C // 4 // 8 * 8 or 8, 1))
        gate = net.op("HardSigmoid", net.conv(y, C // 4 // 8 * 8 or 8, C, 1), alpha=1 / 6, beta=0.5)
        return net.op("Mul", x, gate)

    x, C = act(net.conv("image", 3, 16, 3, 2), True), 16
    table = [
        *(
            (3, 16, 16, 1, 0, 2),
            (3, 72, 24, 0, 0, 2),
            (3, 88, 24, 0, 0, 1),
            (5, 96, 40, 1, 1, 2),
            (5, 240, 40, 1, 1, 1),
        ),
        *((5, 240, 40, 1, 1, 1), (5, 120, 48, 1, 1, 1), (5, 144, 48, 1, 1, 1), (5, 288, 96, 1, 1, 2)),
        *((5, 576, 96, 1, 1, 1), (5, 576, 96, 1, 1, 1)),
    ]
    for k, wide, out, squeeze, swish, stride in table:
        y = act(net.conv(x, C, wide, 1), bool(swish)) if wide != C else x
        y = act(net.conv(y, wide, wide, k, stride, wide), bool(swish))
        y = net.conv(excite(y, wide) if squeeze else y, wide, out, 1)
        x, C = net.op("Add", x, y) if stride == 1 and out == C else y, out
    return net.model(net.classifier(act(net.conv(x, C, 576, 1), True), 576))


MODELS: dict[str, Callable[[], onnx.ModelProto]] = {
    "resnet18": lambda: resnet((2, 2, 2, 2), False),
    "resnet50": lambda: resnet((3, 4, 6, 3), True),
    "mobilenet_v2": mobilenet_v2,
    "mobilenet_v3": mobilenet_v3,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=21)
    parser.add_argument("--int8", choices=("QOperator", "QDQ"), help="let onnxruntime quantise the models first")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(arguments)
    if unknown := set(args.models.split(",")) - set(MODELS):
        parser.error(f"no model is called {', '.join(sorted(unknown))}; known: {', '.join(MODELS)}")
    image = np.random.default_rng(1).standard_normal((1, 3, 224, 224), np.float32)
    found: dict[str, Any] = {}
    for name in args.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            path, artifact = Path(folder) / "model.onnx", Path(folder) / "model.llmc"
            onnx.save(MODELS[name](), path)
            if args.int8:
                path = _quantised(path, args.int8)
            llmc.compile(path).save(artifact)
            contestants = [
                Contestant("llmc", artifact),
                Contestant("onnxruntime", path),
                Contestant("openvino", path),
            ]
            found[name] = _times(contestants, image, args.threads, args.repeat)
            if not args.json:
                _show(name, found[name])
    if args.json:
        json.dump(found, sys.stdout, indent=1)
    return 0


class _Images(CalibrationDataReader):
    """Two random images to find the ranges of activations with."""

    def __init__(self) -> None:
        rng = np.random.default_rng(2)
        self.left = [{"image": rng.standard_normal((1, 3, 224, 224), np.float32)} for _ in range(2)]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self.left.pop() if self.left else None


def _quantised(path: Path, kind: str) -> Path:
    """uint8 activations and int8 weights with a scale for each output, as operators on integers or as Q/DQ pairs."""
    made = path.with_suffix(f".{kind}.onnx")
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(path, made, _Images(), quant_format=QuantFormat[kind], per_channel=True, **types)
    return made


def _times(contestants: Sequence[Contestant], image: np.ndarray, threads: int, repeat: int) -> dict[str, Any]:
    """ms of each engine, {"least": ..., "median": ..., "error": largest difference from onnxruntime's logits}."""
    feeds = {"image": image}
    task = Task("image", inputs=feeds)
    results = compare(contestants, [task], threads=threads, repeat=repeat, vocabulary=1)
    exact = _logits(contestants[1], feeds, threads)
    times: dict[str, Any] = {}
    for c in contestants:
        result = results[c.name]
        if isinstance(result, Result):
            error = float(np.abs(_logits(c, feeds, threads) - exact).max() / np.abs(exact).max())
            figure = result.figures[task.name]
            times[c.name] = {"least": figure.low, "median": figure.median, "error": error}
    return times


def _logits(c: Contestant, feeds: dict[str, np.ndarray], threads: int) -> np.ndarray:
    return next(iter(open_engine(c.engine, c.path, threads).call(feeds).values()))


def _show(model: str, times: dict[str, Any]) -> None:
    for engine, t in times.items():
        ratio = times["llmc"]["least"] / t["least"]
        print(
            f"{model:14}{engine:12} {t['least']:8.2f} {t['median']:8.2f} ms  ratio {ratio:5.2f}  error {t['error']:.1e}"
        )


if __name__ == "__main__":
    raise SystemExit(main())
