"""TensorProto -> numpy, checked before anything is allocated; external data is mapped, never read.

Paper trail: ONNX IR specification, "Serializing tensor data" and "External data" (onnx/docs/ExternalData.md).
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import stat
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from llmc.errors import ModelError

MAX_TENSOR_BYTES = 2**40  # more than any machine has; products of this size do not overflow
MAX_STRING_BYTES = 2**26  # numpy gives every string of an array the space of the longest
MAX_RANK = 32  # what every numpy can do
NO_SIZE = -1  # what some exporters write where a dimension has neither size nor name

# Types that share bytes between elements: bits of one element.
_PACKED = {
    TensorProto.UINT4: 4,
    TensorProto.INT4: 4,
    TensorProto.FLOAT4E2M1: 4,
    TensorProto.UINT2: 2,
    TensorProto.INT2: 2,
    TensorProto.FLOAT6E2M3: 6,
    TensorProto.FLOAT6E3M2: 6,
}
_TYPED_FIELDS = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")

# The specification's, and one that onnx's own Python writes. Nobody here reads the last two.
_KEYS = {"location", "offset", "length", "checksum", "basepath"}
_OPEN = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe without a writer must not block
_DAMAGED = "the model is damaged; fetch or export it again"


class ExternalData:
    """The data files beside a model. Every file is mapped once, read-only; tensors are views into the maps.

    A file is opened from its folder's descriptor, name by name, and nothing is asked of paths: what is checked is what
    was opened, whatever happens to the names meanwhile.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self._maps: dict[tuple[str, ...], np.ndarray] = {}

    def bytes_of(self, tensor: TensorProto) -> np.ndarray:
        """uint8 [length] of an external tensor. Raises ModelError if the file is missing, outside of the model's
        folder, a link, no file, or too short."""
        where = f"tensor '{tensor.name}'"
        entry = {e.key: e.value for e in tensor.external_data}
        if len(entry) < len(tensor.external_data) or not entry.keys() <= _KEYS:
            raise ModelError(
                "its external data has a key that is unknown or given twice",
                where=where,
                hint=f"the keys are {', '.join(sorted(_KEYS))}",
            )
        location = entry.get("location", "")
        offset = _number(entry.get("offset", "0"), where)
        data = self._map(location, where)
        end = offset + _number(entry["length"], where) if "length" in entry else data.size
        if not offset <= end <= data.size:
            raise ModelError(
                f"external data '{location}' has {data.size} bytes, but bytes {offset} to {end} are wanted",
                where=where,
                hint="the data file is truncated or belongs to another model; fetch or export it again",
            )
        return data[offset:end]

    def _map(self, location: str, where: str) -> np.ndarray:
        parts = PurePosixPath(location).parts
        if not parts or not location.isprintable() or location.startswith("/") or ".." in parts or "\\" in location:
            raise ModelError(
                f"external data at {location[:200]!r} is not a plain path inside of the model's folder",
                where=where,
                hint="put the data file beside the model and save the model again with that location",
            )
        if parts not in self._maps:
            try:
                self._maps[parts] = self._open(parts, location, where)
            except OSError as error:
                what, hint = _reason(error, self.folder)
                raise ModelError(f"external data '{location}' {what}", where=where, hint=hint) from None
        return self._maps[parts]

    def _open(self, parts: tuple[str, ...], location: str, where: str) -> np.ndarray:
        folder = os.open(self.folder, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
        try:
            for part in parts[:-1]:
                inner = os.open(part, _OPEN | os.O_DIRECTORY, dir_fd=folder)
                os.close(folder)
                folder = inner
            descriptor = os.open(parts[-1], _OPEN, dir_fd=folder)
        finally:
            os.close(folder)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ModelError(f"external data '{location}' is not a file", where=where, hint=_DAMAGED)
            if status.st_nlink > 1:
                raise ModelError(
                    f"external data '{location}' is a hard link: it may be a file from outside of the model's folder",
                    where=where,
                    hint="replace it by a copy of the file",
                )
            return np.frombuffer(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ), np.uint8)
        except ValueError:
            raise ModelError(f"external data '{location}' is empty", where=where, hint=_DAMAGED) from None
        finally:
            os.close(descriptor)


def _reason(error: OSError, folder: Path) -> tuple[str, str]:
    """What to say, and what to do, about a data file that cannot be opened."""
    if error.errno == errno.ENOENT:
        return "is missing", f"put the file into '{folder}'; models of this kind come as several files"
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        return "is a link, or leads through one or through a file", "replace the link by the file itself"
    if error.errno == errno.ENXIO:
        return "is not a file", _DAMAGED
    return f"cannot be opened: {error.strerror or error}", "make it a file that you may read"


def _number(text: str, where: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ModelError(f"its external data has {text[:40]!r} where a number of bytes belongs", where=where)
    return int(text)


def load_tensor(tensor: TensorProto, external: ExternalData, raw: np.ndarray | None = None) -> np.ndarray:
    """A tensor as a read-only numpy array of its declared shape.

    4-bit integers and narrow floats get ml_dtypes' types, one byte an element; strings become numpy `str_`. Others are
    views of the mapped file where their data lies in one: external, or in `raw`, the tensor's raw_data that
    `split_weights` found. Raises ModelError.
    """
    where = f"tensor '{tensor.name}'"
    typed = [field for field in _TYPED_FIELDS if len(getattr(tensor, field))]
    outside = tensor.data_location == TensorProto.EXTERNAL
    if outside + (raw is not None) + tensor.HasField("raw_data") + len(typed) > 1 or tensor.HasField("segment"):
        raise ModelError("its data is given twice, or in pieces", where=where, hint=_DAMAGED)
    shape = tuple(tensor.dims)
    if tensor.data_type == TensorProto.STRING:
        check_size(shape, 4, where)
        return _strings(tensor, shape, where)
    try:
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
    except KeyError:
        raise ModelError(f"unknown element type {tensor.data_type}", where=where) from None
    check_size(shape, dtype.itemsize, where)
    size = (math.prod(shape) * _PACKED.get(tensor.data_type, dtype.itemsize * 8) + 7) // 8
    if not size:
        return np.empty(shape, dtype)

    if outside:
        data: Any = external.bytes_of(tensor)
    elif raw is not None:
        data = raw
    elif tensor.HasField("raw_data"):
        data = np.frombuffer(tensor.raw_data, np.uint8)
    else:
        return _from_typed_field(tensor, shape, where)
    if data.size != size:
        raise ModelError(
            f"{dtype.name}{list(shape)} needs {size} bytes, but {data.size} are given",
            where=where,
            hint=_DAMAGED,
        )
    if tensor.data_type in _PACKED:
        packed = TensorProto(data_type=tensor.data_type, dims=tensor.dims, raw_data=data.tobytes())
        return np.asarray(numpy_helper.to_array(packed))
    return np.asarray(data.view(dtype).reshape(shape))


def check_size(shape: tuple[int, ...], itemsize: int, where: str) -> None:
    """Raises ModelError for a shape that no tensor can have, a zero among its dimensions or not."""
    if len(shape) > MAX_RANK or any(d < 0 for d in shape):
        raise ModelError(f"impossible shape {list(shape)[:MAX_RANK]}", where=where, hint=_DAMAGED)
    if math.prod(max(d, 1) for d in shape) * itemsize > MAX_TENSOR_BYTES:
        raise ModelError(f"shape {list(shape)} declares more than 2^40 bytes", where=where, hint=_DAMAGED)


def _strings(tensor: TensorProto, shape: tuple[int, ...], where: str) -> np.ndarray:
    strings = tensor.string_data
    if len(strings) != math.prod(shape):
        raise ModelError(f"its data does not fill shape {list(shape)}", where=where, hint=_DAMAGED)
    if len(strings) * max(map(len, strings), default=0) * 4 > MAX_STRING_BYTES:
        raise ModelError(f"its strings need more than {MAX_STRING_BYTES >> 20} MiB", where=where)
    return np.array([s.decode("utf-8", "replace") for s in strings], np.str_).reshape(shape)


def _from_typed_field(tensor: TensorProto, shape: tuple[int, ...], where: str) -> np.ndarray:
    try:
        array = np.asarray(numpy_helper.to_array(tensor))
    except (ValueError, TypeError, OverflowError) as error:
        raise ModelError(f"its data does not fill shape {list(shape)}", where=where, hint=_DAMAGED) from error
    if array.shape != shape:
        raise ModelError(f"its data does not fill shape {list(shape)}", where=where, hint=_DAMAGED)
    return array
