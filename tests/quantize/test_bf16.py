"""The format bf16 through the whole corridor, against onnxruntime on the same rounded weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

import llmc
from llmc.cli import main
from llmc.errors import OptionError
from llmc.importer import import_model
from llmc.pipeline import compile
from llmc.quantize import quantize
from llmc.quantize.formats import resolve_format
from llmc.schedules.gemm.bf16_packing import from_bf16, round_to_bf16
from llmc.targets.base import Target
from llmc.targets.detect import machine
from llmc.targets.x86 import AVX2, AVX512
from tests.graphs import Decoder, Shape, decoder_feeds, encoder


def rounded_names(path: Path) -> set[str]:
    """The weights of linear layers that the format rounds: all but small ones."""
    graph = quantize(import_model(path), resolve_format("bf16"))
    linears = [n for n in graph.nodes if n.op == "Linear"]
    assert {n.attrs["activations"] for n in linears} <= {"bf16", "a32"}
    return {n.inputs[1] for n in linears if n.attrs["activations"] == "bf16"}


def with_rounded_weights(path: Path, out: Path) -> Path:
    model, names = onnx.load(path), rounded_names(path)
    found = [t for t in model.graph.initializer if {t.name, f"{t.name}.T"} & names]
    assert len(found) == len(names) > 0
    for tensor in found:
        value = from_bf16(round_to_bf16(onnx.numpy_helper.to_array(tensor)))
        tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    onnx.save(model, out)
    return out


@pytest.fixture(params=[AVX2, AVX512], ids=lambda t: t.name)
def target(request: pytest.FixtureRequest) -> str:
    wanted: Target = request.param
    if missing := machine().missing(wanted):
        pytest.skip(f"CPU lacks {missing}")
    return wanted.name


def test_encoder(tmp_path: Path, target: str) -> None:
    path = encoder(tmp_path / "encoder.onnx", hidden=96, inner=200)
    compile(path, target=target, quantize="bf16").save(tmp_path / "m.llmc")
    rng = np.random.default_rng(0)
    feeds = {"input_ids": rng.integers(0, 97, (2, 23)), "attention_mask": np.ones((2, 23), np.int64)}
    session = onnxruntime.InferenceSession(with_rounded_weights(path, tmp_path / "rounded.onnx"))
    expected = session.run(["hidden"], feeds)[0]
    actual = llmc.load(tmp_path / "m.llmc")(feeds)
    hidden = actual["hidden"] if isinstance(actual, dict) else actual
    np.testing.assert_allclose(hidden, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_decoder_with_tied_embedding(tmp_path: Path, target: str) -> None:
    """The output layer is rounded, the table that it shares with the embedding is not: hence no closer than that."""
    shape = Shape(hidden=96, inner=200)
    path = Decoder(shape).plain(tmp_path / "plain.onnx")
    compile(path, target=target, quantize="bf16").save(tmp_path / "m.llmc")
    model = llmc.load(tmp_path / "m.llmc")
    templates = {k.template for k in model.manifest.kernels}
    assert {"bf16", "embedding_dense"} <= templates
    assert model.manifest.quantization == {"format": "bf16", "weights": ["bfloat16"], "quantized_matrices": 9}
    assert main(["check", str(tmp_path / "m.llmc"), str(path)]) == 0  # with a tolerance that knows of the rounding
    ids = np.random.default_rng(5).integers(0, shape.vocab, 40)
    feeds = decoder_feeds(shape, 1, len(ids), 0) | {"input_ids": ids[None]}
    session = onnxruntime.InferenceSession(with_rounded_weights(path, tmp_path / "rounded.onnx"))
    expected = session.run(["logits"], {i.name: feeds[i.name] for i in session.get_inputs()})[0]
    logits = model.session().append(ids, all=True)
    cosine = (logits * expected).sum(-1) / np.linalg.norm(logits, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert cosine.min() > 0.9999


def test_its_output_layer_has_no_bits_to_choose() -> None:
    with pytest.raises(OptionError, match="no weight format 'bf16-head4'"):
        resolve_format("bf16-head4")
