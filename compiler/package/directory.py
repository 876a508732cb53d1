"""The directory of an artifact's zip, read with suspicion: whatever `write_artifact` would not write is refused.

The standard library's reader trusts the file with how much memory its directory takes, looks for the end record in
several places and forgives a lot; other programs forgive other things. Here there is one place for everything, so that
all readers see the same entries. Paper trail: PKWARE's APPNOTE.TXT, 4.3.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from llmc.package.layout import safe_name

MAX_ENTRIES = 1000

_LOCAL = struct.Struct("<4s5H3I2H")
_RECORD = struct.Struct("<4s6H3I5H2I")  # of the directory
_END = struct.Struct("<4s4H2IH")
_LOCATOR = struct.Struct("<4sIQI")  # of the 64-bit end record
_END_64 = struct.Struct("<4sQ2H2I4Q")
_MAX_BYTES = MAX_ENTRIES * (_RECORD.size + 256 + 64)
_TOO_BIG = 0xFFFFFFFF  # the value is in the 64-bit extra field, or in the 64-bit end record
_NUMBERS_64 = 1  # the extra field with 64-bit numbers
_NO_ZIP = "is not an llmc artifact, or is truncated"


class BadZip(ValueError):
    """Why the file is refused."""


@dataclass(frozen=True)
class ZipEntry:
    """Where an entry's bytes lie in the file, and their CRC-32."""

    offset: int
    size: int
    crc: int


@dataclass(frozen=True)
class _Record:
    name: str
    header: int  # where its local header lies
    size: int
    crc: int


def read_directory(file: BinaryIO, length: int) -> dict[str, ZipEntry]:
    """The entries of a zip file of `length` bytes, by name, in the order of the file. Raises BadZip."""
    start, end = _find(file, length)
    if end - start > _MAX_BYTES:
        raise BadZip(f"its directory has {end - start} bytes: too many entries")
    entries: dict[str, ZipEntry] = {}
    free = 0  # where the entry before ends
    for record in sorted(_records(_read(file, start, end - start)), key=lambda r: r.header):
        if record.name in entries:
            raise BadZip(f"entry {record.name} is there twice")
        offset = _data_offset(file, record) if free <= record.header < start else None
        if offset is None or offset + record.size > start:
            raise BadZip(f"entry {record.name} overlaps another or lies outside the file")
        free = offset + record.size
        entries[record.name] = ZipEntry(offset, record.size, record.crc)
    return entries


def _find(file: BinaryIO, length: int) -> tuple[int, int]:
    """Where the directory starts and ends. Its end record is the last thing in the file."""
    end = length - _END.size
    signature, disk, first, here, count, size, start, comment = _unpack(_END, file, end)
    if signature != b"PK\5\6" or comment:
        raise BadZip(_NO_ZIP)
    numbers = disk, first, here, count, size, start
    before = end - _LOCATOR.size
    if before >= 0 and _read(file, before, 4) == b"PK\6\7":
        _, _, where, _ = _unpack(_LOCATOR, file, before)
        end = before - _END_64.size
        signature, _, _, _, *large = _unpack(_END_64, file, end)
        # The short record repeats what fits into it.
        fits = tuple(min(n, most) for n, most in zip(large, (0, 0, 0xFFFF, 0xFFFF, _TOO_BIG, _TOO_BIG), strict=True))
        if signature != b"PK\6\6" or where != end or fits != numbers:
            raise BadZip(_NO_ZIP)
        disk, first, here, count, size, start = large
    if disk or first or here != count or start + size != end:
        raise BadZip("its directory is not where its end record says")
    if count > MAX_ENTRIES:
        raise BadZip(f"has {count} entries, more than {MAX_ENTRIES}")
    return start, end


def _records(directory: bytes) -> list[_Record]:
    records: list[_Record] = []
    at = 0
    while at < len(directory):
        if len(records) == MAX_ENTRIES:
            raise BadZip(f"has more than {MAX_ENTRIES} entries")
        record, at = _record(directory, at)
        records.append(record)
    return records


def _record(directory: bytes, at: int) -> tuple[_Record, int]:
    fixed = directory[at : at + _RECORD.size]
    if len(fixed) < _RECORD.size or fixed[:4] != b"PK\1\2":
        raise BadZip("its directory is damaged")
    _, _, _, flags, method, _, _, crc, packed, size, name_length, extra_length, comment, disk, _, kind, header = (
        _RECORD.unpack(fixed)
    )
    at += _RECORD.size
    raw = directory[at : at + name_length]
    at += name_length
    extra = directory[at : at + extra_length]
    at += extra_length
    name = raw.decode("latin-1")
    if not safe_name(name):
        raise BadZip(f"entry name {name[:80]!a} is not allowed")
    if len(extra) != extra_length or comment or disk:
        raise BadZip(f"entry {name} has a comment, or another disk")
    if method or flags:
        raise BadZip(f"entry {name} is compressed or encrypted")
    if stat.S_IFMT(kind >> 16) not in (0, stat.S_IFREG):
        raise BadZip(f"entry {name} is a link or a special file")
    numbers = _numbers_64(extra, name)
    size, packed, header = (next(numbers, v) if v == _TOO_BIG else v for v in (size, packed, header))
    if size != packed:
        raise BadZip(f"entry {name} is compressed or encrypted")
    return _Record(name, header, size, crc), at


def _numbers_64(extra: bytes, name: str) -> Iterator[int]:
    """The 64-bit numbers of a directory record: those of size, stored size and header that do not fit into 32 bits."""
    if not extra:
        return iter(())
    identity, length = struct.unpack_from("<2H", extra) if len(extra) >= 4 else (0, 0)
    if identity != _NUMBERS_64 or length != len(extra) - 4 or length % 8:
        raise BadZip(f"entry {name} has extra fields")
    return iter(struct.unpack(f"<{length // 8}Q", extra[4:]))


def _data_offset(file: BinaryIO, record: _Record) -> int | None:
    """Where an entry's data begin according to its local header; None if that is not a header of this entry."""
    name = record.name.encode()
    header = _read(file, record.header, _LOCAL.size + len(name))
    signature, _, flags, method, *_, name_length, extra_length = _LOCAL.unpack(header[: _LOCAL.size])
    if (signature, flags, method, header[_LOCAL.size :]) != (b"PK\3\4", 0, 0, name) or name_length != len(name):
        return None
    return int(record.header + len(header) + extra_length)


def _unpack(layout: struct.Struct, file: BinaryIO, at: int) -> tuple:
    return layout.unpack(_read(file, at, layout.size))


def _read(file: BinaryIO, at: int, size: int) -> bytes:
    if at < 0:
        raise BadZip(_NO_ZIP)
    file.seek(at)
    data = file.read(size)
    if len(data) != size:
        raise BadZip(_NO_ZIP)
    return data
