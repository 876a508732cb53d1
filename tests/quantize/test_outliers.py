"""LLM.int8()'s outliers: measured on samples, chosen, and split off, through the whole corridor."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import llmc
from llmc.calibrate import calibrate
from llmc.checker import COSINE_8_BIT
from llmc.errors import OptionError
from llmc.importer import import_model
from llmc.pipeline import compile
from llmc.quantize import quantize
from llmc.quantize.outliers import outlier_channels
from tests.graphs import F32, Builder, Decoder, Shape, decoder_feeds
from tests.runtime.test_text import byte_tokenizer

K, N, PLANTED = 256, 96, (3, 77, 200)


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """y = x W. What outliers are multiplied with is small, as in trained networks, where all of y counts."""
    g, rng = Builder(), np.random.default_rng(0)
    weight = rng.uniform(-1, 1, (K, N)).astype(np.float32)
    weight[list(PLANTED)] /= 60
    g.input("x", F32, ["batch", "tokens", K])
    g.output("y", F32, ["batch", "tokens", N])
    g.op("MatMul", ["x", g.const("weight", weight)], "y")
    return g.save(tmp_path_factory.mktemp("layer") / "layer.onnx", 17)


def activations(seed: int, tokens: int = 40) -> np.ndarray:
    x = np.random.default_rng(seed).uniform(-1, 1, (9, tokens, K)).astype(np.float32)
    x[:, :, list(PLANTED)] *= 60
    return x


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("samples") / "samples.npz"
    np.savez(path, x=activations(seed=1))
    return path


def largest(path: Path, data: Path) -> dict[str, np.ndarray]:
    return dict(calibrate(quantize(import_model(path), None), path, data).largest)


def test_statistics_are_those_of_the_samples(layer: Path, samples: Path) -> None:
    measured = largest(layer, samples)
    assert measured.keys() == {"x"}
    np.testing.assert_array_equal(measured["x"], np.abs(activations(seed=1)).max((0, 1)))


def test_plain_int8_fails_where_the_split_holds(layer: Path, samples: Path, tmp_path: Path) -> None:
    x = activations(seed=2)  # not those that were measured
    expected = x.astype(np.float64) @ onnx.numpy_helper.to_array(onnx.load(layer).graph.initializer[0])

    def error(format: str, data: Path | None) -> float:
        compile(layer, quantize=format, calibrate=data).save(tmp_path / "m.llmc")
        y = llmc.load(tmp_path / "m.llmc")(x=x)
        return float(np.linalg.norm(y - expected) / np.linalg.norm(expected))

    assert error("w8a8-row", None) > 0.1
    assert error("w8a8-outliers", samples) < 0.01


def test_channels() -> None:
    row = np.ones(100, np.float32)
    assert outlier_channels([row]).tolist() == outlier_channels([]).tolist() == []
    row[[90, 10]], row[[50, 51]] = 6.1, 5.9  # two of them, and the two that are next
    assert outlier_channels([row]).tolist() == [10, 50, 51, 90]
    assert outlier_channels([row * 1000]).tolist() == outlier_channels([row / 1000]).tolist() == [10, 50, 51, 90]
    other = np.ones(100, np.float32)
    other[7] = 100  # of a second value that the same weight multiplies
    assert 7 in outlier_channels([row, other]) and 90 in outlier_channels([row, other])
    row[:45] = np.arange(45) + 20  # no more than 32, and the largest
    assert outlier_channels([row]).tolist() == list(range(13, 45))
    assert outlier_channels([np.zeros(8, np.float32)]).tolist() == []


SHAPE = Shape(layers=1, hidden=96, inner=200)


def planted_decoder(path: Path) -> Path:
    """A decoder of which some channels after each norm are large, and their weights small."""
    decoder = Decoder(SHAPE)
    for block in decoder.blocks:
        for gain, readers in (("norm1", "qkv"), ("norm2", ("gate", "up"))):
            block[gain][[5, 60]] *= 80
            for name in readers:
                block[name][:, [5, 60]] /= 80
    path = decoder.plain(path)
    (path.parent / "tokenizer.json").write_bytes(byte_tokenizer())
    return path


def test_decoder_calibrated_by_a_text(tmp_path: Path) -> None:
    """Merged layers share their outliers; the output layer's table also serves the embedding."""
    path, text = planted_decoder(tmp_path / "plain.onnx"), tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 30)
    dump = tmp_path / "dump"
    compile(path, quantize="w8a8-outliers", calibrate=text, dump_ir=dump).save(tmp_path / "m.llmc")
    assert "outliers" in next(dump.glob("*-select.txt")).read_text()
    model = llmc.load(tmp_path / "m.llmc")
    names = {k.template for k in model.manifest.kernels}
    assert "outliers" in names
    assert any("outliers in float32" in kind for kind in model.manifest.quantization["weights"])
    ids = np.random.default_rng(0).integers(0, SHAPE.vocab, 40)
    feeds = decoder_feeds(SHAPE, 1, len(ids), 0) | {"input_ids": ids[None]}
    session = onnxruntime.InferenceSession(path)
    expected = session.run(["logits"], {i.name: feeds[i.name] for i in session.get_inputs()})[0][0]
    logits = model.session().append(ids, all=True)[0]
    cosine = (logits * expected).sum(-1) / np.linalg.norm(logits, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert cosine.min() > COSINE_8_BIT and np.mean(cosine) > 0.999
    lines = (dump / "1-calibrate.txt").read_text().splitlines()
    after_norms = [line for line in lines if "in channel 5," in line and "in channel 60" in line]
    assert len(after_norms) == 2 and len(lines) == 5


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"quantize": "w8a8-outliers"}, "needs samples"),
    ({"quantize": "w8a8", "calibrate": "{samples}"}, "needs no calibration"),
    ({"quantize": "w8a8-outliers", "calibrate": "{here}/absent"}, "no such file"),
    ({"quantize": "w8a8-outliers", "calibrate": "{here}/text.txt"}, "no input_ids"),
    ({"quantize": "w8a8-outliers", "calibrate": "{here}/broken.npz"}, "cannot read"),
    ({"quantize": "w8a8-outliers", "calibrate": "{here}/other.npz"}, "input"),
    ({"quantize": "w8a8-outliers", "calibrate": "{here}/nan.npz"}, "no numbers"),
    ({"quantize": "w8a8-outliers", "calibrate": "{here}/none.npz"}, "no samples"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[m for _, m in WRONG])
def test_what_may_be_wrong(layer: Path, samples: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    shutil.copy(samples, tmp_path / "samples.npz")
    (tmp_path / "text.txt").write_text("some words")
    (tmp_path / "broken.npz").write_text("no archive")
    np.savez(tmp_path / "other.npz", z=np.zeros(3, np.float32))
    np.savez(tmp_path / "nan.npz", x=np.full((1, 2, K), np.nan, np.float32))
    np.savez(tmp_path / "none.npz", x=np.zeros((0, 2, K), np.float32))
    given = {name: value.format(samples=samples, here=tmp_path) for name, value in options.items()}
    with pytest.raises(OptionError, match=message) as error:
        compile(layer, **given)
    assert error.value.hint
