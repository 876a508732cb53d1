"""Decoders whose sessions keep keys and values rounded, from ONNX to logits."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import llmc
from llmc.checker import check
from llmc.cli import app
from llmc.cli.common import human_bytes
from llmc.errors import ArtifactError, OptionError
from llmc.pipeline import compile
from llmc.runtime import Model
from llmc.targets.detect import machine
from llmc.targets.x86 import TARGETS
from tests.graphs import Decoder, Shape, encoder

SHAPE = Shape(heads=4, kv_heads=2, head_dim=32, context=640)
WIDEST = "x86-avx512" if not machine().missing(TARGETS["x86-avx512"]) else "x86-avx2"
# Least cosine of a position's logits with those over a float32 cache, and the largest of all errors over the largest
# logit. Random weights are hard on both: nothing in them is redundant. A step of int4 is 17 times one of int8, and so
# is its error; what a cosine lacks of 1 is a square.
DISTANCE = {"int8": (1 - 5e-4, 0.03), "int4": (1 - 5e-4 * 17**2, 0.03 * 17)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kv-cache")
    Decoder(SHAPE).std23(folder / "m.onnx")
    for kv_cache in ("float32", *DISTANCE):
        compile(folder / "m.onnx", target=WIDEST, kv_cache=kv_cache).save(folder / f"{kv_cache}.llmc")
    return folder


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[str, Model]:
    return {kv_cache: llmc.load(folder / f"{kv_cache}.llmc") for kv_cache in ("float32", *DISTANCE)}


def tokens(count: int, batch: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, SHAPE.vocab, (batch, count))


def close(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5 * max(1.0, float(np.abs(expected).max())))


@pytest.mark.parametrize("kv_cache", DISTANCE)
def test_logits_stay_near_those_of_a_float32_cache(models: dict[str, Model], kv_cache: str) -> None:
    ids = tokens(120, batch=2)
    exact, rounded = (models[name].session(2).append(ids, all=True) for name in ("float32", kv_cache))
    cosine = (exact * rounded).sum(-1) / np.linalg.norm(exact, axis=-1) / np.linalg.norm(rounded, axis=-1)
    error = np.abs(exact - rounded).max() / np.abs(exact).max()
    least, most = DISTANCE[kv_cache]
    assert cosine.min() > least and error < most
    assert error > 1e-4, "nothing was rounded"


@pytest.mark.parametrize("kv_cache", DISTANCE)
def test_pieces_of_any_length(models: dict[str, Model], kv_cache: str) -> None:
    """A token is rounded once: how tokens arrive, and through which function, changes nothing."""
    ids = tokens(75)
    expected = models[kv_cache].session().append(ids, all=True)
    session = models[kv_cache].session()
    cuts = [0, 1, 5, 70, 71, 72, 75]
    pieces = [session.append(ids[:, a:b], all=True) for a, b in pairwise(cuts)]
    close(np.concatenate(pieces, axis=1), expected)
    session.reset()
    close(session.append(ids), expected[:, -1])


@pytest.mark.parametrize("kv_cache", DISTANCE)
def test_sessions_go_back_fork_and_grow(models: dict[str, Model], kv_cache: str) -> None:
    ids = tokens(100)
    expected = models[kv_cache].session().append(ids, all=True)
    session = models[kv_cache].session()
    session.append(ids)
    for length in (70, 64, 33, 1):
        session.truncate(length)
        close(session.append(ids[:, length : length + 5], all=True), expected[:, length : length + 5])
    twin = session.fork()
    session.append(tokens(3, seed=1))
    close(twin.append(ids[:, 6:8], all=True), expected[:, 6:8])
    long = tokens(600)
    roomy, small = models[kv_cache].session(), models[kv_cache].session()
    roomy.reserve(600)
    for start, stop in ((0, 500), (500, 600)):
        moved = small.append(long[:, start:stop])
        close(moved, roomy.append(long[:, start:stop]))
    assert small.caches.capacity == 640


def test_avx2_equals_the_widest(models: dict[str, Model], folder: Path, tmp_path: Path) -> None:
    compile(folder / "m.onnx", target="x86-avx2", kv_cache="int8").save(tmp_path / "m.llmc")
    narrow, wide = (m.session().append(tokens(70), all=True) for m in (llmc.load(tmp_path / "m.llmc"), models["int8"]))
    # A sum in another order may move a number across the middle between two codes.
    np.testing.assert_allclose(narrow, wide, rtol=0, atol=1e-2 * float(np.abs(wide).max()))


@pytest.mark.parametrize(("kv_cache", "bytes_"), [("float32", 128), ("int8", 32 + 4), ("int4", 16 + 4)])
def test_memory_of_a_session(models: dict[str, Model], folder: Path, kv_cache: str, bytes_: int) -> None:
    """Keys and values of 2 layers and 2 heads, and their scales; `inspect` says it."""
    decoder, session = models[kv_cache].manifest.decoder, models[kv_cache].session()
    session.reserve(640)
    assert decoder is not None and decoder.kv_cache == kv_cache
    expected = 2 * 2 * 2 * bytes_ * 640
    assert sum(cache.nbytes for cache in session.caches.arrays) == decoder.cache_bytes(640) == expected
    text = CliRunner().invoke(app, ["inspect", str(folder / f"{kv_cache}.llmc")]).output
    assert f"{kv_cache}, {human_bytes(expected // 640)} a token, {human_bytes(expected)} at 640 tokens" in text


@pytest.mark.parametrize("kv_cache", DISTANCE)
def test_check_compares_sessions(folder: Path, kv_cache: str) -> None:
    report = check(folder / f"{kv_cache}.llmc", folder / "m.onnx")
    report.demand()
    assert [c.case for c in report.outputs] == ["past=0, seq=1", "past=1, seq=17", "past=18, seq=70", "past=88, seq=1"]
    with pytest.raises(OptionError, match="has no dimensions"):
        check(folder / f"{kv_cache}.llmc", folder / "m.onnx", dims={"seq": 3})


def test_only_float32_has_the_plain_signature(models: dict[str, Model], folder: Path) -> None:
    assert set(models["float32"].functions) == {"main", "step", "step_last", "decode"}
    assert set(models["int8"].functions) == {"step", "step_last", "decode"}
    assert "sessions only" in repr(models["int8"])
    with pytest.raises(ArtifactError, match="no function main: sessions alone read its cache in int8") as error:
        models["int8"](input_ids=tokens(3))
    assert error.value.hint and "session" in error.value.hint
    result = CliRunner().invoke(app, ["run", str(folder / "int8.llmc")])
    assert result.exit_code != 0 and not isinstance(result.exception, KeyError)


def test_only_decoders_have_a_cache(tmp_path: Path) -> None:
    encoder(tmp_path / "m.onnx")
    with pytest.raises(OptionError, match="no decoder with a cache"):
        compile(tmp_path / "m.onnx", target=WIDEST, kv_cache="int8")


def test_unknown_formats_are_refused_first(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no cache format 'int3'"):
        compile(tmp_path / "missing.onnx", kv_cache="int3")


def test_the_option(folder: Path, tmp_path: Path) -> None:
    line: list[Any] = [
        "compile",
        folder / "m.onnx",
        "--target",
        WIDEST,
        "--kv-cache",
        "int8",
        "-o",
        tmp_path / "m.llmc",
    ]
    result = CliRunner().invoke(app, [*map(str, line), "--json"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "m.llmc").read_bytes() == (folder / "int8.llmc").read_bytes()
    shown = json.loads(CliRunner().invoke(app, ["inspect", str(tmp_path / "m.llmc"), "--json"]).output)
    assert shown["decoder"]["kv_cache"] == "int8"
