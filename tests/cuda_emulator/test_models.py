"""Whole models under the emulated driver: TVM's CUDA runtime and llmc's loader are the real ones, onnxruntime judges.

Where weights are rounded, onnxruntime computes with what their codes stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from llmc.emulator import driver
from llmc.emulator.emulator import available
from llmc.pipeline import compile
from llmc.runtime.model import Model
from tests.cuda_emulator.child import emulated
from tests.gpu.decoder import gpu_decoder
from tests.gpu.tools import needs_compiler
from tests.graphs import Decoder, Shape, decoder_feeds, encoder
from tests.runtime.conftest import DECODER
from tests.test_pipeline import with_rounded_weights

pytestmark = [needs_compiler, pytest.mark.skipif(not available(), reason="no g++ 12 for x86-64")]
Call = Callable[..., Any]
SHAPE = Shape(layers=2)
CAPABILITY = {"cuda-sm80": (8, 0), "cuda-sm90": (9, 0)}
# Linear layers that a logit has gone through, each of which rounds what it reads.
LINEARS = 2 * 7 + 1
# Steps of what is rounded, relative to the largest of the numbers that share a scale; float32 adds a hundred terms in
# another order. int8 and int4 caches round keys and values, which two layers read.
STEP = {"float32": 2.0**-24 * 10, "float16": 2.0**-11, "bfloat16": 2.0**-8, "int8": 1 / 127, "int4": 1 / 7}


def tolerance(*rounded: str) -> float:
    """Of the largest logit: four standard deviations of as many independent roundings as a logit goes through. One is
    off by a step over the square root of twelve."""
    steps = [STEP[kind] for kind in rounded for _ in range(LINEARS)]
    return float(4 * np.sqrt(sum(step**2 / 12 for step in steps)))


@pytest.fixture(scope="module")
def gpus() -> Iterator[Callable[[str], Call]]:
    """Calls functions in a process with the GPU of a target."""
    with ExitStack() as stack:
        yield cache(lambda target: stack.enter_context(emulated(CAPABILITY[target])))


def reference(path: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    known = {value.name for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {k: v for k, v in feeds.items() if k in known}), strict=True))


def close(actual: np.ndarray, expected: np.ndarray, bound: float) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound * max(1.0, float(np.abs(expected).max())))


# What runs in the child process.


@cache
def loaded(path: Path) -> Model:
    return driver.load(path)


def outputs(path: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The plain signature."""
    model = loaded(path)
    with driver.judged():
        return model.main({spec.name: feeds[spec.name] for spec in model.inputs})


def appended(path: Path, pieces: list[np.ndarray]) -> np.ndarray:
    """The logits of a session that reads a text piece by piece."""
    session = loaded(path).session()
    with driver.judged():
        return np.concatenate([session.append(piece, all=True)[0] for piece in pieces])


# Plain calls.


def compare(call: Call, artifact: Path, model: Path, feeds: dict[str, np.ndarray], bound: float) -> None:
    expected, found = reference(model, feeds), call(outputs, artifact, feeds)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        close(value, expected[name], bound)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a float32 decoder and its artifact."""
    return gpu_decoder(tmp_path_factory)


@pytest.mark.parametrize(
    ("batch", "seq", "past"),
    [(2, 5, 9), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((1, 1, 0), (1, 7, 0), (1, 1, 20)))],
)
def test_a_decoder(decoder: Path, gpus: Callable[[str], Call], batch: int, seq: int, past: int) -> None:
    feeds = decoder_feeds(DECODER.shape, batch, seq, past)
    compare(gpus("cuda-sm80"), decoder / "m.llmc", decoder / "m.onnx", feeds, tolerance("float32"))


def test_a_session(decoder: Path, gpus: Callable[[str], Call]) -> None:
    check_session(gpus("cuda-sm80"), decoder / "m.llmc", decoder / "m.onnx", tolerance("float32"), DECODER.shape)


@pytest.mark.slow
@pytest.mark.parametrize("target", CAPABILITY)
def test_an_encoder(target: str, gpus: Callable[[str], Call], tmp_path: Path) -> None:
    path = encoder(tmp_path / "m.onnx")
    compile(path, target=target).save(tmp_path / "m.llmc")
    ids = np.random.default_rng(0).integers(0, 97, (2, 11))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    feeds["attention_mask"][1, 8:] = 0
    compare(gpus(target), tmp_path / "m.llmc", path, feeds, tolerance("float32"))


@pytest.mark.slow
def test_a_later_gpu_runs_what_an_earlier_one_does(decoder: Path, gpus: Callable[[str], Call]) -> None:
    """Through the PTX, which is all that its driver can use."""
    feeds = decoder_feeds(DECODER.shape, 1, 4, 3)
    compare(gpus("cuda-sm90"), decoder / "m.llmc", decoder / "m.onnx", feeds, tolerance("float32"))


# Sessions.


def check_session(call: Call, artifact: Path, model: Path, bound: float, shape: Shape = SHAPE) -> None:
    """A prompt, tokens one by one, several at once."""
    ids = np.random.default_rng(5).integers(0, shape.vocab, 24)
    feeds = decoder_feeds(shape, 1, len(ids), 0) | {"input_ids": ids[None]}
    found = call(appended, artifact, np.split(ids, [13, 14, 15, 16, 17]))
    close(found, reference(model, feeds)["logits"][0], bound)


FORMATS = {
    "bf16": ("bfloat16",),
    "w8a16": ("float16",),
    "w4a16": ("float16",),
    "w8a8": ("int8",),
    "w4a8": ("int8",),
}
CACHES = {"int8": ("int8",), "int4": ("int4",), "paged": (), "int8,paged": ("int8",)}


@pytest.mark.slow
@pytest.mark.parametrize("target", CAPABILITY)
@pytest.mark.parametrize("format", FORMATS)
def test_rounded_weights(format: str, target: str, gpus: Callable[[str], Call], tmp_path: Path) -> None:
    Decoder(SHAPE).plain(tmp_path / "m.onnx")
    compile(tmp_path / "m.onnx", target=target, quantize=format).save(tmp_path / "m.llmc")
    rounded = with_rounded_weights(tmp_path / "m.onnx", format, tmp_path / "rounded.onnx")
    check_session(gpus(target), tmp_path / "m.llmc", rounded, tolerance("float32", *FORMATS[format]))


@pytest.mark.slow
@pytest.mark.parametrize("target", CAPABILITY)
@pytest.mark.parametrize("kv_cache", CACHES)
def test_caches(kv_cache: str, target: str, gpus: Callable[[str], Call], tmp_path: Path) -> None:
    Decoder(SHAPE).std23(tmp_path / "m.onnx")
    compile(tmp_path / "m.onnx", target=target, kv_cache=kv_cache).save(tmp_path / "m.llmc")
    check_session(gpus(target), tmp_path / "m.llmc", tmp_path / "m.onnx", tolerance("float32", *CACHES[kv_cache]))
