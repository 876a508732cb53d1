"""LSTM, GRU and RNN with constant weights become a `Linear`, which projects the inputs of all steps and directions at
once, and a `Recurrent`, which does the rest. Nodes with rarer attributes are left to their rule."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmc.graph import LLMC, Editor, Graph, Node, TensorType
from llmc.match import array, nodes

_ACTIVATIONS = {"LSTM": ["sigmoid", "tanh", "tanh"], "GRU": ["sigmoid", "tanh"], "RNN": ["tanh"]}


def fuse_recurrent(graph: Graph) -> Graph:
    edit = Editor(graph)
    for node in nodes(edit, *_ACTIVATIONS):
        if _usual(edit, node):
            _fuse(edit, node)
    return edit.finish()


def _usual(edit: Editor, node: Node) -> bool:
    """Constant float32 weights; no lengths, peepholes or limits; the functions that the standard defaults to."""
    weights = [array(edit, name) for name in node.inputs[1:4] if name]
    if any(w is None or w.dtype != np.float32 for w in weights) or edit.types[node.inputs[0]].dtype != "float32":
        return False
    attrs, lstm = node.attrs, node.op == "LSTM"
    if node.input(4) or (lstm and (node.input(7) or bool(node.input(5)) != bool(node.input(6)))):
        return False
    if attrs.get("clip") or attrs.get("layout") or attrs.get("input_forget"):
        return False
    functions = [_text(name).lower() for name in attrs.get("activations") or ()]
    directions = 2 if _text(attrs.get("direction", "forward")) == "bidirectional" else 1
    return not functions or functions == _ACTIVATIONS[node.op] * directions


def _fuse(edit: Editor, node: Node) -> None:
    W, R = (array(edit, name) for name in node.inputs[1:3])
    assert W is not None and R is not None
    D, rows, width = W.shape
    H = R.shape[2]
    wb, rb = np.zeros((2, D, rows), np.float32) if not node.input(3) else _biases(edit, node.input(3))
    cell, inner = node.op.lower(), ""
    if cell == "gru" and node.attrs.get("linear_before_reset"):
        cell = "gru_after"
        inner = edit.constant(f"{node.input(3) or node.inputs[2]}.{cell}.inner", rb[:, 2 * H :].copy())
        rb = np.concatenate([rb[:, : 2 * H], np.zeros_like(rb[:, 2 * H :])], 1)
    weight = edit.constant(f"{node.inputs[1]}.rows", W.reshape(D * rows, width))
    bias = edit.constant(f"{node.inputs[3]}.{cell}", (wb + rb).reshape(-1)) if node.input(3) else ""

    S, B, _ = edit.types[node.inputs[0]].shape
    projected = edit.fresh(f"{node.outputs[0] or node.name}.projected")
    plain = {"activation": "none", "activations": "a32"}
    linear = Node("Linear", (node.inputs[0], weight, bias, ""), (projected,), plain, LLMC, f"{node.name}.projection", 1)
    edit.add(linear, [TensorType((S, B, D * rows), "float32")])

    outputs = [*node.outputs, "", ""][: 3 if node.op == "LSTM" else 2]
    outputs = [
        name or edit.fresh(f"{node.name}.{role}") for name, role in zip(outputs, ("y", "y_h", "y_c"), strict=False)
    ]
    state = TensorType((D, B, H), "float32")
    types = [TensorType((S, D, B, H), "float32"), state, state]
    states = [name for name in node.inputs[5 : 7 if node.op == "LSTM" else 6] if name]
    attrs = {"cell": cell, "way": _text(node.attrs.get("direction", "forward"))}
    inputs = (projected, node.inputs[2], inner, *states)
    edit.remove(node)
    edit.add(Node("Recurrent", inputs, tuple(outputs), attrs, LLMC, node.name, 1), types)


def _biases(edit: Editor, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Those of the inputs and of the hidden states, [D, G * H] each."""
    both = array(edit, name)
    assert both is not None
    wb, rb = np.split(both, 2, axis=1)
    return wb, rb


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else value
