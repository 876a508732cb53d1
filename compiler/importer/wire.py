"""Weights inside of an ONNX file, found without parsing them: protobuf would copy each of them twice.

Only the framing of three messages is read (ModelProto.graph, GraphProto.initializer, TensorProto.raw_data); the rest is
handed to protobuf as it stands, less what llmc never reads. Paper trail: protobuf.dev/programming-guides/encoding,
onnx/onnx.proto.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from mmap import mmap

import numpy as np

SMALLEST = 4096  # bytes; smaller tensors stay in the message
LENGTH = 2  # the wire type of names, bytes and messages
GRAPH = 7  # the field of ModelProto

# Comments, metadata, training and sharding; inferred types and quantisation notes: read by nobody here.
DROPPED_OF_MODEL = frozenset({6, 14, 20, 26})
DROPPED_OF_GRAPH = frozenset({10, 13, 14, 16})

_INITIALIZER, _RAW_DATA = 5, 9  # field numbers
_VARINT, _FIXED = 0, {1: 8, 5: 4}  # wire types, and the bytes of the fixed ones
_MAX_TENSOR_FIELDS = 256  # more of them: its data is in an unpacked field, and nothing can be gained


def split_weights(content: bytes | mmap) -> tuple[bytes, list[np.ndarray | None]]:
    """A file's content as a ModelProto message without its large raw_data, and those as views of the file,
    one for each of the graph's initializers, None where the message still holds the data.

    Raises ValueError where the bytes are not a protobuf message.
    """
    file = memoryview(content)
    weights: list[np.ndarray | None] = []

    def tensor(start: int, end: int) -> bytes | None:
        weights.append(None)
        kept = []
        for count, (number, field, payload, stop) in enumerate(_fields(file, start, end)):
            if count == _MAX_TENSOR_FIELDS:
                weights[-1] = None
                return None
            if number == _RAW_DATA and stop - payload >= SMALLEST and weights[-1] is None:
                weights[-1] = np.frombuffer(file[payload:stop], np.uint8)
            else:
                kept.append(file[field:stop])
        return b"".join(kept) if weights[-1] is not None else None

    def graph(start: int, end: int) -> bytes:
        return _rewrite(file, start, end, {_INITIALIZER: tensor}, DROPPED_OF_GRAPH)

    return _rewrite(file, 0, len(file), {GRAPH: graph}, DROPPED_OF_MODEL), weights


def read_field(file: bytes | mmap | memoryview, at: int, end: int) -> tuple[int, int, int]:
    """The field at `at` of a message that ends at `end`: its number, the start of its payload, its end.

    The number is 0 for fields that are not length-delimited: nothing looks into those. Raises ValueError.
    """
    start = at
    tag, at = read_varint(file, at, end)
    payload, wire = at, tag & 7
    if wire == _VARINT:
        _, at = read_varint(file, at, end)
    elif wire == LENGTH:
        length, payload = read_varint(file, at, end)
        at = payload + length
    elif wire in _FIXED:
        at += _FIXED[wire]
    else:
        raise ValueError(f"wire type {wire} at byte {start}")
    if at > end or not tag >> 3:
        raise ValueError(f"truncated field at byte {start}")
    return tag >> 3 if wire == LENGTH else 0, payload, at


def read_varint(file: bytes | mmap | memoryview, at: int, end: int) -> tuple[int, int]:
    """The number at `at`, and where it ends. Raises ValueError."""
    value = 0
    for i in range(10):
        if at + i >= end:
            break
        byte = file[at + i]
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value, at + i + 1
    raise ValueError(f"bad number at byte {at}")


def _rewrite(
    file: memoryview,
    start: int,
    end: int,
    handlers: Mapping[int, Callable[[int, int], bytes | None]],
    dropped: frozenset[int],
) -> bytes:
    """A message without the `dropped` fields, and with the payloads of others replaced.

    A handler gives None to keep what it saw.
    """
    parts: list[bytes | memoryview] = []
    copied = start
    for number, field, payload, stop in _fields(file, start, end):
        new = handlers[number](payload, stop) if number in handlers else None
        if new is not None:
            parts += [file[copied:field], _varint(number << 3 | LENGTH), _varint(len(new)), new]
            copied = stop
        elif number in dropped:
            parts.append(file[copied:field])
            copied = stop
    parts.append(file[copied:end])
    return b"".join(parts)


def _fields(file: memoryview, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(number, start, start of its payload, end) of every field of the message in file[at:end]."""
    while at < end:
        start = at
        number, payload, at = read_field(file, at, end)
        yield number, start, payload, at


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
