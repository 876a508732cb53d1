"""What only a GPU can tell. Skipped where there is none; it has not run yet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import llmc
from llmc.targets.detect import compute_capability
from tests.graphs import Decoder, Shape, decoder_feeds, encoder

pytestmark = pytest.mark.skipif(compute_capability() is None, reason="this machine has no NVIDIA GPU or no driver")


def compare(model: Path, feeds: dict[str, np.ndarray], tmp_path: Path) -> None:
    llmc.compile(model, target="cuda").save(tmp_path / "model.llmc")
    session = onnxruntime.InferenceSession(str(model))
    asked = {i.name: feeds[i.name] for i in session.get_inputs()}
    got = llmc.load(tmp_path / "model.llmc").main(asked)
    for output, want in zip(session.get_outputs(), session.run(None, asked), strict=True):
        np.testing.assert_allclose(got[output.name], want, rtol=0, atol=1e-4, err_msg=output.name)


def test_an_encoder_equals_onnxruntime(tmp_path: Path) -> None:
    mask = np.array([[1] * 7, [1] * 4 + [0] * 3])
    feeds = {"input_ids": np.arange(14).reshape(2, 7), "attention_mask": mask}
    compare(encoder(tmp_path / "encoder.onnx"), feeds, tmp_path)


@pytest.mark.parametrize(("batch", "seq", "past"), [(1, 5, 0), (2, 4, 3), (1, 1, 70)])
def test_a_decoder_equals_onnxruntime(batch: int, seq: int, past: int, tmp_path: Path) -> None:
    shape = Shape()
    compare(Decoder(shape).plain(tmp_path / "decoder.onnx"), decoder_feeds(shape, batch, seq, past), tmp_path)
