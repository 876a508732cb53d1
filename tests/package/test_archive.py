"""Writing: every reader can open the result, bytes are reproducible, and it is all or nothing."""

from __future__ import annotations

import errno
import hashlib
import os
import tracemalloc
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from llmc.errors import ArtifactError
from llmc.package import layout, replace
from llmc.package.archive import write_artifact
from llmc.package.layout import MANIFEST, PIECE, WEIGHTS
from llmc.package.manifest import Manifest
from llmc.package.reader import open_artifact
from tests.package import files


def test_round_trip(tmp_path: Path) -> None:
    artifact = open_artifact(files.write(tmp_path / "m.llmc", extras={"tokenizer.json": b"{}"}))
    assert artifact.read("lib.so") == files.LIB
    assert artifact.read("tokenizer.json") == b"{}"
    for key, expected in files.tensors().items():
        found = files.array_of(artifact, key)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


def test_every_entry_and_tensor_is_aligned(tmp_path: Path) -> None:
    artifact = open_artifact(files.write(tmp_path / "m.llmc"))
    assert all(entry.offset % 4096 == 0 for entry in artifact.entries.values())
    assert all(t.offset % 64 == 0 for t in artifact.tensors.values())
    assert all(files.array_of(artifact, key).ctypes.data % 64 == 0 for key in artifact.tensors)


def test_standard_tools_read_it(tmp_path: Path) -> None:
    path = files.write(tmp_path / "m.llmc")
    with zipfile.ZipFile(path) as opened:
        assert opened.testzip() is None
        opened.extractall(tmp_path / "out")
    loaded = safetensors.numpy.load_file(tmp_path / "out" / WEIGHTS)
    for key, expected in files.tensors().items():
        np.testing.assert_array_equal(loaded[key], expected)
    assert Manifest.from_json((tmp_path / "out" / MANIFEST).read_bytes()).entries


def test_hashes_are_of_the_content(tmp_path: Path) -> None:
    big = os.urandom(PIECE + 5)
    artifact = open_artifact(files.write(tmp_path / "m.llmc", extras={"big": big, "empty": b"", "exact": big[:PIECE]}))

    def digest(content: bytes) -> str:
        return hashlib.sha256(content).hexdigest()

    entries = artifact.manifest.entries
    assert entries["big"].sha256 == (digest(big[:PIECE]), digest(big[PIECE:]))
    assert entries["exact"].sha256 == (digest(big[:PIECE]),)
    assert entries["empty"].sha256 == (digest(b""),)
    assert artifact.read("big") == big


def test_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    library = tmp_path / "given.so"
    library.write_bytes(files.LIB)
    first = files.write(tmp_path / "a.llmc", extras={"b.txt": b"1", "a.txt": b"2"})
    write_artifact(
        tmp_path / "b.llmc",
        files.manifest(),
        lib=library,
        tensors=dict(reversed(files.tensors().items())),
        extras={"a.txt": b"2", "b.txt": b"1"},
    )
    assert first.read_bytes() == (tmp_path / "b.llmc").read_bytes()


def test_types_that_numpy_does_not_know(tmp_path: Path) -> None:
    arrays = {"w": np.arange(70, dtype=np.float32).astype(ml_dtypes.bfloat16)}
    write_artifact(tmp_path / "m.llmc", files.manifest(arrays), lib=b"", tensors=files.tensors(arrays))
    artifact = open_artifact(tmp_path / "m.llmc")
    t = artifact.tensors["t/w"]
    assert t.dtype == "bfloat16"
    assert artifact.data[t.offset : t.offset + t.size] == arrays["w"].tobytes()


class Lazy(Mapping[str, np.ndarray]):
    """Makes each tensor when it is asked for."""

    def __init__(self, arrays: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes, self.asked = arrays, []  # type: ignore[var-annotated]

    def __getitem__(self, key: str) -> np.ndarray:
        self.asked.append(key)
        return np.full(self.shapes[key], len(self.asked), np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def test_lazy_tensors_are_held_one_at_a_time(tmp_path: Path) -> None:
    shape, count = (1024, 1024), 12  # 4 MiB each
    manifest = files.manifest({f"w{i}": np.broadcast_to(np.float32(0), shape) for i in range(count)})
    lazy = Lazy({f"t/w{i}": shape for i in range(count)})
    tracemalloc.start()
    write_artifact(tmp_path / "m.llmc", manifest, lib=b"", tensors=lazy)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 << 20
    assert lazy.asked == [f"t/w{i}" for i in range(count)]
    assert (files.array_of(open_artifact(tmp_path / "m.llmc"), "t/w3") == 4).all()


def test_runtime_libraries(tmp_path: Path) -> None:
    artifact = open_artifact(files.write(tmp_path / "m.llmc", include_runtime=True))
    for name in layout.RUNTIME:
        assert artifact.read(name).startswith(b"\x7fELF")
    assert (tmp_path / "m.llmc").stat().st_size < 10 << 20


@pytest.mark.parametrize("name", ["manifest.json", "lib.so", "weights.safetensors", "../x", "/x", "a//b", "a\\b", ""])
def test_refuses_names_of_extra_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match="cannot be called"):
        files.write(tmp_path / "m.llmc", extras={name: b""})


@pytest.mark.parametrize("wrong", [np.zeros((3, 5), np.float64), np.zeros((5, 3), np.float32)])
def test_arrays_must_be_what_the_manifest_says(tmp_path: Path, wrong: np.ndarray) -> None:
    with pytest.raises(ArtifactError, match="t/odd"):
        write_artifact(tmp_path / "m.llmc", files.manifest(), lib=b"", tensors={**files.tensors(), "t/odd": wrong})
    assert list(tmp_path.iterdir()) == []


class Failing(Lazy):
    def __init__(self, error: BaseException) -> None:
        super().__init__({})
        self.error = error

    def __getitem__(self, key: str) -> np.ndarray:
        if key == "t/codes":
            raise self.error
        return files.tensors()[key]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device"), ValueError()])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    path = files.write(tmp_path / "m.llmc")
    before = path.read_bytes()
    expected = ArtifactError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as raised:
        write_artifact(path, files.manifest(), lib=b"other", tensors=Failing(error))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.llmc"]
    if isinstance(raised.value, ArtifactError):
        assert "No space left" in raised.value.what
        assert "free some space" in str(raised.value.hint)


@pytest.mark.skipif(not os.access("/dev/full", os.W_OK), reason="needs /dev/full")
def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, mode: str) -> object:
        return open("/dev/full", "wb", buffering=0) if mode == "xb" else open(path, mode)

    monkeypatch.setattr(replace, "open", full, raising=False)
    with pytest.raises(ArtifactError, match="No space left"):
        files.write(tmp_path / "m.llmc")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="No such file"):
        files.write(tmp_path / "nowhere" / "m.llmc")


def test_a_new_file_obeys_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        path = files.write(tmp_path / "m.llmc")
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o640
