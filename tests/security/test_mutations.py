"""A few hundred damaged files, the same ones every time: each is read or refused by an error of llmc's own, at once.

The fuzzer (benchmarks/fuzz_reader.py) does the same without end, led by coverage.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from llmc.errors import ArtifactError, LlmcError, ModelError, OptionError, ShapeError
from llmc.importer import import_model
from llmc.importer.reader import read_model
from llmc.package.layout import WEIGHTS
from llmc.package.manifest import Manifest
from llmc.package.reader import open_artifact
from llmc.package.safetensors import parse_header
from llmc.package.strict import Mismatch
from tests.package import files
from tests.security import seeds

SECONDS = 1.0


def survive(
    read: Callable[[Path], Any], path: Path, contents: Iterable[bytes], errors: tuple[type[Exception], ...]
) -> tuple[int, int]:
    """How many files were read, and how many refused. Anything but `errors` is a mistake of the reader's."""
    accepted = refused = 0
    for content in contents:
        path.write_bytes(content)
        start = time.process_time()
        try:
            read(path)
            accepted += 1
        except errors as error:
            assert str(error)
            refused += 1
        assert time.process_time() - start < SECONDS
    return accepted, refused


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    (tmp_path / seeds.DATA).write_bytes(bytes(64))
    return tmp_path / "model.onnx"


def test_seeds_are_good(model_path: Path, tmp_path: Path) -> None:
    assert survive(read_model, model_path, seeds.models().values(), (LlmcError,)) == (len(seeds.models()), 0)
    assert survive(open_artifact, tmp_path / "m.llmc", [seeds.artifact()], (LlmcError,)) == (1, 0)
    for name in ("linear", "shapes", "branches", "functions"):
        model_path.write_bytes(seeds.models()[name])
        assert import_model(model_path).outputs == ("y",)


def test_models_are_read_or_refused(model_path: Path) -> None:
    contents = seeds.damaged(list(seeds.models().values()), 600)
    accepted, refused = survive(read_model, model_path, contents, (ModelError,))
    assert accepted > 30 and refused > 300, "both must happen, or the test shows nothing"


def test_models_are_imported_or_refused(model_path: Path) -> None:
    """Bits alone, a file each: most of these files pass the reader and reach the rules."""
    contents = list(seeds.models().values())
    damage = (d for d in seeds.damaged(contents, 400, seed=1) if len(d) > 100)
    errors = (ModelError, ShapeError, OptionError)
    accepted, refused = survive(import_model, model_path, damage, errors)
    assert accepted > 10 and refused > 100


def test_artifacts_are_opened_or_refused(tmp_path: Path) -> None:
    contents = seeds.damaged([seeds.artifact()], 300)
    _, refused = survive(open_artifact, tmp_path / "m.llmc", contents, (ArtifactError,))
    assert refused > 200


def test_manifests_are_decoded_or_refused(tmp_path: Path) -> None:
    text = files.manifest().to_json()
    small = json.dumps(json.loads(text)).encode()

    def decode(path: Path) -> None:
        Manifest.from_json(path.read_bytes())

    survive(decode, tmp_path / "manifest.json", seeds.damaged([text, small], 400), (ArtifactError,))


def test_headers_of_weights_are_parsed_or_refused(tmp_path: Path) -> None:
    weights = files.weights_entry(files.write(tmp_path / "m.llmc"))
    (length,) = struct.unpack("<Q", weights[:8])

    def parse(path: Path) -> None:
        header = path.read_bytes()
        parse_header(memoryview(struct.pack("<Q", len(header)) + header + weights[8 + length :]))

    survive(parse, tmp_path / WEIGHTS, seeds.damaged([weights[8 : 8 + length]], 400), (Mismatch,))
