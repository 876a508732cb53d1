"""What quantisers and optimisers write: onnxruntime's quantisers are run here; the int4 blocks of Olive, Quark and
neural-compressor, the layers of onnxruntime-genai's builder, and what onnxruntime optimises are spelled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

from tests.exporters.motif import Motif, encoder_feeds, weights
from tests.graphs import F32, I64, MS, Builder, Decoder, Shape, decoder_feeds

K, BLOCK, VOCAB = 32, 16, 37


def perceptron(path: Path) -> Path:
    """x [batch, 32] → two layers, the first with ReLU."""
    g, rng = Builder(), np.random.default_rng(3)
    g.input("x", F32, ["batch", K])
    g.output("y", F32, ["batch", 7])
    h = g.op("MatMul", ["x", g.const("w1", weights(rng, K, 48))], "h")
    h = g.op("Relu", [g.op("Add", [h, g.const("b1", weights(rng, 48))], "hb")], "r")
    g.op("Add", [g.op("MatMul", [h, g.const("w2", weights(rng, 48, 7))], "o"), g.const("b2", weights(rng, 7))], "y")
    return g.save(path, 17)


def pictures(path: Path) -> Path:
    """x [batch, 3, 8, 8] → a convolution, a pool, a layer."""
    g, rng = Builder(), np.random.default_rng(4)
    g.input("x", F32, ["batch", 3, 8, 8])
    g.output("y", F32, ["batch", 7])
    kernel, bias = g.const("w1", weights(rng, 8, 3, 3, 3)), g.const("b1", weights(rng, 8))
    h = g.op("Relu", [g.op("Conv", ["x", kernel, bias], "c", kernel_shape=[3, 3], pads=[1] * 4)], "r")
    h = g.op("Flatten", [g.op("MaxPool", [h], "p", kernel_shape=[4, 4], strides=[4, 4])], "f", axis=1)
    g.op("Gemm", [h, g.const("w2", weights(rng, 7, 32)), g.const("b2", weights(rng, 7))], "y", transB=1)
    return g.save(path, 17)


class _Samples(CalibrationDataReader):
    def __init__(self, feeds: Callable[[int], dict[str, np.ndarray]]) -> None:
        self.left = [feeds(run) for run in range(2)]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self.left.pop() if self.left else None


def dynamic(path: Path) -> Path:
    """onnxruntime's quantize_dynamic."""
    quantize_dynamic(perceptron(path.with_suffix(".float.onnx")), path, weight_type=QuantType.QInt8)
    return path


def static(path: Path, format: QuantFormat) -> Path:
    """onnxruntime's quantize_static: a scale for each channel in QDQ, one for all in operators on integers."""
    source, per_channel = pictures(path.with_suffix(".float.onnx")), format is QuantFormat.QDQ
    quantize_static(source, path, _Samples(_pictures), quant_format=format, per_channel=per_channel)
    return path


def optimised(path: Path) -> Path:
    """A BERT layer after onnxruntime's optimiser: Attention with the mask as it came, SkipLayerNormalization that adds
    the layer's bias, BiasGelu."""
    g, rng, E = Builder(), np.random.default_rng(7), 32
    g.input("input_ids", I64, ["batch", "seq"])
    g.input("attention_mask", I64, ["batch", "seq"])
    g.output("hidden", F32, ["batch", "seq", E])
    weight = lambda *shape: g.const(f"w{len(g.tensors)}", weights(rng, *shape))  # noqa: E731

    def skip(product: str, x: str, name: str) -> str:
        inputs = [product, x, weight(E), weight(E), weight(E)]
        return g.op("SkipLayerNormalization", inputs, name, domain=MS, epsilon=1e-12)

    mask = g.op("Cast", ["attention_mask"], "mask", to=TensorProto.INT32)
    x = g.op("Gather", [weight(VOCAB, E), "input_ids"], "embedded")
    x = g.op("LayerNormalization", [x, weight(E), weight(E)], "norm", axis=-1, epsilon=1e-12)
    attended = g.op("Attention", [x, weight(E, 3 * E), weight(3 * E), mask], "attended", domain=MS, num_heads=4)
    x = skip(g.op("MatMul", [attended, weight(E, E)], "o"), x, "skip")
    up = g.op("BiasGelu", [g.op("MatMul", [x, weight(E, 48)], "up"), weight(48)], "gelu", domain=MS)
    skip(g.op("MatMul", [up, weight(48, E)], "down"), x, "hidden")
    return g.save(path, 17)


def rounded(w: np.ndarray, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    """(integers [K, N], scales [K/16, N]) of a weight [K, N] in blocks of 16 rows."""
    blocks = w.reshape(-1, BLOCK, w.shape[1])
    scales = np.maximum(np.abs(blocks).max(1), 1e-6) / high
    q = np.clip(np.rint(blocks / scales[:, None]), low, high).astype(np.int8)
    return q.reshape(w.shape), scales.astype(np.float32)


def blocks(path: Path, turned: bool) -> Path:
    """DequantizeLinear of int4 in blocks, of the weight as MatMul reads it, or `turned` and followed by a Transpose."""
    rng = np.random.default_rng(5)
    q, scales = rounded(weights(rng, K, 48), -8, 7)
    q, scales = (q.T, scales.T) if turned else (q, scales)
    points = np.zeros(scales.shape, ml_dtypes.int4)
    tensors = [
        numpy_helper.from_array(np.ascontiguousarray(q).astype(ml_dtypes.int4), "w"),
        numpy_helper.from_array(np.ascontiguousarray(scales), "scale"),
        numpy_helper.from_array(points, "zero_point"),
    ]
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "scale", "zero_point"], ["wf"], axis=int(turned), block_size=BLOCK),
        *([helper.make_node("Transpose", ["wf"], ["wt"], perm=[1, 0])] if turned else []),
        helper.make_node("MatMul", ["x", "wt" if turned else "wf"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", K])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 48])
    graph = helper.make_graph(nodes, "blocks", [x], [y], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


class FourBits(Decoder):
    """The builder's int4 decoder: MatMulNBits for every layer, with integer products allowed (accuracy_level 4)."""

    def _matmul(self, g: Builder, x: str, name: str, weight: np.ndarray) -> str:
        q, scales = rounded(np.ascontiguousarray(weight.T), -8, 7)
        codes = (q + 8).astype(np.uint8).T.reshape(weight.shape[0], -1, BLOCK)
        packed = g.const(f"{name}.qweight", codes[..., ::2] | (codes[..., 1::2] << 4))
        inputs = [x, packed, g.const(f"{name}.scales", np.ascontiguousarray(scales.T))]
        sizes = {"K": weight.shape[1], "N": weight.shape[0], "bits": 4, "block_size": BLOCK, "accuracy_level": 4}
        return g.op("MatMulNBits", inputs, name, domain=MS, **sizes)


SHAPE = Shape(layers=1, hidden=32, inner=48, heads=4, kv_heads=2, head_dim=16, vocab=VOCAB)


def _rows(run: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(run).standard_normal(((4, K), (1, K))[run]).astype(np.float32)}


def _pictures(run: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(run).standard_normal(((2, 3, 8, 8), (1, 3, 8, 8))[run]).astype(np.float32)}


def _genai(run: int) -> dict[str, np.ndarray]:
    feeds = decoder_feeds(SHAPE, *((1, 5, 0), (2, 1, 7))[run])
    del feeds["position_ids"]
    return feeds


MOTIFS = (
    Motif("quantize-dynamic", dynamic, _rows, {"Linear": 2}, ("MatMulInteger", "Relu"), cosine=0.999),
    Motif(
        *("quantize-static-qdq", lambda path: static(path, QuantFormat.QDQ), _pictures, {"Linear": 1}, ("Gemm",)),
        cosine=0.99,
    ),
    Motif("quantize-static-operators", lambda path: static(path, QuantFormat.QOperator), _pictures, cosine=0.99),
    Motif(
        *("transformers-optimiser", optimised, lambda run: encoder_feeds(run, VOCAB)),
        {"Embedding": 1, "Norm": 3, "Linear": 4, "Attention": 1},
        ("BiasGelu", "SkipLayerNormalization", "MatMul"),
    ),
    Motif("int4-blocks", lambda path: blocks(path, False), _rows, {"Linear": 1}, ("MatMul", "DequantizeLinear")),
    Motif("int4-blocks-turned", lambda path: blocks(path, True), _rows, {"Linear": 1}, ("MatMul", "DequantizeLinear")),
    Motif(
        *("genai-int4", lambda path: FourBits(SHAPE).genai(path), _genai),
        {"Embedding": 3, "Norm": 3, "Linear": 5, "Attention": 1},  # cosines and sines are looked up, too
        ("MatMulNBits", "GroupQueryAttention"),
        cosine=0.999,
        slow=True,
    ),
)
