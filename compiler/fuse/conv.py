"""ONNX's convolutions and pooling, [B, C, H, W] or [B, C, L], as operators over channels-last tensors.

`Conv` (x, weight, bias, residual) takes x padded already; `Window` (x, weight, bias) is a depthwise convolution or a
pooling and pads by itself. Both have the attributes of `schedules.conv.workloads`, in pairs (H, W).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from onnx import helper

from llmc.graph import LLMC, Editor, Node, TensorType, same_dim
from llmc.match import array

_ALL_OF_IT = {"GlobalAveragePool": "ReduceMean", "GlobalMaxPool": "ReduceMax"}


@dataclass(frozen=True)
class Last:
    """What the rewrite of one node gives back: a value with its channels last, and its type."""

    name: str
    type: TensorType


def channels_last(type_: TensorType) -> TensorType:
    B, C, *spatial = type_.shape
    return TensorType((B, *spatial, C), type_.dtype)


def conv(edit: Editor, node: Node, last: Callable[[str], str]) -> Last | None:
    """A Conv of float32 with constant weights; `last` gives the channels-last form of a value."""
    weight = array(edit, node.inputs[1])
    bias = array(edit, node.inputs[2]) if node.input(2) else None
    x = edit.types[node.inputs[0]]
    if weight is None or weight.ndim not in (3, 4) or x.dtype != "float32" or (node.input(2) and bias is None):
        return None
    window = geometry(node, weight.shape[2:], x)
    channels = x.shape[1]
    if window is None or not isinstance(channels, int):
        return None
    name, type_ = edit.fresh(f"{node.outputs[0]}.last"), channels_last(edit.types[node.outputs[0]])
    groups = int(node.attrs.get("group", 1))
    attrs = {**window.attrs(), "groups": groups, "activation": "none"}
    inputs = (node.inputs[1], node.input(2), "")
    if groups == channels == weight.shape[0] and groups > 1:
        attrs |= {"kind": "depthwise", "pads": window.around(), "count_pad": False, "ceil_mode": 0}
        edit.add(Node("Window", (last(node.inputs[0]), *inputs), (name,), attrs, LLMC, node.name, 1), [type_])
    else:
        source = padded(edit, last(node.inputs[0]), window.pads)
        edit.add(Node("Conv", (source, *inputs), (name,), attrs, LLMC, node.name, 1), [type_])
    return Last(name, type_)


def pool(edit: Editor, node: Node, last: Callable[[str], str]) -> Last | None:
    """MaxPool or AveragePool of float32, a maximum without its place; that of bytes takes the way of floats."""
    x = edit.types[node.inputs[0]]
    size = tuple(int(k) for k in node.attrs.get("kernel_shape", ()))
    bytes_ = node.op == "MaxPool" and x.dtype in ("uint8", "int8")
    if (
        not (x.dtype == "float32" or bytes_)
        or len(size) not in (1, 2)
        or any(node.outputs[1:])
        or not isinstance(x.shape[1], int)
    ):
        return None
    window = geometry(node, size, x)
    count_pad = bool(node.attrs.get("count_include_pad", 0)) and node.op == "AveragePool"
    if window is None or (count_pad and node.attrs.get("ceil_mode", 0)):  # a window there counts less than it spans
        return None
    kind = "max" if node.op == "MaxPool" else "average"
    attrs = {**window.attrs(), "kind": kind, "pads": window.around(), "count_pad": count_pad, "activation": "none"}
    attrs["ceil_mode"] = int(node.attrs.get("ceil_mode", 0))
    name, type_ = edit.fresh(f"{node.outputs[0]}.last"), channels_last(edit.types[node.outputs[0]])
    source = last(node.inputs[0])
    real = replace(type_, dtype="float32")
    if bytes_:
        source = _cast(edit, source, replace(edit.types[source], dtype="float32"))
    edit.add(Node("Window", (source, "", "", ""), (name,), attrs, LLMC, node.name, 1), [real])
    return Last(_cast(edit, name, type_), type_) if bytes_ else Last(name, type_)


def _cast(edit: Editor, x: str, type_: TensorType) -> str:
    """x as another type of the same shape."""
    name = edit.fresh(f"{x}.{type_.dtype}")
    to = helper.np_dtype_to_tensor_dtype(np.dtype(type_.dtype))
    edit.add(Node("Cast", (x,), (name,), {"to": int(to)}, version=13), [type_])
    return name


def global_pool(edit: Editor, node: Node, last: Callable[[str], str]) -> Last | None:
    """The mean or maximum of each channel: a reduction over what is between batch and channels."""
    type_ = channels_last(edit.types[node.outputs[0]])
    name = edit.fresh(f"{node.outputs[0]}.last")
    attrs = {"axes": list(range(1, len(type_.shape) - 1)), "keepdims": 1}
    edit.add(Node(_ALL_OF_IT[node.op], (last(node.inputs[0]),), (name,), attrs, "", node.name, 13), [type_])
    return Last(name, type_)


# -- geometry ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Geometry:
    """Of one window, each of one or two spatial dimensions; `pads` are (before, after)."""

    size: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]

    def attrs(self) -> dict[str, Any]:
        """In pairs (H, W), H being 1 tall where there is one spatial dimension."""
        return {"kernel": _pair(self.size), "strides": _pair(self.strides), "dilations": _pair(self.dilations)}

    def around(self) -> tuple[int, int, int, int]:
        """Padding above, on the left, below, on the right."""
        sides = ([side[i] for side in self.pads] for i in (0, 1))
        (top, left), (bottom, right) = (_pair(side, missing=0) for side in sides)
        return top, left, bottom, right


def _pair(values: Sequence[int], missing: int = 1) -> tuple[int, int]:
    return (missing, int(values[0])) if len(values) == 1 else (int(values[0]), int(values[1]))


def geometry(node: Node, size: Sequence[int], x: TensorType) -> Geometry | None:
    """A node's window; None where its padding follows from sizes that only the run knows, or is negative."""
    n = len(size)
    strides = tuple(int(s) for s in node.attrs.get("strides") or [1] * n)
    dilations = tuple(int(d) for d in node.attrs.get("dilations") or [1] * n)
    mode = node.attrs.get("auto_pad", "NOTSET")
    mode = mode.decode() if isinstance(mode, bytes) else mode
    if mode.startswith("SAME"):
        pads = []
        for dim, k, s, d in zip(x.shape[2:], size, strides, dilations, strict=True):
            span = (k - 1) * d + 1
            if s == 1:
                total = span - 1
            elif isinstance(dim, int):
                total = max(0, (-(-dim // s) - 1) * s + span - dim)
            else:
                return None
            less, more = total // 2, total - total // 2
            pads.append((less, more) if mode == "SAME_UPPER" else (more, less))
    else:
        flat = [0] * (2 * n) if mode == "VALID" else [int(p) for p in node.attrs.get("pads") or [0] * (2 * n)]
        pads = list(zip(flat[:n], flat[n:], strict=True))
    if any(p < 0 for pair in pads for p in pair):
        return None
    return Geometry(tuple(int(k) for k in size), strides, dilations, tuple(pads))


def padded(edit: Editor, x: str, pads: Sequence[tuple[int, int]], value: int = 0) -> str:
    """x [B, spatial..., C] with zeros, or another value, around it."""
    if not any(p for pair in pads for p in pair):
        return x
    B, *spatial, C = edit.types[x].shape
    name = edit.fresh(f"{x}.padded")
    flat = [0, *(before for before, _ in pads), 0, 0, *(after for _, after in pads), 0]
    amounts = edit.constant(f"{name}.pads", np.array(flat, np.int64))
    dims = [d + before + after for d, (before, after) in zip(spatial, pads, strict=True)]
    known = next((n for n in _pads_of(edit, x, flat)), None)
    if known is not None and not value:
        return known
    dtype = edit.types[x].dtype
    inputs = (x, amounts, edit.constant(f"{name}.value", np.array(value, dtype))) if value else (x, amounts)
    edit.add(Node("Pad", inputs, (name,), {}, version=13), [TensorType((B, *dims, C), dtype)])
    return name


def _pads_of(edit: Editor, x: str, flat: list[int]) -> list[str]:
    """What pads x by these amounts already: branches often start with windows of one size."""
    found = []
    for node in edit.consumers.get(x, ()):
        if node.op == "Pad" and len(node.inputs) == 2 and not node.attrs:
            amounts = array(edit, node.inputs[1])
            if amounts is not None and amounts.tolist() == flat:
                found.append(node.outputs[0])
    return found


def is_one(type_: TensorType) -> bool:
    """Is there a single pixel: are all spatial dimensions of [B, C, ...] 1?"""
    return all(same_dim(d, 1) for d in type_.shape[2:])
