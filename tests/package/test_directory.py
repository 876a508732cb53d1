"""The zip's directory: what the standard library writes is read alike, and nothing else is."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest

from llmc.package.directory import BadZip, ZipEntry, read_directory
from tests.package import files


def zipped(contents: dict[str, bytes], **options: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def read(content: bytes) -> dict[str, ZipEntry]:
    return read_directory(io.BytesIO(content), len(content))


def agrees(content: bytes) -> None:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        expected = {i.filename: (archive.read(i), i.CRC) for i in archive.infolist()}
    found = read(content)
    assert {n: (content[e.offset : e.offset + e.size], e.crc) for n, e in found.items()} == expected


CONTENTS = {"a": b"1" * 5000, "b/c.txt": b"", "d": b"\0" * 300}


def test_same_as_the_standard_library(tmp_path: Path) -> None:
    agrees(zipped(CONTENTS))
    agrees(zipped({}))
    agrees(files.write(tmp_path / "m.llmc", extras={"x/y": b"z"}).read_bytes())


@pytest.mark.parametrize("limit", [10, 400, 2000])
def test_numbers_of_64_bits(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Sizes, offsets and the end record change their form when they pass 2 GiB; here much earlier."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
    content = zipped(CONTENTS)
    assert b"PK\6\6" in content
    agrees(content)


def test_every_truncation_is_refused() -> None:
    content = zipped(CONTENTS)
    for size in range(len(content)):
        with pytest.raises(BadZip):
            read(content[:size])


def test_every_flipped_bit_of_the_directory_is_refused_or_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 400)
    content = zipped(CONTENTS)
    good, start = read(content), content.index(b"PK\1\2")
    for at in range(start, len(content)):
        for bit in range(8):
            changed = bytearray(content)
            changed[at] ^= 1 << bit
            try:
                found = read(bytes(changed))
            except BadZip:
                continue
            # The checksum is compared later; times, versions and permissions mean nothing.
            assert {n: (e.offset, e.size) for n, e in found.items()} == {n: (e.offset, e.size) for n, e in good.items()}


@pytest.mark.parametrize("more", [b"x", b"PK\5\6" + bytes(18)])
def test_nothing_may_follow_or_precede(more: bytes) -> None:
    content = zipped(CONTENTS)
    for changed in (content + more, more + content):
        with pytest.raises(BadZip):
            read(changed)


def test_compressed_entries_are_refused() -> None:
    with pytest.raises(BadZip, match="compressed"):
        read(zipped({"a": bytes(10_000)}, compress_type=zipfile.ZIP_DEFLATED))
