"""Whole decoders compiled for x86-amx: the artifact's own machine code, from loading to tokens, under the emulator."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import llmc
from llmc.cli import main
from llmc.pipeline import compile
from llmc.targets.detect import machine
from llmc.targets.x86 import AVX512
from tests import amx_emulator
from tests.graphs import Decoder, Shape

PROMPT, STEPS = 40, 3
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


def both(decoder: Path, folder: Path, format: str) -> tuple[np.ndarray, np.ndarray, dict[str, int], dict[str, int]]:
    """Logits of x86-amx and of x86-avx512, a prompt's at once and then some tokens' one by one; the instructions that
    the prompt took, and those of all."""
    for target in ("x86-amx", "x86-avx512"):
        compile(decoder, target=target, quantize=format).save(folder / f"{target}.llmc")
    ids = np.random.default_rng(7).integers(0, Shape.vocab, PROMPT + STEPS)
    np.save(folder / "ids.npy", ids)
    files = [str(folder / name) for name in ("x86-amx.llmc", "ids.npy", "logits.npy")]
    done = subprocess.run([sys.executable, "-c", USER, *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    session = llmc.load(folder / "x86-avx512.llmc").session()
    logits = [session.append(ids[:-STEPS], all=True)]
    logits += [session.append([token])[:, None] for token in ids[-STEPS:]]
    return np.load(folder / "logits.npy"), np.concatenate(logits, axis=1), *json.loads(done.stdout)


@pytest.mark.parametrize(
    "format",
    ["w4a8-g32", *(pytest.param(f, marks=pytest.mark.slow) for f in ("w8a8-g64", "w4a8-g128", "nf4a8-g64"))],
)
def test_decoder_equals_avx512(decoder: Path, tmp_path: Path, format: str) -> None:
    """The same logits, of a prompt on tiles and of single tokens without."""
    amx, avx512, prompt, all_ = both(decoder, tmp_path, format)
    np.testing.assert_array_equal(amx, avx512)
    if not amx_emulator.NATIVE:
        assert all(prompt[name] > 0 for name in ("ldtilecfg", "tileloadd", "tdpbsud", "tilestored", "tilerelease"))
        assert all_ == prompt  # single tokens take VNNI


def test_bf16_decoder(decoder: Path, tmp_path: Path) -> None:
    """Against float activations: what is left is their rounding to bfloat16."""
    amx, avx512, prompt, all_ = both(decoder, tmp_path, "bf16")
    cosine = (amx * avx512).sum(-1) / np.linalg.norm(amx, axis=-1) / np.linalg.norm(avx512, axis=-1)
    assert 0.9999 < cosine.min() < 1
    if not amx_emulator.NATIVE:
        assert prompt["tdpbf16ps"] > 0 and all_ == prompt


@pytest.mark.skipif(amx_emulator.NATIVE, reason="this CPU has tiles")
def test_refused_where_there_are_no_tiles(decoder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    artifact = tmp_path / "m.llmc"
    compile(decoder, target="x86-amx", quantize="w4a8-g32").save(artifact)
    assert main(["run", str(artifact)]) == 6
    said = capfd.readouterr().err
    assert "compiled for x86-amx and needs amx_bf16, amx_int8, amx_tile, which this CPU lacks" in said
    assert "hint: compile the model for this machine" in said
