"""What an ONNX file holds, counted on its bytes before protobuf allocates anything for it.

Two bytes of a file can be an empty message that costs protobuf a hundred, and a message can nest in itself. So the
file's structure is walked once, without recursion and without a copy, and each limit is checked on the way. Which
fields there are is asked of onnx's own descriptors. Paper trail: protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from mmap import mmap
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from onnx import ModelProto

from llmc.errors import UNPRINTABLE, ModelError
from llmc.importer.wire import DROPPED_OF_GRAPH, DROPPED_OF_MODEL, GRAPH, LENGTH, read_field, read_varint

MAX_NODES = 250_000
MAX_FIELDS = 1_000_000  # messages, names and unpacked numbers; a node has 10 to 20 of them
MAX_SUBGRAPHS = 30  # graphs around a graph; protobuf's own parser stops at 100 messages, and a graph in a graph is 3
MAX_MESSAGES = 98  # messages around a message
MAX_NAME = 4096  # characters of a name
MAX_TEXT = 16 << 20  # bytes of an attribute's string, of a comment, of an unknown field
MAX_PACKED = 64 << 20  # bytes of packed integers: each can become eight

_NAME, _TEXT, _BYTES, _PACKED, _DATA = range(5)  # kinds of fields that are no messages; _DATA has no limit of its own
_FREE_TEXT = {"doc_string", "producer_name", "producer_version", "value"}
_VARINTS = {
    FieldDescriptor.TYPE_INT32,
    FieldDescriptor.TYPE_INT64,
    FieldDescriptor.TYPE_UINT64,
    FieldDescriptor.TYPE_ENUM,
}

_Table = dict[int, Any]  # tag -> a kind, or the table of a message


def check_file(file: bytes | mmap) -> None:
    """Raises ModelError where a limit is passed or a name cannot be shown, UnicodeDecodeError where it is not text,
    and ValueError where the bytes are not a message."""
    at, end, table, graphs = 0, len(file), _MODEL, 0
    around: list[tuple[int, int, _Table, int]] = []
    fields = nodes = packed = 0
    while True:
        if at == end:
            if not around:
                return
            at, end, table, graphs = around.pop()
            continue
        fields += 1
        if fields > MAX_FIELDS:
            raise ModelError(f"it holds more than {MAX_FIELDS} fields", hint=_HINT)
        tag = file[at]
        # Both common cases of read_field are open-coded: this loop is most of the time that reading a model takes.
        if 7 < tag < 128 and not tag & 7 and at + 2 <= end and file[at + 1] < 128:
            at += 2
            continue
        if tag & 7 != LENGTH:
            at = read_field(file, at, end)[-1]
            continue
        start, at = at, at + 1
        if tag > 127:
            tag, at = read_varint(file, start, end)
        length = file[at] if at < end else 128
        at += 1
        if length > 127:
            length, at = read_varint(file, at - 1, end)
        stop = at + length
        if stop > end or not tag >> 3:
            raise ValueError(f"truncated field at byte {start}")
        kind = table.get(tag, _BYTES)
        if type(kind) is dict:
            around.append((stop, end, table, graphs))
            if kind is _NODE:
                nodes += 1
                if nodes > MAX_NODES:
                    raise ModelError(f"it has more than {MAX_NODES} nodes", hint=_HINT)
            elif kind is _GRAPH:
                graphs += 1
                if graphs > MAX_SUBGRAPHS:
                    raise ModelError(f"its subgraphs nest more than {MAX_SUBGRAPHS} deep", hint=_HINT)
            elif len(around) > MAX_MESSAGES:
                raise ModelError(f"its messages nest more than {MAX_MESSAGES} deep", hint=_HINT)
            end, table = stop, kind
            continue
        if kind == _NAME:
            name = file[at:stop].decode()
            if length > MAX_NAME or not name.isprintable():
                _check_name(name)
        elif kind == _PACKED:
            packed += length
            if packed > MAX_PACKED:
                raise ModelError(
                    f"it holds more than {MAX_PACKED >> 20} MiB of integers outside of raw_data",
                    hint="save its tensors as raw_data",
                )
        elif kind != _DATA:
            if length > MAX_TEXT:
                raise ModelError(f"a text of {length} bytes is longer than {MAX_TEXT >> 20} MiB", hint=_HINT)
            if kind == _TEXT:
                file[at:stop].decode()
        at = stop


_HINT = "no exporter writes this; export the model again"


def _check_name(name: str) -> None:
    if len(name) > MAX_NAME:
        raise ModelError(f"the name {name[:60]!a}… is longer than {MAX_NAME} characters", hint=_HINT)
    if UNPRINTABLE.search(name):
        raise ModelError(f"the name {name[:60]!a} holds control characters", hint=_HINT)


def _table(message: Descriptor, known: dict[str, _Table]) -> _Table:
    """How to treat every length-delimited field of a message, by its tag."""
    if message.full_name not in known:
        table = known[message.full_name] = {}
        for field in message.fields:
            table[field.number << 3 | LENGTH] = _kind(field, known)
    return known[message.full_name]


def _kind(field: FieldDescriptor, known: dict[str, _Table]) -> Any:
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        return _table(field.message_type, known)
    if field.type == FieldDescriptor.TYPE_STRING:
        return _TEXT if field.name in _FREE_TEXT else _NAME
    if field.type == FieldDescriptor.TYPE_BYTES:
        return _DATA if field.name == "raw_data" else _BYTES
    return _PACKED if field.type in _VARINTS else _DATA


def _without(table: _Table, numbers: frozenset[int]) -> _Table:
    return {tag: _DATA if tag >> 3 in numbers else kind for tag, kind in table.items()}


_TABLES: dict[str, _Table] = {}
_MODEL = _without(_table(ModelProto.DESCRIPTOR, _TABLES), DROPPED_OF_MODEL)
_GRAPH, _NODE = _TABLES["onnx.GraphProto"], _TABLES["onnx.NodeProto"]
_MODEL[GRAPH << 3 | LENGTH] = _without(_GRAPH, DROPPED_OF_GRAPH)
