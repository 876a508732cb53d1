"""Artifacts that were damaged or made with bad intentions. What the hashes prove is tested in tests/package."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmc.package.layout import MANIFEST, WEIGHTS
from tests.package import files
from tests.security.kinds import kind


def good(folder: Path) -> Path:
    return files.write(folder / "good.llmc")


def changed(folder: Path, content: bytes) -> Path:
    path = folder / "model.llmc"
    path.write_bytes(content)
    return path


def rezipped(folder: Path, name: str, mode: int = stat.S_IFREG, **options: Any) -> Path:
    """A good artifact with one entry more."""
    path = good(folder)
    info = zipfile.ZipInfo(name)
    info.external_attr = (mode | 0o644) << 16
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr(info, options.pop("content", b"x"), **options)
    return path


def forged(folder: Path, document: Mapping[str, Any] | None = None, **changes: bytes) -> Path:
    """A good artifact with entries replaced and hashes made right again."""
    contents = {name.replace("_", "."): content for name, content in changes.items()}
    return files.forge(folder / "model.llmc", good(folder), contents, document)


def with_manifest(folder: Path, text: bytes, size: int | None = None) -> Path:
    """A zip with a manifest alone; `size` is what the directory says of it, the rest being a hole in the file."""
    name = MANIFEST.encode()
    size = len(text) if size is None else size
    local = struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 0, 0, 0, 0, size, size, len(name), 0) + name
    crc = zlib.crc32(text)
    record = struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 0, 0, 0, crc, size, size, len(name), 0, 0, 0, 0, 0, 0)
    start = len(local) + size
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, len(record) + len(name), start, 0)
    path = folder / "model.llmc"
    with path.open("wb") as file:
        file.write(local + text)
        file.seek(start)
        file.write(record + name + end)
    return path


def document() -> dict[str, Any]:
    return json.loads(files.manifest().to_json())


def with_field(folder: Path, value: str) -> Path:
    """The manifest of a good artifact with JSON text in the place of its quantization."""
    text = json.dumps({**document(), "quantization": "@"}).replace('"@"', value)
    return with_manifest(folder, text.encode())


def safetensors(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    header += b" " * (-(8 + len(header)) % 64)
    return struct.pack("<Q", len(header) if length is None else length) + header + data


# -- the zip ------------------------------------------------------------------------------------------------------
@kind("is not an llmc artifact")
def artifact_of_nothing(folder: Path) -> Path:
    return changed(folder, b"")


@kind("is not an llmc artifact")
def artifact_of_text(folder: Path) -> Path:
    return changed(folder, b"version https://git-lfs.github.com/spec/v1\n" * 10)


@kind("is not an llmc artifact")
def artifact_cut(folder: Path) -> Path:
    content = good(folder).read_bytes()
    return changed(folder, content[:-50])


@kind("is not a file")
def artifact_is_a_folder(folder: Path) -> Path:
    (folder / "model.llmc").mkdir()
    return folder / "model.llmc"


@kind("is not a file")
def artifact_is_a_pipe(folder: Path) -> Path:
    os.mkfifo(folder / "model.llmc")
    return folder / "model.llmc"


@kind("lib.so does not match its SHA-256")
def artifact_with_other_code(folder: Path) -> Path:
    content = good(folder).read_bytes()
    return changed(folder, content.replace(b"ELF pretended", b"ELF malicious", 1))


@kind("fails its checksum")
def artifact_with_a_bit_flipped(folder: Path) -> Path:
    content = bytearray(good(folder).read_bytes())
    content[content.index(b'"kernels"') + 3] ^= 1
    return changed(folder, bytes(content))


@kind("is there twice")
def artifact_with_two_libraries(folder: Path) -> Path:
    return rezipped(folder, "lib.so")


@kind("is not allowed")
def artifact_that_climbs(folder: Path) -> Path:
    return rezipped(folder, "../../.bashrc")


@kind("is not allowed")
def artifact_with_an_absolute_name(folder: Path) -> Path:
    return rezipped(folder, "/etc/passwd")


@kind("is not allowed")
def artifact_with_backslashes(folder: Path) -> Path:
    return rezipped(folder, "..\\..\\x")


@kind("is not allowed")
def artifact_with_a_name_in_two_lines(folder: Path) -> Path:
    return rezipped(folder, "a\nllmc: fine")


@kind("is a link or a special file")
def artifact_with_a_link(folder: Path) -> Path:
    return rezipped(folder, "extra", stat.S_IFLNK, content=b"/etc/passwd")


@kind("is a link or a special file")
def artifact_with_a_device(folder: Path) -> Path:
    return rezipped(folder, "extra", stat.S_IFBLK)


@kind("is compressed or encrypted")
def artifact_that_is_a_bomb(folder: Path) -> Path:
    return rezipped(folder, "extra", content=bytes(50 << 20), compress_type=zipfile.ZIP_DEFLATED)


@kind("is compressed or encrypted")
def artifact_with_a_password(folder: Path) -> Path:
    content = bytearray(good(folder).read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1
    return changed(folder, bytes(content))


@kind("overlaps another or lies outside the file")
def artifact_whose_entries_share_bytes(folder: Path) -> Path:
    content = bytearray(good(folder).read_bytes())
    records = [i for i in range(len(content)) if content[i : i + 4] == b"PK\1\2"]
    content[records[1] + 42 : records[1] + 46] = content[records[0] + 42 : records[0] + 46]
    return changed(folder, bytes(content))


@kind("overlaps another or lies outside the file")
def artifact_whose_entry_lies_outside(folder: Path) -> Path:
    content = bytearray(good(folder).read_bytes())
    record = content.index(b"PK\1\2")
    content[record + 42 : record + 46] = struct.pack("<I", 0xFFFFFFF0)
    return changed(folder, bytes(content))


@kind("more than 1000")
def artifact_of_5000_entries(folder: Path) -> Path:
    path = folder / "model.llmc"
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(5000):
            archive.writestr(f"e{i}", b"")
    return path


@kind("too many entries")
def artifact_with_a_directory_of_a_gigabyte(folder: Path) -> Path:
    path = folder / "model.llmc"
    with path.open("wb") as file:
        file.seek(1 << 30)
        file.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 9, 9, 1 << 30, 0, 0))
    return path


@kind("not where its end record says")
def artifact_behind_something_else(folder: Path) -> Path:
    return changed(folder, b"#!/bin/sh\necho two readers, two files\n" + good(folder).read_bytes())


@kind("not where its end record says")
def artifact_with_a_comment(folder: Path) -> Path:
    path = good(folder)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"PK\5\6" + bytes(18)
    return path


@kind("is not an llmc artifact")
def artifact_with_a_second_end_record(folder: Path) -> Path:
    """One reader believes the 64-bit record, another the short one."""
    content = good(folder).read_bytes()
    second = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, 60, 0)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, len(content) - 22, 1)
    return changed(folder, content[:-22] + second + locator + content[-22:])


# -- the manifest -------------------------------------------------------------------------------------------------
@kind("manifest.json is longer than 8 MiB")
def manifest_of_a_gigabyte(folder: Path) -> Path:
    return with_manifest(folder, b"{}", 1 << 30)


@kind("holds more than 262144 objects and arrays")
def manifest_of_brackets(folder: Path) -> Path:
    return with_manifest(folder, b"[" + b"[]," * 2_000_000 + b"[]]")


@kind("nested too deeply")
def manifest_that_nests(folder: Path) -> Path:
    return with_field(folder, '{"a": ' + "[" * 900 + "]" * 900 + "}")


@kind("nested too deeply")
def manifest_that_overflows_a_stack(folder: Path) -> Path:
    return with_manifest(folder, b"[" * 200_000)


@kind("the same key twice")
def manifest_with_a_key_twice(folder: Path) -> Path:
    return with_field(folder, '{"a": 1, "a": 2}')


@kind("not a JSON number")
def manifest_with_an_infinite_number(folder: Path) -> Path:
    return with_field(folder, '{"a": 1e999}')


@kind("more than 64 bits")
def manifest_with_a_number_of_4000_digits(folder: Path) -> Path:
    return with_field(folder, '{"a": 1' + "0" * 4000 + "}")


@kind("holds control characters")
def manifest_that_moves_the_cursor(folder: Path) -> Path:
    return with_field(folder, '{"a": "\\u001b[2J"}')


@kind("holds control characters")
def manifest_with_half_a_character(folder: Path) -> Path:
    return with_field(folder, '{"\\ud800": 1}')


@kind("not JSON")
def manifest_that_is_no_text(folder: Path) -> Path:
    return with_manifest(folder, b"\xff\xfe{}")


@kind("surprise is not a known field")
def manifest_with_an_unknown_field(folder: Path) -> Path:
    return forged(folder, {"surprise": 1})


@kind("schema is 99")
def manifest_of_the_future(folder: Path) -> Path:
    return forged(folder, {"schema": 99})


@kind("has an impossible storage or offset")
def manifest_with_memory_far_away(folder: Path) -> Path:
    return with_workspace(folder, offset=2**62, shape=[4])


@kind("impossible dimension")
def manifest_with_memory_of_exabytes(folder: Path) -> Path:
    return with_workspace(folder, offset=0, shape=[2**31, 2**31])


def with_workspace(folder: Path, **changes: Any) -> Path:
    functions = document()["functions"]
    functions["main"]["workspaces"] = [{"storage": 0, "dtype": "float32", **changes}]
    return forged(folder, {"functions": functions})


@kind("impossible dimension")
def manifest_with_a_tensor_of_exabytes(folder: Path) -> Path:
    params = document()["params"]
    params["odd"]["shape"] = [2**62, 2**62]
    return forged(folder, {"params": params})


@kind("hashes for")
def manifest_with_too_few_hashes(folder: Path) -> Path:
    entries = {"lib.so": dataclasses.asdict(files.archive.EntrySpec(1 << 40, ("0" * 64,)))}
    return forged(folder, {"entries": entries})


@kind("not in both")
def manifest_that_hides_an_entry(folder: Path) -> Path:
    return rezipped(folder, "hidden")


# -- the weights --------------------------------------------------------------------------------------------------
@kind("the header claims 1099511627776 bytes")
def weights_with_a_header_of_a_terabyte(folder: Path) -> Path:
    return forged(folder, weights_safetensors=safetensors(b"{}", length=1 << 40))


@kind("holds more than 262144 objects and arrays")
def weights_with_a_header_of_brackets(folder: Path) -> Path:
    return forged(folder, weights_safetensors=safetensors(b"[" + b"{}," * 1_000_000 + b"{}]"))


@kind("cannot hold uint8")
def weights_with_a_shape_that_overflows(folder: Path) -> Path:
    header = b'{"a": {"dtype": "U8", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}}'
    return forged(folder, weights_safetensors=safetensors(header))


@kind("cannot hold uint8")
def weights_with_a_rank_of_100000(folder: Path) -> Path:
    header = b'{"a": {"dtype": "U8", "shape": [%s1], "data_offsets": [0, 1]}}' % (b"9999999999," * 100_000)
    return forged(folder, weights_safetensors=safetensors(header, b"1"))


@kind("overlap or leave holes")
def weights_that_share_bytes(folder: Path) -> Path:
    entry = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
    return forged(folder, weights_safetensors=safetensors(json.dumps({"a": entry, "b": entry}).encode(), b"1234"))


@kind("bytes of data where the header lists")
def weights_past_the_end(folder: Path) -> Path:
    entry = {"dtype": "U8", "shape": [1 << 30], "data_offsets": [0, 1 << 30]}
    return forged(folder, weights_safetensors=safetensors(json.dumps({"a": entry}).encode(), b"1234"))


@kind(f"{WEIGHTS}: ")
def weights_that_are_none(folder: Path) -> Path:
    return forged(folder, weights_safetensors=b"")
