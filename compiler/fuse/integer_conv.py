"""QLinearConv in parts: a convolution of integers, then what rounds its sums to bytes again, which fuses with whatever
elementwise comes next.

`IntegerConv` (x, weight, bias) of channels-last bytes gives int32: bias + sum of x * (w - w_zero). What x's own zero
point contributes is in the bias, once for each output, since padding has that value too. A depthwise convolution takes
the float kernel instead: float32 holds its short sums exactly.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import TensorProto

from llmc.fuse.conv import Last, channels_last, geometry, padded
from llmc.graph import LLMC, Editor, Node, TensorType
from llmc.match import array, scalar


def qlinear_conv(edit: Editor, node: Node, last: Callable[[str], str]) -> Last | None:
    """x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero, int32 bias; all but x constant.

    None where 32-bit sums could overflow: the operator's own rule says what then happens.
    """
    x, y = edit.types[node.inputs[0]], node.outputs[0]
    weight, w_scale, w_zero = (array(edit, node.inputs[i]) for i in (3, 4, 5))
    x_scale, x_zero, y_scale, y_zero = (scalar(edit, node.inputs[i]) for i in (1, 2, 6, 7))
    bias = array(edit, node.inputs[8]) if node.input(8) else np.zeros(1, np.int32)
    if weight is None or w_scale is None or w_zero is None or bias is None or weight.ndim not in (3, 4):
        return None
    if x_scale is None or x_zero is None or y_scale is None or y_zero is None:
        return None
    window, C = geometry(node, weight.shape[2:], x), x.shape[1]
    if window is None or not isinstance(C, int):
        return None
    centred = weight.astype(np.int64) - w_zero.astype(np.int64).reshape(-1, *[1] * (weight.ndim - 1))
    taps = tuple(range(1, weight.ndim))
    shift = bias - int(x_zero) * centred.sum(axis=taps)
    if (np.abs(centred).sum(axis=taps) * 255 + np.abs(shift)).max() >= 2**31:
        return None

    groups = int(node.attrs.get("group", 1))
    depthwise = groups == C == len(weight) and groups > 1
    type_ = channels_last(edit.types[y])
    attrs = {**window.attrs(), "groups": groups, "activation": "none"}
    if depthwise:
        attrs |= {"kind": "depthwise", "pads": window.around(), "count_pad": False, "ceil_mode": 0}
        source = _step(edit, node, "Cast", (last(node.inputs[0]),), _real(channels_last(x)), to=TensorProto.FLOAT)
        zero = edit.constant(f"{y}.zero", np.array(x_zero, np.float32))
        source = _step(edit, node, "Sub", (source, zero), _real(channels_last(x)))
        parts = centred.astype(np.float32), np.broadcast_to(bias, (C,)).astype(np.float32)
    else:
        source = padded(edit, last(node.inputs[0]), window.pads, int(x_zero))
        fits = np.abs(centred).max() < 128
        parts = centred.astype(np.int8 if fits else np.int16), shift.astype(np.int32)
    names = [edit.constant(f"{node.inputs[3]}.{role}", part) for role, part in zip(("w", "b"), parts, strict=True)]
    sums = edit.fresh(f"{y}.sums")
    op, dtype = ("Window", "float32") if depthwise else ("IntegerConv", "int32")
    edit.add(Node(op, (source, *names, ""), (sums,), attrs, LLMC, node.name, 1), [TensorType(type_.shape, dtype)])
    if not depthwise:
        sums = _step(edit, node, "Cast", (sums,), _real(type_), to=TensorProto.FLOAT)
    # As the operator's rule computes it: the product of float32 scales first.
    factor = np.float32(x_scale) * w_scale.astype(np.float32) / np.float32(y_scale)
    factor = factor.reshape(-1) if factor.size > 1 else np.array(factor.flat[0])
    scaled = _step(edit, node, "Mul", (sums, edit.constant(f"{y}.factor", factor)), _real(type_))
    one = edit.constant(f"{y}.one", np.array(1, np.float32))
    return Last(_step(edit, node, "QuantizeLinear", (scaled, one, node.inputs[7]), type_), type_)


def _real(type_: TensorType) -> TensorType:
    return TensorType(type_.shape, "float32")


def _step(edit: Editor, like: Node, op: str, inputs: tuple[str, ...], type_: TensorType, **attrs: int) -> str:
    name = edit.fresh(f"{like.outputs[0]}.{op}")
    edit.add(Node(op, inputs, (name,), attrs, "", like.name, 14 if op in ("Sub", "Mul") else 13), [type_])
    return name
