"""Protobuf by hand, for messages that no library would write."""

from __future__ import annotations

from pathlib import Path

# Field numbers of onnx.proto.
GRAPH, OPSET, FUNCTIONS = 7, 8, 25  # of ModelProto
NODE, INITIALIZER, INPUT = 1, 5, 11  # of GraphProto
ATTRIBUTE = 5  # of NodeProto


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def head(number: int, length: int) -> bytes:
    """What stands before the `length` bytes of a field."""
    return varint(number << 3 | 2) + varint(length)


def field(number: int, payload: bytes) -> bytes:
    return head(number, len(payload)) + payload


def number(field_number: int, value: int) -> bytes:
    return varint(field_number << 3) + varint(value & 2**64 - 1)


def nested(steps: list[int], times: int) -> bytes:
    """An empty message inside of the fields `steps`, so many times over."""
    sizes, heads = 0, []
    for step in reversed(steps * times):
        heads.append(head(step, sizes))
        sizes += len(heads[-1])
    return b"".join(reversed(heads))


def model(graph: bytes, more: bytes = b"") -> bytes:
    """A ModelProto of IR version 8 and opset 17."""
    return number(1, 8) + field(GRAPH, graph) + field(OPSET, number(2, 17)) + more


def written(folder: Path, content: bytes, size: int | None = None) -> Path:
    """The content as a file; `size` makes it longer by a hole, which takes no space on disk."""
    path = folder / "model.onnx"
    path.write_bytes(content)
    if size is not None:
        with path.open("r+b") as file:
            file.truncate(size)
    return path


def hollow(folder: Path, before: list[int], payload: int) -> Path:
    """Nested fields `before`, the last of which holds `payload` zeros that are a hole in the file."""
    heads, size = [], payload
    for step in reversed(before):
        heads.append(head(step, size))
        size += len(heads[-1])
    return written(folder, number(1, 8) + b"".join(reversed(heads)), size + 2)
