"""com.microsoft's GroupQueryAttention and MultiHeadAttention become `Attention`; FusedConv is taken apart again."""

from __future__ import annotations

import math

import numpy as np

from llmc.fuse.build import Mask, attention, key_bias, positions
from llmc.fuse.heads import Heads
from llmc.fuse.rope import table_rows
from llmc.graph import Dim, Editor, Graph, Node, TensorType
from llmc.match import array, nodes, rank

# FusedConv's activations, and what their parameters are called. A Clip with limits as attributes is of opset 6.
_PARAMETERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("Relu", "Sigmoid", "Tanh"), ()),
    **{"LeakyRelu": ("alpha",), "Clip": ("min", "max"), "HardSigmoid": ("alpha", "beta")},
}
_VERSIONS = {"Clip": 6, "Conv": 11, "HardSigmoid": 6}


def fuse_contrib(graph: Graph) -> Graph:
    edit = Editor(graph)
    for node in nodes(edit, "GroupQueryAttention", domain="com.microsoft"):
        _group_query(edit, node)
    for node in nodes(edit, "MultiHeadAttention", domain="com.microsoft"):
        _multi_head(edit, node)
    for node in nodes(edit, "FusedConv", domain="com.microsoft"):
        _fused_conv(edit, node)
    return edit.finish()


def _group_query(edit: Editor, node: Node) -> None:
    qkv, k, v, past_k, past_v, seqlens = node.inputs[:6]
    H, KV = int(node.attrs["num_heads"]), int(node.attrs["kv_num_heads"])
    B, S, width = edit.types[qkv].shape
    unusual = any(node.input(i) for i in range(10, len(node.inputs))) or node.attrs.get("smooth_softmax", 0) == 1
    unusual = unusual or not node.attrs.get("causal", 1) or bool(node.attrs.get("sliding_window_cache", 0))
    unusual = unusual or edit.types[qkv].dtype != "float32"
    if unusual or not past_k or not isinstance(width, int) or any(node.outputs[3:]):
        return
    D = width // (H if k else H + 2 * KV)
    past = edit.types[past_k].shape[2]
    total = past + S
    cos = sin = ""
    if node.attrs.get("do_rotary", 0):
        if array(edit, node.input(7)) is None or array(edit, node.input(8)) is None:
            return
        at = node.input(9) or positions(edit, B, past, S)
        cos, sin = (table_rows(edit, node.inputs[i], at) for i in (7, 8))
    window = int(node.attrs.get("local_window_size", -1))
    rotated = bool(node.attrs.get("rotary_interleaved", 0))
    presents = tuple(node.outputs[1:3]) + ("",) * (3 - len(node.outputs))
    edit.remove(node)
    attention(
        edit,
        node,
        Heads(qkv, H, cos, sin, rotated),
        Heads(k, KV, cos, sin, rotated) if k else None,
        Heads(v, KV) if v else None,
        past=(past_k, past_v),
        outputs=(node.outputs[0], presents[0], presents[1]),
        total=total,
        head_dim=D,
        n_kv_heads=KV,
        scale=node.attrs.get("scale", 0.0) or 1 / math.sqrt(D),
        mask=Mask(True, max(window, 0), _valid_keys(edit, seqlens, B, total)),
        softcap=node.attrs.get("softcap", 0.0),
    )


def _valid_keys(edit: Editor, seqlens: str, batch: Dim, total: Dim) -> str:
    """Key bias of `seqlens_k`, which holds the index of each sequence's last valid key."""
    visible = f"{seqlens}.valid"
    if visible not in edit.types:
        last = f"{seqlens}.column"
        axes = edit.constant(f"{last}.axes", np.array([1]))
        wide = edit.fresh(f"{seqlens}.int64")
        type_ = edit.types[seqlens]
        edit.add(Node("Cast", (seqlens,), (wide,), {"to": 7}, version=13), [TensorType(type_.shape, "int64")])
        if len(type_.shape) == 1:
            edit.add(Node("Unsqueeze", (wide, axes), (last,), version=13), [TensorType((batch, 1), "int64")])
        else:
            last = wide
        keys = positions(edit, 1, 0, total)
        edit.add(Node("LessOrEqual", (keys, last), (visible,), version=16), [TensorType((batch, total), "bool")])
    return key_bias(edit, visible)


def _multi_head(edit: Editor, node: Node) -> None:
    """Separate [B, S, H*D] inputs without biases or a past; everything else is left to the operator's rule."""
    if len(node.inputs) < 3 or not all(node.inputs[:3]) or any(rank(edit, x) != 3 for x in node.inputs[:3]):
        return
    padding, bias = node.input(4), node.input(5)
    if node.input(3) or any(node.inputs[6:]) or any(node.outputs[1:]) or edit.types[node.inputs[0]].dtype != "float32":
        return
    q, k, v = node.inputs[:3]
    H, width = int(node.attrs["num_heads"]), edit.types[q].shape[2]
    if not isinstance(width, int) or edit.types[v].shape[2] != width:
        return
    total = edit.types[k].shape[1]
    if padding and rank(edit, padding) != 2:
        return
    D = width // H
    edit.remove(node)
    attention(
        edit,
        node,
        Heads(q, H),
        Heads(k, H),
        Heads(v, H),
        past=("", ""),
        outputs=(node.outputs[0], "", ""),
        total=total,
        head_dim=D,
        n_kv_heads=H,
        scale=node.attrs.get("scale", 0.0) or 1 / math.sqrt(D),
        mask=Mask(bool(node.attrs.get("unidirectional", 0)), 0, key_bias(edit, padding) if padding else "", bias),
    )


def _fused_conv(edit: Editor, node: Node) -> None:
    """A convolution, a tensor that is added and an activation: rewrites of single operators put them together again."""
    activation = node.attrs.get("activation", "")
    activation = activation.decode() if isinstance(activation, bytes) else activation
    if activation not in ("", *_PARAMETERS):
        return
    residual, type_ = node.input(3), edit.types[node.outputs[0]]
    own = {k: v for k, v in node.attrs.items() if not k.startswith("activation")}
    steps = [("Conv", node.inputs[1:3], own)]
    if residual:
        steps.append(("Add", (residual,), {}))
    if activation:
        values = node.attrs.get("activation_params") or ()
        steps.append((activation, (), dict(zip(_PARAMETERS[activation], map(float, values), strict=False))))
    edit.remove(node)
    x = node.inputs[0]
    for i, (op, rest, attrs) in enumerate(steps, 1):
        y = node.outputs[0] if i == len(steps) else edit.fresh(f"{node.outputs[0]}.{op}")
        edit.add(Node(op, (x, *rest), (y,), attrs, "", node.name, _VERSIONS.get(op, 13)), [type_])
        x = y
