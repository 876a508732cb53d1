"""Whole models for a GPU, on the CPU: the artifact's host code runs, its kernels are emulated, onnxruntime judges."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from llmc.emulator.emulator import available
from llmc.emulator.models import load
from llmc.pipeline import compile
from llmc.runtime.model import Model
from tests.gpu.tools import needs_compiler
from tests.graphs import Decoder, Shape, decoder_feeds, encoder

pytestmark = [
    needs_compiler,
    pytest.mark.slow,
    pytest.mark.skipif(not available(), reason="no g++ 12 for x86-64"),
]
SHAPE = Shape(layers=2)
# float32 throughout. Of the largest value: sums of a hundred terms in another order.
TOLERANCE = 2e-5


def reference(path: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    known = {value.name for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {k: v for k, v in feeds.items() if k in known}), strict=True))


def close(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE * max(1.0, float(np.abs(expected).max())))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model]:
    folder = tmp_path_factory.mktemp("emulated")
    Decoder(SHAPE).std23(folder / "m.onnx")
    compile(folder / "m.onnx", target="cuda-sm80").save(folder / "m.llmc")
    return folder / "m.onnx", load(folder / "m.llmc")


@pytest.mark.parametrize(("batch", "seq", "past"), [(1, 1, 0), (1, 7, 0), (2, 5, 9), (1, 1, 20)])
def test_a_decoder(decoder: tuple[Path, Model], batch: int, seq: int, past: int) -> None:
    path, model = decoder
    feeds = decoder_feeds(SHAPE, batch, seq, past)
    expected = reference(path, feeds)
    known = {spec.name for spec in model.inputs}
    outputs = model({name: value for name, value in feeds.items() if name in known})
    assert isinstance(outputs, dict) and outputs.keys() == expected.keys()
    for name, value in outputs.items():
        close(value, expected[name])


def test_an_encoder(tmp_path: Path) -> None:
    path = encoder(tmp_path / "m.onnx")
    compile(path, target="cuda-sm80").save(tmp_path / "m.llmc")
    model = load(tmp_path / "m.llmc", seed=1)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 97, (2, 11))
    every = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    every["attention_mask"][1, 8:] = 0
    feeds = {spec.name: every[spec.name] for spec in model.inputs}
    outputs = model(feeds)
    first = next(iter(outputs.values())) if isinstance(outputs, dict) else outputs
    close(first, next(iter(reference(path, feeds).values())))
