"""What is no plain decoder, under the emulated driver: images, recurrent layers, caches in E4M3, drawn tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto

from llmc.emulator import driver
from llmc.emulator.emulator import available
from llmc.pipeline import compile
from llmc.schedules.sampling.sample import reference as sampled
from tests.cuda_emulator.child import emulated
from tests.cuda_emulator.test_models import SHAPE, Call, check_session, compare, loaded, tolerance
from tests.gpu.tools import needs_compiler
from tests.graphs import Builder, Decoder

pytestmark = [
    needs_compiler,
    pytest.mark.slow,
    pytest.mark.skipif(not available(), reason="no g++ 12 for x86-64"),
]


@pytest.fixture(scope="module")
def gpu() -> Iterator[Call]:
    with emulated() as call:
        yield call


def images(path: Path) -> Path:
    """A residual block, a depthwise convolution with a stride, poolings, a classifier."""
    b, rng = Builder(), np.random.default_rng(0)

    def conv(x: str, name: str, N: int, C: int, taps: int, **attrs: object) -> str:
        weight = b.const(f"{name}.w", rng.standard_normal((N, C, taps, taps)) / (C * taps**2) ** 0.5, np.float32)
        bias = b.const(f"{name}.b", rng.standard_normal(N), np.float32)
        return b.op("Conv", [x, weight, bias], name, pads=[taps // 2] * 4, **attrs)

    x = b.input("x", TensorProto.FLOAT, ["batch", 3, 12, 12])
    x = b.op("Relu", [conv(x, "first", 8, 3, 3)], "relu")
    y = b.op("Relu", [conv(x, "one", 8, 8, 3)], "relu1")
    x = b.op("Relu", [b.op("Add", [conv(y, "two", 8, 8, 3), x], "sum")], "relu2")
    x = conv(x, "depthwise", 8, 1, 3, group=8, strides=[2, 2])
    x = b.op("Clip", [x, b.const("zero", 0, np.float32), b.const("six", 6, np.float32)], "relu6")
    x = b.op("MaxPool", [conv(x, "narrow", 16, 8, 1)], "max", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    x = b.op("Flatten", [b.op("GlobalAveragePool", [x], "mean")], "flat")
    head = [b.const("head.w", rng.standard_normal((16, 10)), np.float32), b.const("head.b", np.ones(10), np.float32)]
    b.op("Gemm", [x, *head], "logits")
    b.output("logits", TensorProto.FLOAT, ["batch", 10])
    return b.save(path, 17)


def recurrent(path: Path) -> Path:
    """An LSTM in both directions, then a GRU."""
    b, rng, H = Builder(), np.random.default_rng(0), 20

    def weights(name: str, directions: int, rows: int, width: int) -> list[str]:
        shapes = {"w": (directions, rows, width), "r": (directions, rows, H), "b": (directions, 2 * rows)}
        return [b.const(f"{name}.{k}", rng.standard_normal(s) / 5, np.float32) for k, s in shapes.items()]

    x = b.input("x", TensorProto.FLOAT, ["steps", "batch", 6])
    y = b.op("LSTM", [x, *weights("lstm", 2, 4 * H, 6)], "lstm", hidden_size=H, direction="bidirectional")
    y = b.op("Transpose", [y], "turned", perm=[0, 2, 1, 3])
    y = b.op("Reshape", [y, b.ints(0, 0, -1)], "both")
    b.op("GRU", [y, *weights("gru", 1, 3 * H, 2 * H)], "gru", outputs=["", "last"], hidden_size=H)
    b.output("last", TensorProto.FLOAT, [1, "batch", H])
    return b.save(path, 17)


def test_images(gpu: Call, tmp_path: Path) -> None:
    path = images(tmp_path / "m.onnx")
    compile(path, target="cuda-sm80").save(tmp_path / "m.llmc")
    feeds = {"x": np.random.default_rng(1).standard_normal((2, 3, 12, 12), np.float32)}
    compare(gpu, tmp_path / "m.llmc", path, feeds, tolerance("float32"))


def test_recurrent_layers(gpu: Call, tmp_path: Path) -> None:
    path = recurrent(tmp_path / "m.onnx")
    manifest = compile(path, target="cuda-sm80").save(tmp_path / "m.llmc")
    assert [k.template for k in manifest.kernels].count("recurrent_cuda") == 2
    feeds = {"x": np.random.default_rng(1).standard_normal((5, 3, 6), np.float32)}
    compare(gpu, tmp_path / "m.llmc", path, feeds, tolerance("float32"))


def drawn(path: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    with driver.judged():
        return loaded(path).functions["sample"](inputs)["token"]


def test_a_decoder_with_a_cache_in_e4m3_draws_tokens(gpu: Call, tmp_path: Path) -> None:
    Decoder(SHAPE).std23(tmp_path / "m.onnx")
    compile(tmp_path / "m.onnx", target="cuda-sm80", kv_cache="fp8").save(tmp_path / "m.llmc")
    # A code is off by a sixteenth of its number at most; int8's bound is of the largest number, which this is too.
    check_session(gpu, tmp_path / "m.llmc", tmp_path / "m.onnx", 1 / 16)
    rng = np.random.default_rng(2)
    inputs = {
        "logits": rng.standard_normal((3, SHAPE.vocab), np.float32),
        "temperature": np.array([0, 0.7, 1], np.float32),
        "top_k": np.array([0, 9, 0]),
        "top_p": np.array([1, 1, 0.8], np.float32),
        "uniform": rng.random(3, np.float32),
    }
    np.testing.assert_array_equal(gpu(drawn, tmp_path / "m.llmc", inputs), sampled(inputs)["token"])
