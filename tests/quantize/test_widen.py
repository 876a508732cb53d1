"""Models in float16: what the graph becomes, and results against onnxruntime's.

The measure is onnxruntime on the same weights as float32s, in float32. From that, results are off by the rounding of
what they are handed out as, half a unit in float16's last place; from onnxruntime's on the float16 model, by as much
more as these are off themselves.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

import llmc
from llmc.fuse import decoder_of, fuse
from llmc.graph import Graph
from llmc.importer import import_model
from llmc.pipeline import compile
from llmc.quantize import quantize
from llmc.quantize.formats import resolve_format
from llmc.quantize.widen import widen_halves
from llmc.schedules.formats import QuantizedWeight
from llmc.targets.detect import machine
from llmc.targets.x86 import AVX512
from tests.graphs import F32, FORMS, I64, Builder, Decoder, Shape, decoder_feeds
from tests.halves import F16, half, to_half

SHAPE = Shape(hidden=96, inner=200)
TARGET = "x86-avx2" if machine().missing(AVX512) else "x86-avx512"


def fused(path: Path, format: str = "none") -> Graph:
    return fuse(quantize(import_model(path), resolve_format(format)))


def half_decoder(folder: Path, form: str, *, norms_in_float32: bool = False) -> Path:
    path = getattr(Decoder(SHAPE), form)(folder / "float32.onnx")
    return to_half(path, folder / "half.onnx", norms_in_float32=norms_in_float32)


def in_float32(path: Path, out: Path) -> Path:
    """The float32 model with the values that its weights have as float16s."""
    model = onnx.load(path)
    for i, tensor in enumerate(model.graph.initializer):
        if tensor.data_type == F32:
            value = half(onnx.numpy_helper.to_array(tensor)).astype(np.float32)
            model.graph.initializer[i].CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    onnx.save(model, out)
    return out


@pytest.mark.parametrize(("form", "norms"), [*((form, False) for form in FORMS), ("plain", True)])
def test_forms_become_what_they_are_in_float32(tmp_path: Path, form: str, norms: bool) -> None:
    graph = fused(half_decoder(tmp_path, form, norms_in_float32=norms))
    wide = fused(tmp_path / "float32.onnx")
    casts = 3 * (2 * SHAPE.layers)  # of pasts and presents, and of the logits
    count, want = (Counter(n.op for n in g.nodes if n.op != "Cast") for g in (graph, wide))
    assert count == want and (count["Linear"], count["Norm"], count["Attention"]) == (9, 5, 2)
    assert sum(n.op == "Cast" for n in graph.nodes) <= casts + 1
    linears = [n for n in graph.nodes if n.op == "Linear"]
    assert {str(graph.constants[n.inputs[1]].dtype) for n in linears} == {"float16"}  # type: ignore[union-attr]
    assert {n.attrs["activations"] for n in linears} == {"f16"}
    assert {graph.types[name].dtype for name in graph.inputs if "past" in name} == {"float16"}
    assert {graph.types[name].dtype for name in graph.outputs} == {"float16"}
    decoder = decoder_of(graph)
    assert decoder is not None
    for name, function in decoder.functions.items():
        assert not [n for n in function.nodes if n.op == "Cast" and n.attrs["to"] == F16], name
        assert "float16" not in {t.dtype for n, t in function.types.items() if n not in function.constants}, name


def test_other_formats_round_the_weights(tmp_path: Path) -> None:
    graph = fused(half_decoder(tmp_path, "plain"), "w4a16-g32")
    weights = [graph.constants[n.inputs[1]] for n in graph.nodes if n.op == "Linear"]
    large = [w for w in weights if not isinstance(w, np.ndarray) or w.size >= 4096]
    assert len(large) == 9 and all(isinstance(w, QuantizedWeight) for w in large)


def test_weights_of_four_bits_keep_float16_scales(tmp_path: Path) -> None:
    rng, g = np.random.default_rng(0), Builder()
    g.input("x", F16, ["m", 64])
    g.output("y", F16, ["m", 32])
    codes = g.const("codes", rng.integers(0, 256, (32, 2, 16)), np.uint8)
    scales = g.const("scales", rng.uniform(0.01, 0.1, 64), np.float16)
    g.op("MatMulNBits", ["x", codes, scales], "y", domain="com.microsoft", K=64, N=32, bits=4, block_size=32)
    (cast, layer, back) = fused(g.save(tmp_path / "m.onnx", 17)).nodes
    assert (cast.op, layer.op, back.op) == ("Cast", "Linear", "Cast")


def test_without_products_nothing_is_widened(tmp_path: Path) -> None:
    g = Builder()
    g.input("x", F16, ["m", 8])
    g.output("y", F16, ["m", 8])
    g.op("Add", ["x", g.op("Exp", ["x"], "e")], "y")
    graph = import_model(g.save(tmp_path / "m.onnx", 17))
    assert widen_halves(graph) is graph


def test_what_needs_float16_gets_it(tmp_path: Path) -> None:
    """An operator that no list has reads and makes float16; constants that no layer takes are folded; an output that is
    cast to float32 is one."""
    rng, g = np.random.default_rng(0), Builder()
    g.input("x", F16, ["m", 64])
    g.output("y", F16, ["m", 64])
    g.output("wide", F32, ["m", 64])
    weight = g.const("weight", rng.standard_normal((64, 64)) / 8, np.float16)
    product = g.op("Gemm", ["x", weight], "product", alpha=0.5)
    like = g.op("CastLike", [g.input("n", I64, ["m", 64]), product], "like")
    g.op("Add", [product, like], "y")
    g.op("Cast", [product], "wide", to=F32)
    path = g.save(tmp_path / "m.onnx", 17)
    graph = fused(path)
    assert not [n for n in graph.nodes if n.op == "Cast" and n.inputs[0] in graph.constants]
    compile(path, target=TARGET).save(tmp_path / "m.llmc")
    feeds = {"x": rng.standard_normal((3, 64)).astype(np.float16), "n": rng.integers(-9, 9, (3, 64))}
    got = llmc.load(tmp_path / "m.llmc")(feeds)
    product = 0.5 * feeds["x"].astype(np.float64) @ np.asarray(g.tensors["weight"], np.float64)
    np.testing.assert_allclose(got["wide"], product, rtol=0, atol=1e-5)
    np.testing.assert_array_max_ulp(got["y"], (product + feeds["n"]).astype(np.float16), 1)


@pytest.mark.parametrize(
    ("form", "norms"),
    [("genai", False), *(pytest.param(f, n, marks=pytest.mark.slow) for f, n in (("plain", True), ("std23", False)))],
)
def test_decoders_compute_what_they_say(tmp_path: Path, form: str, norms: bool) -> None:
    path = half_decoder(tmp_path, form, norms_in_float32=norms)
    compile(path, target=TARGET).save(tmp_path / "m.llmc")
    model = llmc.load(tmp_path / "m.llmc")
    session = onnxruntime.InferenceSession(path)
    exact = onnxruntime.InferenceSession(in_float32(tmp_path / "float32.onnx", tmp_path / "rounded.onnx"))
    dtypes = {i.name: np.float16 if i.type == "tensor(float16)" else np.int64 for i in session.get_inputs()}
    feeds = {k: v.astype(dtypes[k]) for k, v in decoder_feeds(SHAPE, 1, 5, 7).items() if k in dtypes}
    want = session.run(None, feeds)
    measure = exact.run(None, {k: v.astype(np.float32) if v.dtype == np.float16 else v for k, v in feeds.items()})
    for got, theirs, value in zip(model(feeds).values(), want, measure, strict=True):
        assert got.dtype == theirs.dtype == np.float16
        off = 2.0**-11 * np.abs(value) + 2e-5 * np.abs(value).max()
        assert np.all(np.abs(got - value) <= off)
        assert np.all(np.abs(got.astype(np.float32) - theirs) <= off + np.abs(theirs - value))
    ids = feeds["input_ids"][0]
    logits = model.session().append(ids, all=True)
    past = {k: v[:, :, :0] for k, v in feeds.items() if "past" in k}
    start = {"input_ids": ids[None], "attention_mask": np.ones((1, 5), np.int64), "position_ids": np.arange(5)[None]}
    whole = exact.run(
        ["logits"], {k: v.astype(np.float32) for k, v in past.items()} | {k: v for k, v in start.items() if k in dtypes}
    )
    np.testing.assert_allclose(logits, whole[0], rtol=0, atol=2e-5 * np.abs(whole[0]).max())
