"""Integer convolutions run on the float kernels.

QLinearConv sums products of integers. As long as partial sums stay within 2**24, float32 holds them all exactly, in
whatever order they are added: x - zero as floats, convolved with w - zero as floats, is the same integer. Those of
trained networks do, by far; a sum beyond is off by 2**-24 of itself with every addition, less than a thousandth of a
step of the result. What is cast, subtracted, scaled and rounded around it then fuses with its neighbours. Weights
with which 32-bit integers could overflow are left to the operator's rule.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from llmc.graph import Editor, Graph, Node, TensorType
from llmc.match import array, nodes, scalar


def fuse_integer_convs(graph: Graph) -> Graph:
    edit = Editor(graph)
    for node in nodes(edit, "QLinearConv"):
        _qlinear_conv(edit, node)
    return edit.finish()


def _qlinear_conv(edit: Editor, node: Node) -> None:
    """x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero, int32 bias."""
    x, y = node.inputs[0], node.outputs[0]
    weight, w_scale, w_zero = (array(edit, node.inputs[i]) for i in (3, 4, 5))
    x_scale, x_zero, y_scale, y_zero = (scalar(edit, node.inputs[i]) for i in (1, 2, 6, 7))
    bias = array(edit, node.inputs[8]) if node.input(8) else np.zeros(1, np.int32)
    if weight is None or w_scale is None or w_zero is None or bias is None or weight.ndim not in (3, 4):
        return
    if x_scale is None or x_zero is None or y_scale is None or y_zero is None:
        return
    each = (-1, *[1] * (weight.ndim - 1))
    centred = weight.astype(np.int64) - w_zero.astype(np.int64).reshape(each)
    limits = np.iinfo(edit.types[x].dtype)
    largest = max(x_zero - limits.min, limits.max - x_zero)
    if (np.abs(centred).sum(axis=tuple(range(1, weight.ndim))) * largest + np.abs(bias)).max() >= 2**31:
        return
    shape, out = edit.types[x].shape, edit.types[y]
    real = TensorType(out.shape, "float32")
    # As the operator's rule computes it: the product of float32 scales first.
    factor = np.float32(x_scale) * w_scale.astype(np.float32) / np.float32(y_scale)
    factor = factor.reshape(each[:-1]) if factor.size > 1 else np.array(factor.flat[0])
    names = {part: edit.fresh(f"{y}.{part}") for part in ("cast", "centred", "sums", "scaled")}
    steps = [
        Node("Cast", (x,), (names["cast"],), {"to": TensorProto.FLOAT}, version=13),
        Node(
            "Sub",
            (names["cast"], edit.constant(f"{y}.zero", np.array(x_zero, np.float32))),
            (names["centred"],),
            version=14,
        ),
        Node(
            "Conv",
            (
                names["centred"],
                edit.constant(f"{node.inputs[3]}.real", centred.astype(np.float32)),
                edit.constant(f"{y}.bias", bias.astype(np.float32)) if node.input(8) else "",
            ),
            (names["sums"],),
            node.attrs,
            "",
            node.name,
            11,
        ),
        Node("Mul", (names["sums"], edit.constant(f"{y}.factor", factor)), (names["scaled"],), version=14),
    ]
    edit.remove(node)
    for step, type_ in zip(steps, [TensorType(shape, "float32")] * 2 + [real] * 2, strict=True):
        edit.add(step, [type_])
    one = edit.constant(f"{y}.one", np.array(1, np.float32))
    edit.add(Node("QuantizeLinear", (names["scaled"], one, node.inputs[7]), (y,), version=13), [out])
