"""Several sequences in one engine are what each is alone, and are continued alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llmc.engines import Engine, open_engine
from tests.graphs import Decoder, Shape
from tests.runtime.toys import V, write_decoder

SHAPE = Shape(context=256)
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Decoder(SHAPE).plain(tmp_path_factory.mktemp("batches") / "model.onnx")


def logits(engine: Engine, prompt: np.ndarray, steps: int) -> np.ndarray:
    """[B, S + steps, V] of a prompt and the likeliest tokens after it."""
    engine.reset(len(prompt))
    parts = [engine.step(prompt).copy()]
    for _ in range(steps):
        parts.append(engine.step(parts[-1][:, -1:].argmax(-1)).copy())
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_rows_are_independent(name: str, model: Path) -> None:
    pytest.importorskip(name)
    engine = open_engine(name, model, 1)
    prompt = RNG.integers(0, SHAPE.vocab, (3, 7))
    together = logits(engine, prompt, 4)
    assert together.shape == (3, 11, SHAPE.vocab)
    for row in range(3):
        np.testing.assert_allclose(together[row], logits(engine, prompt[row : row + 1], 4)[0], rtol=1e-4, atol=1e-4)


def test_rows_of_an_artifact(tmp_path: Path) -> None:
    engine = open_engine("llmc", write_decoder(tmp_path / "decoder.llmc"), 1)
    prompt = RNG.integers(0, V, (3, 5))
    together = logits(engine, prompt, 2)
    for row in range(3):
        np.testing.assert_array_equal(together[row], logits(engine, prompt[row : row + 1], 2)[0])


class Counter(Engine):
    """Names the token after the last one that it read; knows what it was given."""

    def reset(self, batch: int = 1, room: int = 0) -> None:
        self.read_so_far, self.room = np.zeros((batch, 0), np.int64), room

    def step(self, ids: np.ndarray) -> np.ndarray:
        self.read_so_far = np.concatenate([self.read_so_far, ids], axis=1)
        return np.eye(2000, dtype=np.float32)[(ids + 1) % 2000]


@pytest.mark.parametrize("batch", [1, 3])
def test_what_is_measured(batch: int) -> None:
    """A prompt of more than one chunk, and the steps after it, are those that were asked for."""
    engine, prompt = Counter(), RNG.integers(0, 2000, (batch, 1100))
    assert engine.measure(prompt) > 0
    np.testing.assert_array_equal(engine.read_so_far, prompt)
    assert engine.measure(prompt, decode=5) > 0
    np.testing.assert_array_equal(engine.read_so_far[:, :1100], prompt)
    np.testing.assert_array_equal(engine.read_so_far[:, 1100:], (prompt[:, -1:] + 1 + np.arange(5)) % 2000)
    assert engine.room == 1105
