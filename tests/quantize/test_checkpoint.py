"""Weights that arrive quantised are kept: what llmc holds, multiplied in float, is what onnxruntime computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from llmc.graph import Graph
from llmc.importer import import_model
from llmc.quantize import quantize
from llmc.schedules.formats import QuantizedWeight
from tests.graphs import F32, MS, Builder

N, K = 24, 96


def start(rank: int = 2) -> tuple[Builder, np.ndarray]:
    g = Builder()
    g.input("x", F32, ["m", K] if rank == 2 else ["b", "m", K])
    g.output("y", F32, ["m", N] if rank == 2 else ["b", "m", N])
    return g, np.random.default_rng(1).standard_normal((5, K)).astype(np.float32)


def check(path: Path, x: np.ndarray, tolerance: float = 1e-5) -> QuantizedWeight:
    """The one linear layer in the imported model, after its float product was compared with onnxruntime's result."""
    graph = quantize(import_model(path), None)
    layer = only_linear(graph)
    weight = graph.constants[layer.inputs[1]]
    assert isinstance(weight, QuantizedWeight)
    y = x @ weight.dequantize().T
    if layer.inputs[2]:
        y = y + np.asarray(graph.constants[layer.inputs[2]])
    expected = session(path).run(None, {"x": x})[0]
    np.testing.assert_allclose(y, expected, atol=tolerance * np.abs(expected).max())
    return weight


def session(path: Path) -> onnxruntime.InferenceSession:
    """onnxruntime without its rewrites: it would replace DequantizeLinear and MatMul by a product with int8 inputs."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(path, options)


def only_linear(graph: Graph):  # type: ignore[no-untyped-def]
    assert [n.op for n in graph.nodes if n.op != "Clip"] == ["Linear"], str(graph)
    return next(n for n in graph.nodes if n.op == "Linear")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero", ["none", "packed", "float"])
@pytest.mark.parametrize("block", [16, 32, 64])
def test_matmul_nbits(tmp_path: Path, bits: int, zero: str, block: int) -> None:
    if bits == 8 and zero == "float":
        pytest.skip("onnxruntime takes float zero points for 4 bits only")
    rng, (g, x) = np.random.default_rng(bits), start()
    blocks = -(-K // block)
    codes = rng.integers(0, 256, (N, blocks, block * bits // 8), dtype=np.uint8)
    inputs = ["x", g.const("codes", codes), g.const("scales", rng.random((N, blocks)) + 0.1, np.float32)]
    if zero == "packed":
        inputs.append(g.const("zeros", rng.integers(0, 256, (N, -(-blocks * bits // 8)), dtype=np.uint8)))
    elif zero == "float":
        inputs.append(g.const("zeros", rng.random((N, blocks)) * 15, np.float32))
    g.op("MatMulNBits", inputs, "y", domain=MS, N=N, K=K, bits=bits, block_size=block)
    weight = check(g.save(tmp_path / "m.onnx", 17), x)
    assert weight.bits == bits and weight.group_size == block
    assert weight.symmetric == (zero == "none")


def test_matmul_nbits_of_two_bits(tmp_path: Path) -> None:
    g, x = start()
    rng = np.random.default_rng(0)
    packed = rng.integers(0, 256, (N, K // 32, 8), np.uint8)
    scales = rng.uniform(0.5, 1.5, (N * K // 32,)).astype(np.float32)
    zeros = rng.integers(0, 256, (N, 1), np.uint8)
    inputs = ["x", g.const("w", packed), g.const("s", scales), g.const("z", zeros)]
    g.op("MatMulNBits", inputs, "y", domain=MS, K=K, N=N, bits=2, block_size=32)
    assert check(g.save(tmp_path / "m.onnx", 17), x).bits == 2


def test_normal_floats_of_bitsandbytes(tmp_path: Path) -> None:
    g, x = start()
    rng = np.random.default_rng(0)
    packed = rng.integers(0, 256, (N * K // 2,), np.uint8)
    scales = rng.uniform(0.5, 1.5, (N * K // 32,)).astype(np.float32)
    inputs = ["x", g.const("w", packed), g.const("absmax", scales)]
    g.op("MatMulBnb4", inputs, "y", domain=MS, K=K, N=N, block_size=32, quant_type=1)
    weight = check(g.save(tmp_path / "m.onnx", 17), x)
    assert (weight.table, weight.group_size) == ("nf4", 32)


@pytest.mark.parametrize("block", [0, 32])
def test_float4_weights(tmp_path: Path, block: int) -> None:
    """onnxruntime has no kernels for float4: onnx's reference computes what must come out."""
    g, x = start()
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (N, K), np.uint8)
    scales = rng.uniform(0.5, 1.5, (N, K // 32) if block else (N,)).astype(np.float32)
    weight = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT4E2M1, (N, K), _packed(codes), raw=True)
    attrs = {"axis": 1, "block_size": block} if block else {"axis": 0}
    g.op("DequantizeLinear", ["w", g.const("s", scales)], "real", **attrs)
    g.op("MatMul", ["x", g.op("Transpose", ["real"], "t", perm=[1, 0])], "y")
    path = g.save(tmp_path / "m.onnx", opset=23)
    model = onnx.load(path)
    model.graph.initializer.append(weight)
    onnx.save(model, path)
    graph = quantize(import_model(path), None)
    found = graph.constants[only_linear(graph).inputs[1]]
    assert isinstance(found, QuantizedWeight) and found.table == "fp4"
    (want,) = ReferenceEvaluator(model).run(None, {"x": x})
    np.testing.assert_allclose(x @ found.dequantize().T, want, atol=1e-5 * np.abs(want).max())


def _packed(codes: np.ndarray) -> bytes:
    return (codes[:, 0::2] | codes[:, 1::2] << 4).tobytes()


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
@pytest.mark.parametrize("axis", ["tensor", "column"])
def test_qdq_weight(tmp_path: Path, dtype: type, axis: str) -> None:
    rng, (g, x) = np.random.default_rng(3), start()
    low, high = (np.iinfo(dtype).min, np.iinfo(dtype).max)
    codes = g.const("codes", rng.integers(low, high, (K, N), dtype=dtype))
    size = N if axis == "column" else 1
    scale = g.const("scale", (rng.random(size) + 0.1)[0] if size == 1 else rng.random(size) + 0.1, np.float32)
    zeros = rng.integers(low // 4, high // 4 + 1, size, dtype=dtype)
    zero = g.const("zero", zeros[0] if size == 1 else zeros)
    w = g.op("DequantizeLinear", [codes, scale, zero], "w", axis=1)
    mm = g.op("MatMul", ["x", w], "mm")
    g.op("Add", [mm, g.const("bias", rng.standard_normal(N), np.float32)], "y")
    assert check(g.save(tmp_path / "m.onnx", 17), x).group_size == K


@pytest.mark.parametrize("transposed", [False, True])
def test_blockwise_dequantize(tmp_path: Path, transposed: bool) -> None:
    """Opset 21: a scale for every 32 values along K, weight stored [K, N] or [N, K]."""
    rng, (g, x) = np.random.default_rng(4), start()
    codes = rng.integers(-128, 128, (N, K), dtype=np.int8)
    scale = (rng.random((N, K // 32)) + 0.1).astype(np.float32)
    if transposed:
        w = g.op("DequantizeLinear", [g.const("c", codes), g.const("s", scale)], "w", axis=1, block_size=32)
        w = g.op("Transpose", [w], "wt", perm=[1, 0])
    else:
        inputs = [g.const("c", np.ascontiguousarray(codes.T)), g.const("s", np.ascontiguousarray(scale.T))]
        w = g.op("DequantizeLinear", inputs, "w", axis=0, block_size=32)
    g.op("MatMul", ["x", w], "y")
    weight = check(g.save(tmp_path / "m.onnx", 21), x)
    assert weight.group_size == 32
    np.testing.assert_array_equal(weight.q.astype(int) - 128, codes)


def test_a_relu_folded_into_a_grid_survives(tmp_path: Path) -> None:
    """Between two layers, a grid that ends at zero is a Relu6 of the model's; on the input it is only a range."""
    rng, (g, x) = np.random.default_rng(5), start()

    def pair(name: str, low: int, scale: float) -> str:
        s, z = g.const(f"{name}.s", scale, np.float32), g.const(f"{name}.z", low, np.int8)
        return g.op("DequantizeLinear", [g.op("QuantizeLinear", [name, s, z], f"{name}.q"), s, z], f"{name}.dq")

    def layer(x: str, name: str, n: int, k: int) -> str:
        codes = g.const(f"{name}.codes", rng.integers(-127, 128, (k, n), dtype=np.int8))
        scales = [g.const(f"{name}.ws", 0.01, np.float32), g.const(f"{name}.wz", 0, np.int8)]
        return g.op("MatMul", [x, g.op("DequantizeLinear", [codes, *scales], f"{name}.w")], name)

    layer(pair(layer(pair("x", 0, 0.05), "h", K, K), -128, 0.02), "y", N, K)
    path = g.save(tmp_path / "m.onnx", 17)
    graph = quantize(import_model(path), None)
    assert [n.op for n in graph.nodes] == ["Linear", "Clip", "Linear"]
    first, _, last = graph.nodes
    assert first.attrs["activations"] == last.attrs["activations"] == "a8"
    assert first.inputs[0] == "x"
    product = x @ graph.constants[first.inputs[1]].dequantize().T
    assert product.min() < -1 and product.max() > 6, "the test must reach both ends"
    y = np.clip(product, 0, 255 * 0.02) @ graph.constants[last.inputs[1]].dequantize().T
    expected = session(path).run(None, {"x": x})[0]
    assert np.abs(y - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("per_column", [False, True])
def test_dynamic_quantize(tmp_path: Path, per_column: bool) -> None:
    rng, (g, x) = np.random.default_rng(6), start()
    codes = g.const("codes", rng.integers(-127, 128, (K, N), dtype=np.int8))
    scale = g.const("ws", rng.random(N) + 0.1 if per_column else np.array(0.3), np.float32)
    g.op("DynamicQuantizeLinear", ["x"], "xq", outputs=["xq", "xs", "xz"])
    product = g.op("MatMulInteger", ["xq", codes, "xz", g.const("wz", 0, np.int8)], "mmi")
    factor = g.op("Mul", ["xs", scale], "factor")
    g.op("Mul", [g.op("Cast", [product], "cast", to=1), factor], "y")
    weight = check(g.save(tmp_path / "m.onnx", 17), x, tolerance=0.02)
    assert weight.bits == 8 and weight.symmetric


def test_embedding_of_codes(tmp_path: Path) -> None:
    rng, g = np.random.default_rng(7), Builder()
    g.input("ids", 7, ["n"])
    g.output("y", F32, ["n", 32])
    codes = g.const("codes", rng.integers(-128, 128, (50, 32), dtype=np.int8))
    table = g.op("DequantizeLinear", [codes, g.const("s", rng.random(50) + 0.1, np.float32)], "t", axis=0)
    g.op("Gather", [table, "ids"], "y")
    graph = quantize(import_model(g.save(tmp_path / "m.onnx", 17)), None)
    assert [n.op for n in graph.nodes] == ["Embedding"]
    assert isinstance(graph.constants[graph.nodes[0].inputs[0]], QuantizedWeight)
