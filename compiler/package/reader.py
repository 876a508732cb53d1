"""Opening an artifact: everything is verified before anything is loaded. Standard library only.

An artifact is code. The hashes prove that a file is what was written, not that its author means well: run only
artifacts that you would run as a program.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
import struct
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from llmc.errors import ArtifactError
from llmc.package.layout import MANIFEST, MAX_MANIFEST, PIECE, TENSOR_ALIGN, WEIGHTS, safe_name
from llmc.package.manifest import EntrySpec, Manifest
from llmc.package.safetensors import StoredTensor, parse_header
from llmc.package.strict import Mismatch

_DAMAGED = "the file is damaged or was altered; copy it again or compile the model again"
_MAX_ENTRIES = 1000


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
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for its writer
            raise ArtifactError("is not a file", where=where)
        with open(path, "rb") as file:
            entries, manifest_crc = _directory(file, where)
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise ArtifactError(f"cannot be read: {error.strerror or error}", where=where) from error
    manifest = _manifest(data, entries[MANIFEST], manifest_crc, where)
    expected = set(manifest.entries) | {MANIFEST}
    if set(entries) != expected:
        differing = sorted(set(entries) ^ expected)[0]
        raise ArtifactError(
            f"entry {differing!r} is in the file or in the manifest, not in both", where=where, hint=_DAMAGED
        )
    with memoryview(data) as view:
        _verify(view, entries, manifest.entries, where)
        tensors = _tensors(view, entries[WEIGHTS], manifest, where)
    return Artifact(Path(path), manifest, entries, tensors, data)


def _directory(file: BinaryIO, where: str) -> tuple[dict[str, Entry], int]:
    """Entries by name, and the manifest's CRC. Refuses whatever `write_artifact` would not have written."""

    def refuse(what: str) -> ArtifactError:
        return ArtifactError(what, where=where, hint=_DAMAGED)

    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, struct.error, EOFError):
        raise ArtifactError("is not an llmc artifact, or is truncated", where=where, hint=_DAMAGED) from None
    infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    if len(infos) > _MAX_ENTRIES:
        raise refuse(f"holds {len(infos)} entries")
    entries: dict[str, Entry] = {}
    end = 0
    for info in infos:
        name = info.filename
        if name != info.orig_filename or not safe_name(name):
            raise refuse(f"entry name {info.orig_filename!r} is not allowed")
        if name in entries:
            raise refuse(f"entry {name} is there twice")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits:
            raise refuse(f"entry {name} is compressed or encrypted")
        if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
            raise refuse(f"entry {name} is a link or a special file")
        offset = _data_offset(file, info)
        if offset is None or info.header_offset < end or offset + info.file_size > archive.start_dir:
            raise refuse(f"entry {name} overlaps another or lies outside the file")
        end = offset + info.file_size
        entries[name] = Entry(offset, info.file_size)
    if MANIFEST not in entries:
        raise refuse(f"holds no {MANIFEST}: not an llmc artifact")
    return entries, archive.getinfo(MANIFEST).CRC


def _data_offset(file: BinaryIO, info: zipfile.ZipInfo) -> int | None:
    """Where an entry's data begin according to its local header; None if that is not a header of this entry."""
    name = info.filename.encode()
    file.seek(info.header_offset)
    header = file.read(30 + len(name))
    if len(header) != 30 + len(name):
        return None
    signature, _, flags, method, *_, name_length, extra_length = struct.unpack("<4s5H3I2H", header[:30])
    if (signature, flags, method, header[30:]) != (b"PK\3\4", 0, 0, name) or name_length != len(name):
        return None
    return int(info.header_offset + 30 + name_length + extra_length)


def _manifest(data: mmap.mmap, entry: Entry, crc: int, where: str) -> Manifest:
    """The manifest holds every other entry's hash; its own bytes are covered by the zip's CRC."""
    text = data[entry.offset : entry.offset + min(entry.size, MAX_MANIFEST + 1)]
    if len(text) > MAX_MANIFEST or zlib.crc32(text) != crc:
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
        if entry.size != spec.size:
            raise ArtifactError(
                f"{name} has {entry.size} bytes, the manifest says {spec.size}", where=where, hint=_DAMAGED
            )
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
