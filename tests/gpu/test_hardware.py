"""What only a GPU can tell: skipped where there is none. Nothing here has run on one yet; under the emulated driver it
has (`test_hardware_emulated.py`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import llmc
from llmc.targets.detect import compute_capability
from tests.gpu import hardware
from tests.graphs import Decoder, Shape, decoder_feeds, encoder

pytestmark = pytest.mark.skipif(compute_capability() is None, reason="this machine has no NVIDIA GPU or no driver")
FORMATS = ("none", "w4a16", "w4a8-g32", "w8a8", "bf16")


@pytest.mark.parametrize("name", hardware.CASES)
def test_kernels_equal_their_references_at_their_boundaries(name: str) -> None:
    hardware.check_kernel(name)


def test_an_encoder_equals_onnxruntime(tmp_path: Path) -> None:
    mask = np.array([[1] * 7, [1] * 4 + [0] * 3])
    feeds = {"input_ids": np.arange(14).reshape(2, 7), "attention_mask": mask}
    model = encoder(tmp_path / "encoder.onnx")
    llmc.compile(model, target="cuda").save(tmp_path / "model.llmc")
    hardware.check_model(model, tmp_path / "model.llmc", feeds, llmc.load)


@pytest.mark.parametrize(("batch", "seq", "past"), [(1, 5, 0), (2, 4, 3), (1, 1, 70)])
def test_a_decoder_equals_onnxruntime(batch: int, seq: int, past: int, tmp_path: Path) -> None:
    shape = Shape()
    model = Decoder(shape).plain(tmp_path / "decoder.onnx")
    llmc.compile(model, target="cuda").save(tmp_path / "model.llmc")
    hardware.check_model(model, tmp_path / "model.llmc", decoder_feeds(shape, batch, seq, past), llmc.load)


def test_a_session_says_what_the_cpus_does(tmp_path: Path) -> None:
    model = Decoder(Shape()).plain(tmp_path / "decoder.onnx")
    for target in ("native", "cuda"):
        llmc.compile(model, target=target).save(tmp_path / f"{target}.llmc")
    hardware.check_session(tmp_path / "native.llmc", tmp_path / "cuda.llmc", llmc.load)


@pytest.mark.parametrize("format", FORMATS)
def test_a_format_loads_and_generates(format: str, tmp_path: Path) -> None:
    """Twice the same tokens: nothing races."""
    model = Decoder(Shape()).plain(tmp_path / "decoder.onnx")
    llmc.compile(model, target="cuda", quantize=format).save(tmp_path / "model.llmc")
    loaded = llmc.load(tmp_path / "model.llmc")
    first, second = (list(loaded.session().generate([1, 2, 3], 16)) for _ in range(2))
    assert first == second and len(first) > 0
