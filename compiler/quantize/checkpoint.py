"""Reads weights that arrive quantised, and keeps them as they are.

MatMulNBits, MatMulBnb4 and GatherBlockQuantized (com.microsoft), Q/DQ pairs and DequantizeLinear of a constant (per
tensor, per axis and block-wise), and DynamicQuantizeLinear + MatMulInteger all become a `Linear` or a lookup over a
`QuantizedWeight`. Activation scales that a Q/DQ model fixed in advance are replaced by scales taken from the data at
run time, which are at least as fine; where the model clips by quantising, the Clip stays.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from llmc.graph import Editor, Graph, Node
from llmc.match import array, made_by, nodes, only_user, rank, scalar
from llmc.quantize.activations import LIMITS, drop_pairs, float_source, fold_constants
from llmc.quantize.linears import bias_row, linear
from llmc.schedules.formats import PackedCodes, QuantizedWeight

_FP4 = "float4_e2m1fn"


def read_quantized(graph: Graph) -> Graph:
    """Rewrites every linear layer whose weight is stored as integers."""
    edit = Editor(graph)
    for node in nodes(edit, "MatMulNBits", domain="com.microsoft"):
        _matmul_nbits(edit, node)
    for node in nodes(edit, "MatMulBnb4", domain="com.microsoft"):
        _matmul_bnb4(edit, node)
    for node in nodes(edit, "GatherBlockQuantized", domain="com.microsoft"):
        _gather_blocks(edit, node)
    for node in nodes(edit, "MatMulInteger"):
        _matmul_integer(edit, node)
    for node in nodes(edit, "MatMul"):
        _dequantized_matmul(edit, node)
    for node in nodes(edit, "Gemm"):
        _dequantized_matmul(edit, node)
    for node in nodes(edit, "Gather"):
        _dequantized_gather(edit, node)
    for node in nodes(edit, "DequantizeLinear"):
        _gathered_codes(edit, node)
    drop_pairs(edit)
    fold_constants(edit)
    return edit.finish()


# -- com.microsoft.MatMulNBits -------------------------------------------------------------------------------------
def _matmul_nbits(edit: Editor, node: Node) -> None:
    K, N, bits, block = (int(node.attrs[k]) for k in ("K", "N", "bits", "block_size"))
    source = _stored(edit, node.inputs[1])
    packed, scales = array(edit, source), array(edit, node.inputs[2])
    if bits not in (2, 4, 8) or packed is None or scales is None or node.input(4):
        return  # the operator's own rule takes it
    blocks = -(-K // block)
    stored = packed.reshape(N, -1)
    codes = PackedCodes((stored,), K) if bits == 4 else _unpacked(stored, bits)[:, :K]
    zero = _nbits_zero(array(edit, node.input(3)), N, blocks, bits)
    weight = QuantizedWeight(codes, np.asarray(scales, np.float32).reshape(N, blocks), zero, bits, block)
    name = edit.constant(f"{source}.codes", weight)
    activations = "a8" if node.attrs.get("accuracy_level", 0) == 4 else "a32"
    linear(edit, node, node.inputs[0], name, bias=node.input(5), activations=activations)


def _matmul_bnb4(edit: Editor, node: Node) -> None:
    """com.microsoft.MatMulBnb4 with NormalFloat: the flat [N, K] matrix two codes a byte, the first in the high half,
    and a scale for every `block_size` of them."""
    K, N, block = (int(node.attrs[k]) for k in ("K", "N", "block_size"))
    packed, scales = array(edit, node.inputs[1]), array(edit, node.inputs[2])
    if (
        node.attrs["quant_type"] != 1
        or packed is None
        or scales is None
        or K % block
        or not node.attrs.get("transB", 1)
    ):
        return  # the operator's own rule takes it
    flat = packed.reshape(-1)
    codes = np.stack([flat >> 4, flat & 15], axis=-1).reshape(N, K)
    weight = QuantizedWeight(codes, np.asarray(scales, np.float32).reshape(N, -1), 0.0, 4, block, "nf4")
    linear(edit, node, node.inputs[0], edit.constant(f"{node.inputs[1]}.codes", weight), activations="a32")


def _unpacked(stored: np.ndarray, bits: int) -> np.ndarray:
    """[N, bytes] -> codes [N, bytes * 8 / bits], a byte's lowest bits first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return (stored[..., None] >> shifts & ((1 << bits) - 1)).reshape(len(stored), -1)


def _stored(edit: Editor, name: str) -> str:
    """The constant behind `name`: an output layer that is tied to the embedding reads its codes through a Reshape."""
    reshape = made_by(edit, name, "Reshape")
    return name if reshape is None else reshape.inputs[0]


def _gather_blocks(edit: Editor, node: Node) -> None:
    """A lookup in a table [V, E] of codes; one that the output layer has read already is the same constant."""
    codes, scales = array(edit, node.inputs[0]), array(edit, node.inputs[2])
    bits, block = int(node.attrs.get("bits", 4)), int(node.attrs.get("block_size", 128))
    axes = int(node.attrs.get("gather_axis", 0)), int(node.attrs.get("quantize_axis", 1)) % 2
    if (
        codes is None
        or scales is None
        or codes.dtype != np.uint8
        or codes.ndim != 2
        or axes != (0, 1)
        or bits not in (4, 8)
    ):
        return  # the operator's own rule takes it
    name = f"{node.inputs[0]}.codes"
    if name not in edit.constants:
        V, groups = scales.shape
        zero = _nbits_zero(array(edit, node.input(3)), V, groups, bits)
        table = PackedCodes((codes,), 2 * codes.shape[1]) if bits == 4 else codes
        edit.constant(name, QuantizedWeight(table, np.asarray(scales, np.float32), zero, bits, block))
    edit.remove(node)
    edit.add(replace(node, op="Gather", domain="", inputs=(name, node.inputs[1]), attrs={"axis": 0}))


def _nbits_zero(stored: np.ndarray | None, N: int, blocks: int, bits: int) -> float | np.ndarray:
    if stored is None:
        return float(1 << (bits - 1))
    if stored.dtype == np.uint8:
        stored = _unpacked(stored.reshape(N, -(-blocks * bits // 8)), bits)[:, :blocks]
    return simplest_zero(stored.reshape(N, blocks).astype(np.float32))


def simplest_zero(zero: np.ndarray) -> float | np.ndarray:
    """One number where all are the same: the kernel then needs no array of them."""
    first = float(zero.flat[0])
    return first if np.all(zero == first) else zero


# -- DynamicQuantizeLinear + MatMulInteger -> Cast -> Mul -------------------------------------------------------------
def _matmul_integer(edit: Editor, node: Node) -> None:
    source = made_by(edit, node.inputs[0], "DynamicQuantizeLinear")
    codes = array(edit, node.inputs[1])
    cast = only_user(edit, node.outputs[0], "Cast")
    scaled = only_user(edit, cast.outputs[0], "Mul") if cast is not None else None
    if source is None or codes is None or codes.ndim != 2 or cast is None or scaled is None:
        return
    if node.input(2) != source.outputs[2]:
        return
    factor = scaled.inputs[1] if scaled.inputs[0] == cast.outputs[0] else scaled.inputs[0]
    product = made_by(edit, factor, "Mul")
    if product is None or source.outputs[1] not in product.inputs:
        return
    scale = array(edit, product.inputs[1] if product.inputs[0] == source.outputs[1] else product.inputs[0])
    if scale is None or (scale.size != 1 and scale.shape != codes.shape[1:]):
        return
    zero = array(edit, node.input(3)) if node.input(3) else np.zeros((), codes.dtype)
    if zero is None:
        return
    weight = _from_columns(codes, scale.reshape(-1), zero.reshape(-1))
    name = edit.constant(f"{node.inputs[1]}.codes", weight)
    linear(edit, node, source.inputs[0], name, output=scaled.outputs[0], activations="a8")


def _from_columns(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> QuantizedWeight:
    """[K, N] integers with one scale and zero point a column (or one for all) to the [N, K] form."""
    K, N = codes.shape
    shift = -LIMITS[codes.dtype.name][0]
    q = np.ascontiguousarray((codes.astype(np.int16) + shift).T.astype(np.uint8))
    zeros = np.broadcast_to(zero.astype(np.float32).reshape(-1) + shift, (N,)).reshape(N, 1)
    scales = np.broadcast_to(scale.astype(np.float32), (N,)).reshape(N, 1).copy()
    return QuantizedWeight(q, scales, simplest_zero(zeros.copy()), 4 if codes.dtype.name.endswith("int4") else 8, K)


# -- DequantizeLinear of a constant -----------------------------------------------------------------------------------
def _dequantized_matmul(edit: Editor, node: Node) -> None:
    weight = float_source(edit, node.inputs[1]) or node.inputs[1]
    transpose = made_by(edit, weight, "Transpose")
    transposed = bool(node.attrs.get("transB", 0)) != (transpose is not None)
    dequantize = made_by(edit, transpose.inputs[0] if transpose is not None else weight, "DequantizeLinear")
    if dequantize is None or rank(edit, node.inputs[0]) < 2 or array(edit, node.inputs[0]) is not None:
        return
    if node.op == "Gemm" and (node.attrs.get("alpha", 1.0) != 1.0 or node.attrs.get("transA", 0)):
        return
    if node.input(2) and node.attrs.get("beta", 1.0) != 1.0:
        return
    row = _dequantized_row(edit, node.input(2))
    name = _weight_of(edit, dequantize, transposed)
    bias = bias_row(edit, row, name) if name is not None and row is not None else None
    if name is None or bias is None:
        return
    x = float_source(edit, node.inputs[0])
    activations = "a32" if x is None else "a8"
    linear(edit, node, x or node.inputs[0], name, bias=bias, activations=activations)


def _dequantized_gather(edit: Editor, node: Node) -> None:
    dequantize = made_by(edit, node.inputs[0], "DequantizeLinear")
    name = _weight_of(edit, dequantize, True) if dequantize is not None and not node.attrs.get("axis", 0) else None
    if name is not None:
        edit.remove(node)
        edit.add(replace(node, inputs=(name, node.inputs[1])))


def _gathered_codes(edit: Editor, node: Node) -> None:
    """DequantizeLinear(Gather(codes)): the lookup of a table that is quantised as a whole."""
    gather = made_by(edit, node.inputs[0], "Gather")
    if gather is None or gather.attrs.get("axis", 0) != 0 or scalar(edit, node.inputs[1]) is None:
        return
    name = _weight_of(edit, replace(node, inputs=(gather.inputs[0], *node.inputs[1:])), True)
    if name is not None:
        edit.remove(node)
        edit.add(replace(gather, inputs=(name, gather.inputs[1]), outputs=node.outputs))


def _weight_of(edit: Editor, node: Node, transposed: bool) -> str | None:
    """The constant under a DequantizeLinear as a QuantizedWeight; `transposed` says that it is stored [N, K]."""
    turned = made_by(edit, node.inputs[0], "Transpose")
    if turned is not None and rank(edit, turned.inputs[0]) == 2:
        attrs = {**node.attrs, "axis": 1 - int(node.attrs.get("axis", 1)) % 2}
        node, transposed = replace(node, inputs=(turned.inputs[0], *node.inputs[1:]), attrs=attrs), not transposed
    name = f"{node.inputs[0]}.codes{'.T' if transposed else ''}"
    if name in edit.constants:
        return name
    codes, scale = array(edit, node.inputs[0]), array(edit, node.inputs[1])
    zero = array(edit, node.input(2)) if node.input(2) else np.zeros((1,), np.float32)
    if (
        codes is None
        or scale is None
        or zero is None
        or codes.ndim != 2
        or codes.dtype.name not in (*LIMITS, _FP4)
        or codes.dtype.itemsize > 1
    ):
        return None
    axis, block = int(node.attrs.get("axis", 1)) % 2, int(node.attrs.get("block_size", 0))
    table = "fp4" if codes.dtype.name == _FP4 else ""
    shift = 0 if table else -LIMITS[codes.dtype.name][0]
    q = codes.view(np.uint8) & 15 if table else (codes.astype(np.int16) + shift).astype(np.uint8)
    scale, zero = scale.astype(np.float32), zero.astype(np.float32) + shift
    if table and zero.any():
        return None
    if not transposed:
        q, axis = q.T, 1 - axis
        scale, zero = (v.T if v.ndim == 2 else v for v in (scale, zero))
    N, K = q.shape
    if block and axis != 1:
        return None  # blocks along N: no kernel reads that
    if not block and axis == 1 and scale.size > 1:
        return None  # one scale for each input channel
    groups = -(-K // block) if block else 1

    def fit(value: np.ndarray) -> np.ndarray:
        """One number for each row and group."""
        return np.ascontiguousarray(np.broadcast_to(value if value.ndim == 2 else value.reshape(-1, 1), (N, groups)))

    bits = 4 if codes.dtype.name.endswith("int4") or table else 8
    weight = QuantizedWeight(np.ascontiguousarray(q), fit(scale), simplest_zero(fit(zero)), bits, block or K, table)
    edit.types[name] = replace(edit.types[node.inputs[0]], shape=(N, K), dtype="float32")
    edit.constants[name] = weight
    return name


def _dequantized_row(edit: Editor, name: str) -> str | None:
    """A bias, dequantised where it is stored as integers; "" where there is none, None where it is run-time data."""
    if not name or array(edit, name) is not None:
        return name
    node = made_by(edit, name, "DequantizeLinear")
    codes = array(edit, node.inputs[0]) if node is not None else None
    scale = array(edit, node.inputs[1]) if node is not None else None
    zero = array(edit, node.input(2)) if node is not None and node.input(2) else np.zeros((), np.float32)
    if node is None or codes is None or scale is None or zero is None:
        return None
    row = (codes.astype(np.float32) - zero.astype(np.float32)) * scale.astype(np.float32)
    return edit.constant(f"{name}.row", row.reshape(-1))
