"""Reading: a file that is not exactly what was written is refused before anything of it is used."""

from __future__ import annotations

import json
import os
import shutil
import stat
import struct
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmc.errors import ArtifactError
from llmc.package.layout import MANIFEST, WEIGHTS
from llmc.package.reader import open_artifact
from tests.package import files


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return files.write(tmp_path_factory.mktemp("good") / "m.llmc", extras={"tokenizer.json": b"{}" * 99})


def everything(path: Path) -> dict[str, bytes]:
    artifact = open_artifact(path)
    return {name: artifact.read(name) for name in artifact.manifest.entries} | {MANIFEST: artifact.manifest.to_json()}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_flipped_bit_is_refused_or_harmless(good: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Harmless: in the padding between entries, or where a zip holds what is read nowhere."""
    content = bytearray(good.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    changed = tmp_path / "changed.llmc"
    changed.write_bytes(content)
    try:
        found = everything(changed)
    except ArtifactError:
        return
    assert found == everything(good)


@pytest.mark.parametrize("name", ["lib.so", WEIGHTS, "tokenizer.json", MANIFEST])
def test_a_flipped_bit_of_content_is_refused(good: Path, tmp_path: Path, name: str) -> None:
    entry = open_artifact(good).entries[name]
    for position in (0, entry.size // 2, entry.size - 1):
        content = bytearray(good.read_bytes())
        content[entry.offset + position] ^= 4
        (tmp_path / "m.llmc").write_bytes(content)
        with pytest.raises(ArtifactError, match=f"{name} (does not match|fails)"):
            open_artifact(tmp_path / "m.llmc")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused(good: Path, tmp_path: Path, share: float) -> None:
    content = good.read_bytes()
    (tmp_path / "cut.llmc").write_bytes(content[: int(share * len(content))])
    with pytest.raises(ArtifactError):
        open_artifact(tmp_path / "cut.llmc")


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"PK\3\4" + b"\0" * 100, b"PK\5\6" + b"\0" * 18, b"PK\5\6" + b"\xff" * 18]
)
def test_what_is_no_artifact(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ArtifactError):
        open_artifact(tmp_path / "x")


def test_places_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ArtifactError, match="No such file"):
        open_artifact(tmp_path / "absent")
    with pytest.raises(ArtifactError, match="not a file"):
        open_artifact(tmp_path)
    with pytest.raises(ArtifactError, match="not a file"):
        open_artifact(tmp_path / "pipe")


def rezip(path: Path, source: Path, change: str, name: str = "extra") -> Path:
    """The same artifact with one hostile entry more, or one made hostile."""
    shutil.copy(source, path)
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        info = zipfile.ZipInfo(name)
        if change == "link":
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, b"/etc/passwd")
        elif change == "bomb":
            archive.writestr(info, bytes(50 << 20), zipfile.ZIP_DEFLATED)
        else:
            archive.writestr(info, b"x")
    return path


@pytest.mark.parametrize(
    ("change", "name", "says"),
    [
        ("more", "lib.so", "there twice"),
        ("more", "../escape", "not allowed"),
        ("more", "/etc/passwd", "not allowed"),
        ("more", "a/../b", "not allowed"),
        ("more", "c:\\windows", "not allowed"),
        ("more", "folder/", "not allowed"),
        ("link", "extra", "a link"),
        ("bomb", "extra", "compressed"),
        ("more", "unlisted", "not in both"),
    ],
)
def test_hostile_entries(good: Path, tmp_path: Path, change: str, name: str, says: str) -> None:
    with pytest.raises(ArtifactError, match=says):
        open_artifact(rezip(tmp_path / "m.llmc", good, change, name))


def test_a_missing_entry(good: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(tmp_path / "m.llmc", "w") as new:
        for info in old.infolist():
            if info.filename != "lib.so":
                new.writestr(info.filename, old.read(info))
    with pytest.raises(ArtifactError, match=r"lib\.so"):
        open_artifact(tmp_path / "m.llmc")


def test_overlapping_entries(good: Path, tmp_path: Path) -> None:
    """Two directory records that point at the same bytes: how zip bombs multiply."""
    content = bytearray(good.read_bytes())
    headers = [i for i in range(len(content)) if content[i : i + 4] == b"PK\1\2"]
    content[headers[1] + 42 : headers[1] + 46] = content[headers[0] + 42 : headers[0] + 46]
    (tmp_path / "m.llmc").write_bytes(content)
    with pytest.raises(ArtifactError, match="overlaps"):
        open_artifact(tmp_path / "m.llmc")


def test_an_encrypted_entry(good: Path, tmp_path: Path) -> None:
    content = bytearray(good.read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1
    (tmp_path / "m.llmc").write_bytes(content)
    with pytest.raises(ArtifactError, match="encrypted"):
        open_artifact(tmp_path / "m.llmc")


def test_a_forged_manifest_cannot_claim_other_tensors(good: Path, tmp_path: Path) -> None:
    assert everything(files.forge(tmp_path / "same.llmc", good, {}))["lib.so"] == files.LIB
    document = json.loads(files.manifest().to_json())
    document["params"]["odd"]["shape"] = [300, 5]
    with pytest.raises(ArtifactError, match=r"params\.odd"):
        open_artifact(files.forge(tmp_path / "m.llmc", good, {}, {"params": document["params"]}))


def weights_with(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def one(dtype: object = "U8", shape: object = (4,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        (b"", "too short"),
        (b"\xff" * 8, "claims"),
        (weights_with({}, length=1 << 40), "claims"),
        (weights_with(b"nonsense"), "not JSON"),
        (weights_with(b"[" * 50_000), "nested|not JSON"),
        (weights_with(b"[]"), "not an object"),
        (weights_with(b'{"a": {}, "a": {}}'), "same key twice"),
        (weights_with(one("U9"), b"1234"), "unknown dtype"),
        (weights_with(one(shape=(5,)), b"1234"), "cannot hold"),
        (weights_with(one(shape=(2**40, 2**40), offsets=(0, 4)), b"1234"), "cannot hold"),
        (weights_with(one(shape=(-2, -2)), b"1234"), "cannot hold"),
        (weights_with(one(shape=(2.0, 2)), b"1234"), "shape"),
        (weights_with(one(offsets=(1, 5)), b"12345"), "holes"),
        (weights_with(one(offsets=(4, 0)), b"1234"), "holes|cannot hold"),
        (weights_with(one(offsets=(0, 4, 8)), b"1234"), "data_offsets"),
        (weights_with(one(), b"123"), "holds"),
        (weights_with(one(), b"12345"), "holds"),
        (weights_with({**one(), "b": one()["a"]}, b"1234"), "overlap"),
        (weights_with(one(), b"1234"), "is not what params"),
    ],
)
def test_hostile_weights(good: Path, tmp_path: Path, weights: bytes, says: str) -> None:
    with pytest.raises(ArtifactError, match=says) as error:
        open_artifact(files.forge(tmp_path / "m.llmc", good, {WEIGHTS: weights}))
    assert WEIGHTS in str(error.value)


def test_unaligned_weights(good: Path, tmp_path: Path) -> None:
    weights = files.weights_entry(good)
    (length,) = struct.unpack("<Q", weights[:8])
    moved = struct.pack("<Q", length + 8) + weights[8 : 8 + length] + b" " * 8 + weights[8 + length :]
    with pytest.raises(ArtifactError, match="aligned"):
        open_artifact(files.forge(tmp_path / "m.llmc", good, {WEIGHTS: moved}))


def test_reading_an_entry_that_is_not_there(good: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no chat"):
        open_artifact(good).read("chat_template.jinja")


def test_inspecting_needs_the_standard_library_alone(good: Path) -> None:
    code = """
import sys
from llmc.package.reader import open_artifact
open_artifact(sys.argv[1])
loaded = {name.partition('.')[0] for name in sys.modules} & {'numpy', 'tvm', 'tvm_ffi', 'onnx', 'typer'}
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code, str(good)], check=True)
