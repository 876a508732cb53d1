"""Writing an artifact: a zip of stored, page-aligned entries, byte for byte reproducible, all of it or none.

Tensors are streamed through one file: nothing is held twice, and a lazy mapping needs memory for one tensor at a
time. The file appears under its name only when complete: written beside it, synced, then renamed over it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import stat
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from llmc.errors import ArtifactError
from llmc.package.layout import (
    DEVICE_KERNELS,
    ENTRY_ALIGN,
    LIBRARY,
    MANIFEST,
    PIECE,
    RUNTIME,
    RUNTIME_CUDA,
    WEIGHTS,
    safe_name,
    up_to,
)
from llmc.package.manifest import EntrySpec, Manifest, ParamSpec
from llmc.package.replace import replacing
from llmc.package.safetensors import PADDING, plan

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first date that a zip can hold
_ZIP64_EXTRA = 20  # bytes that zipfile appends to the local header of an entry opened with force_zip64
_PADDING_ID = 0xD935  # the extra field by which Android's zipalign pads
_COPY = 1 << 20


def write_artifact(
    path: str | Path,
    manifest: Manifest,
    *,
    lib: bytes | Path,
    tensors: Mapping[str, np.ndarray],
    extras: Mapping[str, bytes | Path] | None = None,
    include_runtime: bool = False,
) -> Manifest:
    """Write the artifact `path`; returns the manifest as written, with its entries.

    `lib` is the compiled library, or the path to it. `tensors` maps each key in `manifest.tensors()` to an array of
    the dtype and shape given there; a key is asked for once, in that order, so a mapping may compute it then.
    `extras` are further files by name (tokenizer.json, chat_template.jinja). `include_runtime` adds TVM's two runtime
    libraries (about 6 MB), with which a C program, or Python without apache-tvm, can run the model; where the extras
    hold kernels for a GPU, TVM's runtime for CUDA, too.
    Raises ArtifactError if arrays and manifest disagree or the file cannot be written; `path` is then untouched.
    """
    path = Path(path)
    runtime = (*RUNTIME, RUNTIME_CUDA) if DEVICE_KERNELS in (extras or {}) else RUNTIME
    files: dict[str, bytes | Path] = {LIBRARY: lib, **(_runtime_libraries(runtime) if include_runtime else {})}
    for name, content in (extras or {}).items():
        if name in (MANIFEST, LIBRARY, WEIGHTS, *RUNTIME, RUNTIME_CUDA) or not safe_name(name):
            raise ArtifactError(f"an extra file cannot be called {name!r}", where=str(path))
        files[name] = content
    with replacing(path, ArtifactError) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        entries = {name: _write_entry(archive, name, _read_blocks(files[name])) for name in sorted(files)}
        entries[WEIGHTS] = _write_entry(archive, WEIGHTS, _tensor_blocks(manifest.tensors(), tensors))
        written = dataclasses.replace(manifest, entries=entries)
        _write_entry(archive, MANIFEST, [memoryview(written.to_json())])
    return written


def _write_entry(archive: zipfile.ZipFile, name: str, blocks: Iterable[memoryview]) -> EntrySpec:
    info = zipfile.ZipInfo(name, _EPOCH)
    info.create_system, info.external_attr = 3, (stat.S_IFREG | 0o644) << 16
    assert archive.fp is not None
    data_start = archive.fp.tell() + 30 + len(name) + _ZIP64_EXTRA + 6
    padding = 2 + up_to(data_start, ENTRY_ALIGN)
    info.extra = struct.pack("<HHH", _PADDING_ID, padding, ENTRY_ALIGN) + bytes(padding - 2)
    hashes = _PieceHashes()
    with archive.open(info, "w", force_zip64=True) as entry:
        for block in blocks:
            hashes.update(block)
            entry.write(block)
    info.extra = b""  # the padding belongs to the local header: the directory does not repeat it
    return hashes.spec()


class _PieceHashes:
    """SHA-256 of every PIECE bytes of a stream."""

    def __init__(self) -> None:
        self._size = 0
        self._done: list[str] = []
        self._current = hashlib.sha256()

    def update(self, block: memoryview) -> None:
        while len(block):
            part = block[: PIECE - self._size % PIECE]
            self._current.update(part)
            self._size += len(part)
            if self._size % PIECE == 0:
                self._done.append(self._current.hexdigest())
                self._current = hashlib.sha256()
            block = block[len(part) :]

    def spec(self) -> EntrySpec:
        last = [self._current.hexdigest()] if self._size % PIECE or not self._size else []
        return EntrySpec(self._size, (*self._done, *last))


def _read_blocks(content: bytes | Path) -> Iterator[memoryview]:
    if isinstance(content, bytes):
        yield memoryview(content)
        return
    with open(content, "rb") as file:
        while block := file.read(_COPY):
            yield memoryview(block)


def _tensor_blocks(specs: Mapping[str, ParamSpec], tensors: Mapping[str, np.ndarray]) -> Iterator[memoryview]:
    taken = next((name for name in specs if name.startswith(PADDING)), None)
    if taken is not None:
        raise ArtifactError(f"a tensor cannot be called {taken!r}: the prefix is reserved", where=WEIGHTS)
    header, parts = plan(specs)
    yield memoryview(header)
    for key, size in parts:
        if key is None:
            yield memoryview(bytes(size))
            continue
        spec, array = specs[key], tensors[key]
        if array.dtype.name != spec.dtype or array.shape != spec.shape:
            given, wanted = f"{array.dtype.name} {list(array.shape)}", f"{spec.dtype} {list(spec.shape)}"
            raise ArtifactError(f"tensor {key!r} is {given}; the manifest says {wanted}", where=WEIGHTS)
        # Types of ml_dtypes export no buffer: every array is written as the bytes that it is.
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        for start in range(0, size, _COPY):
            yield data[start : start + _COPY]


def _runtime_libraries(names: Iterable[str]) -> dict[str, bytes | Path]:
    """TVM's runtime libraries from the installed wheels, found without importing them."""
    found: dict[str, bytes | Path] = {}
    for name in names:
        package = "tvm_ffi" if "ffi" in name else "tvm"
        spec = importlib.util.find_spec(package)
        library = Path(spec.origin).parent / "lib" / Path(name).name if spec and spec.origin else None
        if library is None or not library.is_file():
            raise ArtifactError(f"{Path(name).name} is not installed", hint="pip install apache-tvm apache-tvm-ffi")
        found[name] = library
    return found
