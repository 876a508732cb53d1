"""What is left of a Q/DQ model once its linear layers were read: pairs on activations, and dequantised constants.

A pair rounds a float value to a grid that was fixed in advance. llmc rounds activations at run time, where a kernel
multiplies integers, and nowhere else: so a pair leaves no rounding behind. Its clipping stays where it means something:
quantisers fold the Relu or Relu6 after a layer into a grid that ends at zero. Any other grid only says what range the
calibration data had.
"""

from __future__ import annotations

import numpy as np

from llmc.graph import Editor, Node
from llmc.match import array, made_by, nodes, scalar

LIMITS = {
    "int4": (-8, 7),
    "uint4": (0, 15),
    "int8": (-128, 127),
    "uint8": (0, 255),
    "int16": (-32768, 32767),
    "uint16": (0, 65535),
}


def drop_pairs(edit: Editor) -> None:
    """Every DequantizeLinear(QuantizeLinear(x)) with constant scales becomes x, or a Clip of it."""
    for node in nodes(edit, "DequantizeLinear"):
        source = float_source(edit, node.outputs[0])
        if source is not None:
            edit.remove(node)
            edit.replace_uses(node.outputs[0], source)


def fold_constants(edit: Editor) -> None:
    """A DequantizeLinear of a constant that no linear layer took becomes the float constant."""
    for node in nodes(edit, "DequantizeLinear"):
        codes, scale = array(edit, node.inputs[0]), array(edit, node.inputs[1])
        zero = array(edit, node.input(2)) if node.input(2) else np.zeros((), np.float32)
        if codes is None or scale is None or zero is None or node.attrs.get("block_size", 0):
            continue
        if scale.size > 1:
            shape = [1] * codes.ndim
            shape[int(node.attrs.get("axis", 1))] = scale.size
            scale, zero = scale.reshape(shape), zero.reshape(shape if zero.size > 1 else [1] * codes.ndim)
        value = (codes.astype(np.float32) - zero.astype(np.float32)) * scale.astype(np.float32)
        name = edit.constant(f"{node.outputs[0]}.float", np.asarray(value, np.float32))
        edit.remove(node)
        edit.replace_uses(node.outputs[0], name)


def float_source(edit: Editor, name: str) -> str | None:
    """The float value behind a pair, clipped where the pair's clipping means something; None where there is none."""
    dequantize = made_by(edit, name, "DequantizeLinear")
    quantize = made_by(edit, dequantize.inputs[0], "QuantizeLinear") if dequantize is not None else None
    if dequantize is None or quantize is None or not _same_grid(edit, quantize, dequantize):
        return None
    dtype, x = edit.types[quantize.outputs[0]].dtype, quantize.inputs[0]
    scale = scalar(edit, quantize.inputs[1])
    zero = scalar(edit, quantize.input(2)) if quantize.input(2) else 0.0
    if dtype not in LIMITS or scale is None or zero is None:
        return None
    least, greatest = LIMITS[dtype]
    low, high = (least - zero) * scale, (greatest - zero) * scale
    if low < 0 < high or not _may_end_in_relu(edit, x):
        return x
    return _clip(edit, x, quantize, low, high)


def _same_grid(edit: Editor, quantize: Node, dequantize: Node) -> bool:
    """Do both have the same scale and zero point? Others scale the value, which is no rounding."""
    scales = [scalar(edit, node.inputs[1]) for node in (quantize, dequantize)]
    zeros = [scalar(edit, node.input(2)) if node.input(2) else 0.0 for node in (quantize, dequantize)]
    return scales[0] == scales[1] and zeros[0] == zeros[1]


def _may_end_in_relu(edit: Editor, name: str) -> bool:
    """Is a value made by a layer after which models have activations: a product with weights, or a sum with one?

    A constant may be what is left of one.
    """
    node = edit.producer.get(name)
    if node is None:
        return name in edit.constants
    if node.op == "DequantizeLinear":
        pair = made_by(edit, node.inputs[0], "QuantizeLinear")
        return pair is not None and _may_end_in_relu(edit, pair.inputs[0])
    if node.op in ("Add", "BatchNormalization"):
        return any(_may_end_in_relu(edit, i) for i in node.inputs)
    return node.op in ("Conv", "ConvTranspose", "Gemm", "Linear")


def _clip(edit: Editor, x: str, quantize: Node, low: float, high: float) -> str:
    name = f"{quantize.outputs[0]}.clipped"
    if name not in edit.types:
        bounds = [edit.constant(f"{name}.{k}", np.asarray(v, np.float32)) for k, v in (("low", low), ("high", high))]
        edit.add(Node("Clip", (x, *bounds), (name,), {}, "", quantize.name, 13), [edit.types[x]])
    return name
