"""Opening an artifact: everything is verified before anything is loaded. Standard library only.

An artifact is code. The hashes prove that a file is what was written, not that its author means well: run only
artifacts that you would run as a program.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from llmc.errors import ArtifactError
from llmc.package.directory import BadZip, ZipEntry, read_directory
from llmc.package.layout import MANIFEST, MAX_JSON, PIECE, TENSOR_ALIGN, WEIGHTS
from llmc.package.manifest import EntrySpec, Manifest
from llmc.package.safetensors import StoredTensor, parse_header
from llmc.package.strict import Mismatch

_DAMAGED = "the file is damaged or was altered; copy it again or compile the model again"


@dataclass(frozen=True)
class Entry:
    """Where an entry's bytes lie in the file."""

    offset: int
    size: int


@dataclass(frozen=True)
class Artifact:
    """A verified artifact, mapped into memory.

    `data` is the whole file, private and writable (DLPack takes no read-only memory; nothing is ever written).
    `tensors` holds the weights by key, with offsets from the start of `data`, all multiples of 64.
    """

    path: Path
    manifest: Manifest
    entries: dict[str, Entry]
    tensors: dict[str, StoredTensor]
    data: mmap.mmap

    def read(self, name: str) -> bytes:
        """The bytes of an entry, checked against its hash once more. Raises ArtifactError if there is none."""
        if name not in self.manifest.entries:
            raise ArtifactError(f"holds no {name}", where=str(self.path))
        entry = self.entries[name]
        content = self.data[entry.offset : entry.offset + entry.size]
        _verify(memoryview(content), {name: Entry(0, entry.size)}, {name: self.manifest.entries[name]}, str(self.path))
        return content


def open_artifact(path: str | Path) -> Artifact:
    """Open and verify the artifact `path`: its structure, manifest, the hash of every byte, and the weights' header.

    Takes about 0.3 s per GB with two cores. Raises ArtifactError.
    """
    where = str(path)
    try:
        with open(path, "rb", opener=_opened) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ArtifactError("is not a file", where=where)
            found, manifest = _entries(file, where)
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except IsADirectoryError:
        raise ArtifactError("is not a file", where=where) from None
    except ValueError as error:  # a name that no file can have, or a file that became empty meanwhile
        raise ArtifactError(f"cannot be read: {error}", where=where) from None
    except OSError as error:
        raise ArtifactError(f"cannot be read: {error.strerror or error}", where=where) from error
    entries = {name: Entry(entry.offset, entry.size) for name, entry in found.items()}
    with memoryview(data) as view:
        _verify(view, entries, manifest.entries, where)
        tensors = _tensors(view, entries[WEIGHTS], manifest, where)
    return Artifact(Path(path), manifest, entries, tensors, data)


def _opened(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe without a writer must not block


def _entries(file: BinaryIO, where: str) -> tuple[dict[str, ZipEntry], Manifest]:
    """The entries by name, and the manifest, which must agree about names and sizes. Nothing else is read yet."""
    try:
        found = read_directory(file, os.fstat(file.fileno()).st_size)
    except BadZip as error:
        raise ArtifactError(str(error), where=where, hint=_DAMAGED) from None
    if MANIFEST not in found:
        raise ArtifactError(f"holds no {MANIFEST}: not an llmc artifact", where=where, hint=_DAMAGED)
    manifest = _manifest(file, found[MANIFEST], where)
    expected = set(manifest.entries) | {MANIFEST}
    if set(found) != expected:
        differing = sorted(set(found) ^ expected)[0]
        raise ArtifactError(
            f"entry {differing!r} is in the file or in the manifest, not in both", where=where, hint=_DAMAGED
        )
    for name, spec in manifest.entries.items():
        if found[name].size != spec.size:
            raise ArtifactError(
                f"{name} has {found[name].size} bytes, the manifest says {spec.size}", where=where, hint=_DAMAGED
            )
    return found, manifest


def _manifest(file: BinaryIO, entry: ZipEntry, where: str) -> Manifest:
    """The manifest holds every other entry's hash; its own bytes are covered by the zip's CRC."""
    file.seek(entry.offset)
    text = file.read(min(entry.size, MAX_JSON + 1))
    if len(text) > MAX_JSON:
        raise ArtifactError(f"{MANIFEST} is longer than {MAX_JSON >> 20} MiB", where=where, hint=_DAMAGED)
    if zlib.crc32(text) != entry.crc:
        raise ArtifactError(f"{MANIFEST} fails its checksum", where=where, hint=_DAMAGED)
    try:
        return Manifest.from_json(text)
    except ArtifactError as error:
        raise ArtifactError(error.what, where=f"{where}: {error.where}", hint=error.hint) from None


def _verify(data: memoryview, entries: dict[str, Entry], specs: dict[str, EntrySpec], where: str) -> None:
    """Compares the hash of every piece; pieces are shared out over the cores (hashing releases the GIL)."""
    pieces = []
    for name, spec in specs.items():
        entry = entries[name]
        for i, digest in enumerate(spec.sha256):
            start = entry.offset + i * PIECE
            pieces.append((name, start, min(start + PIECE, entry.offset + entry.size), digest))

    def intact(piece: tuple[str, int, int, str]) -> bool:
        _, start, end, digest = piece
        with data[start:end] as part:
            return hashlib.sha256(part).hexdigest() == digest

    with ThreadPoolExecutor(min(len(pieces), len(os.sched_getaffinity(0)))) as pool:
        for piece, good in zip(pieces, pool.map(intact, pieces), strict=True):
            if not good:
                raise ArtifactError(f"{piece[0]} does not match its SHA-256", where=where, hint=_DAMAGED)


def _tensors(data: memoryview, weights: Entry, manifest: Manifest, where: str) -> dict[str, StoredTensor]:
    """The weights by key with offsets into the file, compared with what the manifest says of them."""
    where = f"{where}: {WEIGHTS}"
    try:
        with data[weights.offset : weights.offset + weights.size] as part:
            stored = parse_header(part)
    except Mismatch as error:
        raise ArtifactError(str(error), where=where, hint=_DAMAGED) from None
    for name, param in manifest.params.items():
        tensor = stored.get(param.tensor)
        if tensor is None or (tensor.dtype, tensor.shape) != (param.dtype, param.shape):
            raise ArtifactError(f"tensor {param.tensor!r} is not what params.{name} says", where=where, hint=_DAMAGED)
        if (weights.offset + tensor.offset) % TENSOR_ALIGN:
            raise ArtifactError(
                f"tensor {param.tensor!r} is not aligned to {TENSOR_ALIGN} bytes", where=where, hint=_DAMAGED
            )
    return {key: StoredTensor(t.dtype, t.shape, weights.offset + t.offset, t.size) for key, t in sorted(stored.items())}
