"""TensorProto -> numpy, checked before anything is allocated; external data is mapped, never read.

Paper trail: ONNX IR specification, "Serializing tensor data" and "External data" (onnx/docs/ExternalData.md).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from llmc.errors import ModelError

MAX_TENSOR_BYTES = 2**40
MAX_RANK = 64

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


class ExternalData:
    """The data files beside a model. Every file is mapped once, read-only; tensors are views into the maps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._maps: dict[str, np.ndarray] = {}

    def bytes_of(self, tensor: TensorProto) -> np.ndarray:
        """uint8 [length] of an external tensor. Raises ModelError if the file is missing, outside of the model's
        folder, or too short."""
        where = f"tensor '{tensor.name}'"
        entry = {e.key: e.value for e in tensor.external_data}
        location = entry.get("location", "")
        try:
            offset, length = int(entry.get("offset") or 0), int(entry["length"]) if entry.get("length") else None
        except ValueError:
            raise ModelError("the offset or length of its external data is not a number", where=where) from None
        data = self._map(location, where)
        end = data.size if length is None else offset + length
        if offset < 0 or end < offset or end > data.size:
            raise ModelError(
                f"external data '{location}' has {data.size} bytes, but bytes {offset} to {end} are wanted",
                where=where,
                hint="the data file is truncated or belongs to another model; fetch or export it again",
            )
        return data[offset:end]

    def _map(self, location: str, where: str) -> np.ndarray:
        if location not in self._maps:
            self._maps[location] = np.asarray(np.memmap(self._find(location, where), np.uint8, "r"))
        return self._maps[location]

    def _find(self, location: str, where: str) -> Path:
        path = Path(location)
        if not location or "\0" in location or path.is_absolute() or ".." in path.parts or "\\" in location:
            raise ModelError(
                f"external data at {location!r} is not a plain path inside of the model's folder",
                where=where,
                hint="put the data file beside the model and save the model again with that location",
            )
        found = (self.folder / path).resolve()
        if not found.is_relative_to(self.folder):
            raise ModelError(
                f"external data '{location}' is a link that leaves the model's folder",
                where=where,
                hint="replace the link by the file itself",
            )
        if not found.is_file():
            raise ModelError(
                f"external data '{location}' is missing",
                where=where,
                hint=f"put the file into '{self.folder}'; models of this kind come as several files",
            )
        if not found.stat().st_size:
            raise ModelError(f"external data '{location}' is empty", where=where)
        return found


def load_tensor(tensor: TensorProto, external: ExternalData, raw: np.ndarray | None = None) -> np.ndarray:
    """A tensor as a read-only numpy array of its declared shape.

    4-bit integers and narrow floats get ml_dtypes' types, one byte an element; strings become numpy `str_`. Others are
    views of the mapped file where their data lies in one: external, or in `raw`, the tensor's raw_data that
    `split_weights` found. Raises ModelError.
    """
    where = f"tensor '{tensor.name}'"
    shape = _checked_shape(tensor, where)
    count = math.prod(shape)
    if tensor.data_type == TensorProto.STRING:
        return np.array([s.decode("utf-8", "replace") for s in tensor.string_data], np.str_).reshape(shape)
    try:
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
    except KeyError:
        raise ModelError(f"unknown element type {tensor.data_type}", where=where) from None
    bits = _PACKED.get(tensor.data_type, dtype.itemsize * 8)
    size = (count * bits + 7) // 8
    if size > MAX_TENSOR_BYTES:
        raise ModelError(f"shape {list(shape)} declares {size} bytes", where=where)
    if not size:
        return np.empty(shape, dtype)

    if tensor.data_location == TensorProto.EXTERNAL:
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
            hint="the model is damaged; fetch or export it again",
        )
    if tensor.data_type in _PACKED:
        packed = TensorProto(data_type=tensor.data_type, dims=tensor.dims, raw_data=data.tobytes())
        return np.asarray(numpy_helper.to_array(packed))
    return np.asarray(data.view(dtype).reshape(shape))


def _checked_shape(tensor: TensorProto, where: str) -> tuple[int, ...]:
    shape = tuple(tensor.dims)
    if len(shape) > MAX_RANK or any(d < 0 for d in shape):
        raise ModelError(f"impossible shape {list(shape)[:MAX_RANK]}", where=where)
    return shape


def _from_typed_field(tensor: TensorProto, shape: tuple[int, ...], where: str) -> np.ndarray:
    try:
        array = np.asarray(numpy_helper.to_array(tensor))
    except (ValueError, TypeError) as error:
        raise ModelError(f"its data does not fill shape {list(shape)}", where=where) from error
    if array.shape != shape:
        raise ModelError(f"its data does not fill shape {list(shape)}", where=where)
    return array
