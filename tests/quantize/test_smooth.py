"""SmoothQuant: the function stays the same, its channels become alike, and what is rounded comes closer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import llmc
from llmc.graph import Graph
from llmc.importer import import_model
from llmc.pipeline import compile
from llmc.quantize import quantize
from llmc.quantize.observe import Statistics
from llmc.quantize.smooth import smooth
from tests.graphs import FORMS, Decoder, Shape, decoder_feeds, encoder

SHAPE = Shape(layers=1, hidden=96, inner=200)
LARGE = [5, 60]


def planted() -> Decoder:
    """Some channels after each norm, and of the gated product, are large, and their weights small."""
    decoder = Decoder(SHAPE)
    block = decoder.blocks[0]
    for gain, readers in (("norm1", "qkv"), ("norm2", ("gate", "up"))):
        block[gain][LARGE] *= 80
        for name in readers:
            block[name][:, LARGE] /= 80
    block["up"][LARGE] *= 80
    block["down"][:, LARGE] /= 80
    return decoder


def measured(graph: Graph) -> Statistics:
    """What a calibration would find, roughly: all channels 1, the planted ones 80."""
    largest = {}
    for node in graph.nodes:
        if node.op == "Linear":
            row = np.ones(graph.types[node.inputs[0]].shape[-1], np.float32)
            row[LARGE] = 80
            largest[node.inputs[0]] = row
    return Statistics(largest)


def spread(graph: Graph) -> dict[str, float]:
    """Of each layer's weight, by output: the largest channel over the median one, of the planted and all others."""
    found = {}
    for node in graph.nodes:
        if node.op == "Linear":
            columns = np.abs(np.asarray(graph.constants[node.inputs[1]])).max(0)
            found[node.outputs[0]] = float(np.median(columns) / columns[LARGE].max())
    return found


def products(graph: Graph) -> dict[str, np.ndarray]:
    """Of each layer after a norm in primitive spelling, its weight times the gain; of the down projection, times the
    rows of the up projection. What moves from one to the other leaves them as they are."""
    producer, constants, found = graph.producer(), graph.constants, {}
    for node in graph.nodes:
        maker = producer.get(node.inputs[0]) if node.op == "Linear" else None
        if maker is not None and maker.op == "Mul":
            rows = [constants[name] for name in maker.inputs if name in constants]
            ups = [producer[name] for name in maker.inputs if name in producer and producer[name].op == "Linear"]
            rows += [np.abs(found[up.outputs[0]]).max(1) for up in ups]
            found[node.outputs[0]] = np.asarray(constants[node.inputs[1]]) * np.asarray(rows[0])
    return found


def test_the_function_stays(tmp_path: Path) -> None:
    graph = quantize(import_model(planted().plain(tmp_path / "m.onnx")), None)
    before, after = products(graph), products(smooth(graph, measured(graph)))
    assert len(before) == len(after) == 7
    for name, product in before.items():
        factor = np.abs(after[name]).max(1) / np.abs(product).max(
            1
        )  # the up projection's, which the layer after it has
        np.testing.assert_allclose(after[name], product * factor[:, None], rtol=1e-4, atol=1e-7)
        assert np.allclose(factor, 1) == (name != "l0.up")


@pytest.mark.parametrize("form", FORMS)
def test_every_spelling_of_a_decoder(tmp_path: Path, form: str) -> None:
    """The norms' gains and the up projection divide, the weights after them multiply; attention's output stays."""
    graph = quantize(import_model(getattr(planted(), form)(tmp_path / "m.onnx")), None)
    before, after = spread(graph), spread(smooth(graph, measured(graph)))
    uneven = {name for name in before if before[name] > 20}
    assert len(uneven) == (4 if form == "genai" else 6)  # queries, keys and values are one layer there
    assert all(after[name] < 5 for name in uneven)
    assert len({name for name in before if before[name] == after[name]}) == (1 if form == "genai" else 2)


def test_values_with_other_readers_stay(tmp_path: Path) -> None:
    """After BERT's norms a residual goes on: only what nothing else reads is smoothed, and here nothing is."""
    graph = quantize(import_model(encoder(tmp_path / "m.onnx", hidden=96, inner=200)), None)
    smoothed = smooth(graph, measured(graph))
    assert {k for k, v in smoothed.constants.items() if v is not graph.constants.get(k)} == set()


@pytest.mark.slow
def test_rounded_decoder(tmp_path: Path) -> None:
    """Against onnxruntime on the model as it was; rounding the same without smoothing is far off."""
    path = planted().plain(tmp_path / "plain.onnx")
    ids = np.random.default_rng(0).integers(0, SHAPE.vocab, (3, 20))
    feeds = decoder_feeds(SHAPE, 3, 20, 0) | {"input_ids": ids}
    session = onnxruntime.InferenceSession(path)
    feeds = {i.name: feeds[i.name] for i in session.get_inputs()}
    np.savez(tmp_path / "samples.npz", **feeds)
    expected = session.run(["logits"], feeds)[0]

    def error(format: str, data: Path | None) -> float:
        compile(path, quantize=format, calibrate=data).save(tmp_path / "m.llmc")
        logits = llmc.load(tmp_path / "m.llmc")(feeds)["logits"]
        return float(np.linalg.norm(logits - expected) / np.linalg.norm(expected))

    smoothed = error("w8a8-smooth", tmp_path / "samples.npz")
    assert smoothed < 0.03 and smoothed < 0.3 * error("w8a8-row", None)
