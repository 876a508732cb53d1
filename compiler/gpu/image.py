"""A kernel as TVM's runtime loads it: the bytes of a module of the kind "cuda", written without that runtime.

TVM's own writer is a part of its CUDA runtime, which does not load without a driver; what it leaves behind then is a
module that holds only source.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from llmc.gpu.launch import Launch
from llmc.tvm_shim import tvm

_HANDLE = (3, 64, 1)  # DLPack's code of opaque pointers, bits, lanes
_PLAIN = 0  # an argument that is neither a tensor map nor a grid constant


def module_bytes(name: str, launch: Launch, code: bytes, format: str = "fatbin") -> bytes:
    """The module of one kernel, `code` being what the driver loads."""
    types = [_HANDLE if a.pointer else _type(a.dtype) for a in launch.arguments]
    function = [
        _text(name),  # its key, and its name
        _text(name),
        _sequence([struct.pack("<BBH", *each) for each in types]),
        _sequence([_text(tag) for tag in launch.tags]),
        _sequence([struct.pack("<i", _PLAIN)] * len(types)),
    ]
    return _text(format) + _sequence([b"".join(function)]) + _counted(code)


def _type(dtype: str) -> tuple[int, int, int]:
    type_ = tvm.runtime.DataType(dtype)
    return int(type_.type_code), int(type_.bits), int(type_.lanes)


def _text(text: str) -> bytes:
    return _counted(text.encode())


def _counted(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def _sequence(items: Sequence[bytes]) -> bytes:
    return struct.pack("<Q", len(items)) + b"".join(items)
