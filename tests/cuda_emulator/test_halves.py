"""Models in float16, and the formats f16 and fp8, under the emulated driver."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llmc.emulator.emulator import available
from llmc.pipeline import compile
from tests.cuda_emulator.test_models import (
    CAPABILITY,
    Call,
    appended,
    check_session,
    close,
    gpus,
    outputs,
    reference,
    tolerance,
)
from tests.gpu.tools import needs_compiler
from tests.graphs import FORMS, Decoder, Shape, decoder_feeds
from tests.halves import to_half
from tests.quantize.test_widen import in_float32
from tests.test_pipeline import with_rounded_weights

__all__ = ["gpus"]
pytestmark = [needs_compiler, pytest.mark.skipif(not available(), reason="no g++ 12 for x86-64")]
SHAPE = Shape(layers=2, hidden=64, inner=96)
# What float16s are rounded to when they are handed out, of the largest.
HANDED_OUT = 2.0**-11


@pytest.mark.slow
@pytest.mark.parametrize("target", CAPABILITY)
@pytest.mark.parametrize("form", FORMS)
def test_models_in_float16(form: str, target: str, gpus: Callable[[str], Call], tmp_path: Path) -> None:
    """The plain signature, with float16 past and present; a session. The measure is the same model in float32."""
    path = getattr(Decoder(SHAPE), form)(tmp_path / "float32.onnx")
    half, exact = to_half(path, tmp_path / "m.onnx"), in_float32(path, tmp_path / "rounded.onnx")
    compile(half, target=target).save(tmp_path / "m.llmc")
    feeds = {k: v.astype(np.float16) if "past" in k else v for k, v in decoder_feeds(SHAPE, 1, 5, 7).items()}
    if form == "genai":
        del feeds["position_ids"]
    expected = reference(exact, {k: v.astype(np.float32) if "past" in k else v for k, v in feeds.items()})
    found = gpus(target)(outputs, tmp_path / "m.llmc", feeds)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == np.float16
        # Attention rounds to bfloat16.
        close(value, expected[name], HANDED_OUT + tolerance("float32", "float16", "bfloat16"))
    check_session(gpus(target), tmp_path / "m.llmc", exact, tolerance("float32", "float16", "bfloat16"))


@pytest.mark.slow
@pytest.mark.parametrize("target", CAPABILITY)
def test_weights_in_float16(target: str, gpus: Callable[[str], Call], tmp_path: Path) -> None:
    path = Decoder(SHAPE).std23(tmp_path / "m.onnx")
    compile(path, target=target, quantize="f16").save(tmp_path / "m.llmc")
    exact = in_float32(path, tmp_path / "rounded.onnx")
    check_session(gpus(target), tmp_path / "m.llmc", exact, tolerance("float32", "float16", "bfloat16"))


@pytest.mark.slow
@pytest.mark.parametrize("target", CAPABILITY)
def test_weights_in_8_bit_floats(target: str, gpus: Callable[[str], Call], tmp_path: Path) -> None:
    """On sm_80 x is rounded to float16; on sm_90 to 3 bits of mantissa, which leaves the direction of the logits."""
    path = Decoder(SHAPE).std23(tmp_path / "m.onnx")
    compile(path, target=target, quantize="fp8").save(tmp_path / "m.llmc")
    exact = with_rounded_weights(path, "fp8", tmp_path / "rounded.onnx")
    if target == "cuda-sm80":
        check_session(gpus(target), tmp_path / "m.llmc", exact, tolerance("float32", "float16", "bfloat16"))
        return
    ids = np.random.default_rng(5).integers(0, SHAPE.vocab, 24)
    feeds = decoder_feeds(SHAPE, 1, len(ids), 0) | {"input_ids": ids[None]}
    found = gpus(target)(appended, tmp_path / "m.llmc", np.split(ids, [13, 14, 15, 16, 17]))
    want = reference(exact, feeds)["logits"][0]
    cosine = (found * want).sum(-1) / np.linalg.norm(found, axis=-1) / np.linalg.norm(want, axis=-1)
    assert cosine.min() > 0.99 and cosine.max() < 0.99999
