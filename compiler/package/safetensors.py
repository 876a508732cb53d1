"""The header of a safetensors file: planned for writing with aligned data, parsed with suspicion for reading.

Format: 8 bytes (little-endian) with the length of a JSON header, the header, then the data of all tensors without
holes (https://github.com/huggingface/safetensors). To align a tensor that follows one of an odd size, a small padding
tensor is stored between them, so that any safetensors reader opens the file and sees every true shape.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from llmc.package.layout import DTYPES, MAX_JSON, TENSOR_ALIGN, array_bytes, up_to
from llmc.package.manifest import ParamSpec
from llmc.package.strict import Mismatch, decode, parse

PADDING = "__pad_"
_DTYPE_OF_CODE = {code: dtype for dtype, (code, _) in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: offset and size in bytes, from the start of the safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class _HeaderEntry:
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def plan(tensors: Mapping[str, ParamSpec]) -> tuple[bytes, list[tuple[str | None, int]]]:
    """The header's bytes, and what follows it: (key, bytes) of each tensor in order, key None for zero padding."""
    header: dict[str, object] = {}
    parts: list[tuple[str | None, int]] = []
    offset = 0

    def place(key: str, code: str, shape: list[int], size: int) -> None:
        nonlocal offset
        header[key] = {"dtype": code, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size

    for key, spec in tensors.items():
        code, itemsize = DTYPES[spec.dtype]
        size = math.prod(spec.shape) * itemsize
        place(key, code, list(spec.shape), size)
        parts.append((key, size))
        padding = up_to(offset, TENSOR_ALIGN)
        if padding:
            place(f"{PADDING}{len(parts)}", "U8", [padding], padding)
            parts.append((None, padding))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * up_to(8 + len(text), TENSOR_ALIGN)
    return struct.pack("<Q", len(text)) + text, parts


def parse_header(data: memoryview) -> dict[str, StoredTensor]:
    """Tensors of a safetensors file by key, without the padding. `data` is the whole file. Raises Mismatch."""
    if len(data) < 8:
        raise Mismatch("too short for a header")
    (length,) = struct.unpack("<Q", data[:8])
    if length > min(MAX_JSON, len(data) - 8):
        raise Mismatch(f"the header claims {length} bytes")
    document = parse(bytes(data[8 : 8 + length]))
    if not isinstance(document, dict):
        raise Mismatch("the header is not an object")
    document.pop("__metadata__", None)
    start, end = 8 + length, 0
    found = {}
    for key, entry in sorted(decode(dict[str, _HeaderEntry], document).items(), key=lambda item: item[1].data_offsets):
        dtype = _DTYPE_OF_CODE.get(entry.dtype)
        first, last = entry.data_offsets
        if dtype is None:
            raise Mismatch(f"{key}: unknown dtype {entry.dtype}")
        if first != end:
            raise Mismatch(f"{key}: tensors overlap or leave holes")
        size = array_bytes(entry.shape, dtype)
        if size is None or last - first != size:
            raise Mismatch(f"{key}: {last - first} bytes cannot hold {dtype} {str(list(entry.shape))[:100]}")
        end = last
        if not key.startswith(PADDING):
            found[key] = StoredTensor(dtype, entry.shape, start + first, size)
    if start + end != len(data):
        raise Mismatch(f"holds {len(data) - start} bytes of data where the header lists {end}")
    return found
