"""Whole decoders compiled for x86-amx: the artifact's own machine code, from loading to tokens, under the emulator."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import llmc
from llmc.cli import main
from llmc.package.layout import LIBRARY
from llmc.package.reader import open_artifact
from llmc.pipeline import compile
from llmc.schedules.attention.attention import Attention
from llmc.targets.detect import machine
from llmc.targets.x86 import AVX512
from llmc.tune.machine_code import readable
from tests import amx_emulator
from tests.graphs import Decoder, Shape

PROMPT, STEPS = 40, 3
IDS = np.random.default_rng(7).integers(0, Shape.vocab, PROMPT + STEPS)
Logits = Callable[[str], np.ndarray]
ROOT = Path(__file__).parents[2]

# What a user would do, in a process that knows no compiler; only the machine pretends.
USER = """
import json, sys
import numpy as np
import llmc
from llmc.runtime import library
from tests import amx_emulator

amx_emulator.enable()
if not amx_emulator.NATIVE:
    flags = library.cpu_flags() | amx_emulator.FLAGS
    library.cpu_flags = lambda: flags
    library.permit_tiles = lambda: None
artifact, ids, out = sys.argv[1:]
STEPS = 3
ids = np.load(ids)
session = llmc.load(artifact).session()
counts = lambda: {} if amx_emulator.NATIVE else amx_emulator.emulator().counts()
logits = [session.append(ids[:-STEPS], all=True)]
prompt = counts()
logits += [session.append([token])[:, None] for token in ids[-STEPS:]]
np.save(out, np.concatenate(logits, axis=1))
assert "tvm" not in sys.modules
print(json.dumps([prompt, counts()]))
"""


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if missing := machine().missing(AVX512):
        pytest.skip(f"CPU lacks {missing}")
    if not amx_emulator.NATIVE:
        amx_emulator.build("emulator.c")  # skips where it cannot
    return Decoder(Shape(hidden=128, inner=160)).plain(tmp_path_factory.mktemp("model") / "plain.onnx")


@pytest.fixture(scope="module")
def on_avx512(decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], np.ndarray]:
    """The logits of x86-avx512 by format, as `both` has them."""

    @functools.cache
    def logits(format: str) -> np.ndarray:
        artifact = tmp_path_factory.mktemp("avx512") / "m.llmc"
        compile(decoder, target="x86-avx512", quantize=format).save(artifact)
        session = llmc.load(artifact).session()
        parts = [session.append(IDS[:-STEPS], all=True)]
        parts += [session.append([token])[:, None] for token in IDS[-STEPS:]]
        return np.concatenate(parts, axis=1)

    return logits


def on_amx(decoder: Path, folder: Path, format: str) -> tuple[np.ndarray, dict[str, int], dict[str, int]]:
    """The logits of x86-amx, a prompt's at once and then some tokens' one by one; the instructions that the prompt
    took, and those of all."""
    compile(decoder, target="x86-amx", quantize=format).save(folder / "x86-amx.llmc")
    np.save(folder / "ids.npy", IDS)
    files = [str(folder / name) for name in ("x86-amx.llmc", "ids.npy", "logits.npy")]
    done = subprocess.run([sys.executable, "-c", USER, *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return np.load(folder / "logits.npy"), *json.loads(done.stdout)


@pytest.mark.parametrize(
    "format",
    ["w4a8-g32", *(pytest.param(f, marks=pytest.mark.slow) for f in ("w8a8-g64", "w4a8-g128", "nf4a8-g64"))],
)
def test_integers_equal_avx512(
    decoder: Path, on_avx512: Logits, tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same logits, of a prompt on tiles and of single tokens without; with attention on vectors, as a tuner may
    choose it, nothing but integers is on tiles."""
    default = Attention.default
    vectors = {"BQ": 48, "body": "vectors"}
    monkeypatch.setattr(
        Attention, "default", lambda self, w, target: default(self, w, target) | (vectors if w.bf16 else {})
    )
    amx, prompt, all_ = on_amx(decoder, tmp_path, format)
    np.testing.assert_array_equal(amx, on_avx512(format))
    if not amx_emulator.NATIVE:
        assert all(prompt[name] > 0 for name in ("ldtilecfg", "tileloadd", "tdpbsud", "tilestored", "tilerelease"))
        assert "tdpbf16ps" not in prompt
        assert all_ == prompt  # single tokens take VNNI


def test_attention_on_tiles(decoder: Path, on_avx512: Logits, tmp_path: Path) -> None:
    """As compiled by default: attention in bfloat16 amid integers."""
    amx, prompt, all_ = on_amx(decoder, tmp_path, "w4a8-g32")
    # What bfloat16 moves, the layer behind it rounds to another code of int8 here and there.
    assert 0.999 < cosines(amx, on_avx512("w4a8-g32")).min() < 1
    if not amx_emulator.NATIVE:
        assert prompt["tdpbf16ps"] > 0 and prompt["tdpbsud"] > 0
        assert all_ == prompt
    if readable():
        names = emitted(tmp_path / "x86-amx.llmc", tmp_path)
        assert {"ldtilecfg", "tdpbf16ps", "tdpbsud"} < names <= amx_emulator.emulator().names()


def test_bf16_decoder(decoder: Path, on_avx512: Logits, tmp_path: Path) -> None:
    """Against float activations: what is left is their rounding to bfloat16."""
    amx, prompt, all_ = on_amx(decoder, tmp_path, "bf16")
    assert 0.9999 < cosines(amx, on_avx512("bf16")).min() < 1
    if not amx_emulator.NATIVE:
        assert prompt["tdpbf16ps"] > 0 and all_ == prompt


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.asarray((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1))


def emitted(artifact: Path, folder: Path) -> set[str]:
    """The tile instructions in an artifact's machine code."""
    library = folder / "lib.so"
    library.write_bytes(open_artifact(artifact).read(LIBRARY))
    command = ["objdump", "-d", "--no-show-raw-insn", str(library)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return set(re.findall(r"\t((?:tdp|tile|ldtile|sttile)\w+)", text))


@pytest.mark.skipif(amx_emulator.NATIVE, reason="this CPU has tiles")
def test_refused_where_there_are_no_tiles(decoder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    artifact = tmp_path / "m.llmc"
    compile(decoder, target="x86-amx", quantize="w4a8-g32").save(artifact)
    assert main(["run", str(artifact)]) == 6
    said = capfd.readouterr().err
    assert "compiled for x86-amx and needs amx_bf16, amx_int8, amx_tile, which this CPU lacks" in said
    assert "hint: compile the model for this machine" in said
