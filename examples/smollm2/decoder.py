"""Writes a Llama-architecture decoder as ONNX, opset 23: Attention, RotaryEmbedding and RMSNormalization.

    (input_ids [batch, seq], attention_mask [batch, total], position_ids [batch, seq], past_key_values.*)
    -> (logits [batch, seq, vocabulary], present.*)

The caches are [batch, n_kv_heads, past or total, head_dim] with total = past + seq. Weights are float32, or stay the
blocks of the checkpoint: MatMulNBits and GatherBlockQuantized of com.microsoft then read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from weights import BLOCK, Blocks, Checkpoint

OPSET = 23
CONTRIB = "com.microsoft"


class Builder:
    """Collects nodes and initialisers; a value is the name of the node that makes it."""

    def __init__(self, quantized: bool) -> None:
        self.quantized = quantized
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}

    def op(self, kind: str, inputs: Sequence[str], name: str, *more: str, domain: str = "", **attributes: Any) -> str:
        """One node whose first output is `name`; `more` names its further outputs."""
        self.nodes.append(helper.make_node(kind, inputs, [name, *more], f"/{name}", domain=domain, **attributes))
        return name

    def weight(self, name: str, array: np.ndarray) -> str:
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def ints(self, *values: int) -> str:
        return self.weight("ints." + "_".join(map(str, values)), np.array(values, np.int64))

    def scalar(self, value: int) -> str:
        """(np.ascontiguousarray would make a vector of it.)"""
        name = f"int.{value}"
        self.initializers.setdefault(name, numpy_helper.from_array(np.array(value, np.int64), name))
        return name

    def linear(self, x: str, blocks: Blocks, name: str) -> str:
        """x [..., K] times the transpose of the [N, K] weight."""
        if not self.quantized:
            return self.op("MatMul", [x, self.weight(f"{name}.weight", blocks.float32().T)], name)
        N, K = blocks.q.shape
        codes = blocks.q[:, 0::2] | blocks.q[:, 1::2] << 4
        inputs = [
            x,
            self.weight(f"{name}.weight", codes.reshape(N, K // BLOCK, BLOCK // 2)),
            self.weight(f"{name}.scale", blocks.scale.reshape(-1)),
            self.weight(f"{name}.zero", blocks.zero.reshape(-1)),
        ]
        sizes = {"N": N, "K": K, "bits": 4, "block_size": BLOCK, "accuracy_level": 4}
        return self.op("MatMulNBits", inputs, name, domain=CONTRIB, **sizes)

    def save(self, path: Path, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]) -> None:
        graph = helper.make_graph(self.nodes, "decoder", inputs, outputs, list(self.initializers.values()))
        opsets = [helper.make_opsetid("", OPSET)] + [helper.make_opsetid(CONTRIB, 1)] * self.quantized
        model = helper.make_model(graph, opset_imports=opsets, ir_version=11, producer_name="llmc examples/smollm2")
        data = path.name + ".data"
        path.with_name(data).unlink(missing_ok=True)  # onnx appends to a file that is already there
        onnx.save_model(model, path, save_as_external_data=True, location=data, size_threshold=1024)


def write(checkpoint: Checkpoint, path: Path, quantized: bool) -> None:
    """Writes `path` and its external data beside it."""
    c, b = checkpoint.config, Builder(quantized)
    table = checkpoint.matrices["token_embd.weight"]
    mask, rotary = _mask(b), _rotary(b, checkpoint)
    h = _embedding(b, table)
    for i in range(c.n_layers):
        h = _layer(b, checkpoint, i, h, mask, rotary)
    h = _norm(b, h, checkpoint.vectors["output_norm.weight"], c.epsilon, "norm")
    _logits(b, h, checkpoint.matrices.get("output.weight"), table)

    ids = [helper.make_tensor_value_info(n, TensorProto.INT64, ["batch", "seq"]) for n in ("input_ids", "position_ids")]
    ids.insert(1, helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"]))

    def caches(name: str, length: str) -> list[onnx.ValueInfoProto]:
        shape = ["batch", c.n_kv_heads, length, c.head_dim]
        names = [f"{name}.{i}.{kv}" for i in range(c.n_layers) for kv in ("key", "value")]
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in names]

    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "seq", len(table.q)])
    b.save(path, [*ids, *caches("past_key_values", "past")], [logits, *caches("present", "total")])


def _layer(b: Builder, checkpoint: Checkpoint, i: int, h: str, mask: str, rotary: list[str]) -> str:
    """One decoder layer: h [batch, seq, hidden] to the same."""
    c, name = checkpoint.config, f"layers.{i}"

    def linear(x: str, part: str, name: str) -> str:
        return b.linear(x, checkpoint.matrices[f"blk.{i}.{part}.weight"], f"layers.{i}.{name}")

    def rotate(x: str, heads: int) -> str:
        return b.op("RotaryEmbedding", [x, *rotary], f"{x}.rotated", num_heads=heads)

    x = _norm(b, h, checkpoint.vectors[f"blk.{i}.attn_norm.weight"], c.epsilon, f"{name}.attention_norm")
    q, k, v = (linear(x, f"attn_{part}", part) for part in "qkv")
    past = [f"past_key_values.{i}.{kv}" for kv in ("key", "value")]
    attended = b.op(
        "Attention",
        [rotate(q, c.n_heads), rotate(k, c.n_kv_heads), v, mask, *past],
        f"{name}.attention",
        *(f"present.{i}.{kv}" for kv in ("key", "value")),
        q_num_heads=c.n_heads,
        kv_num_heads=c.n_kv_heads,
        scale=c.head_dim**-0.5,
    )
    h = b.op("Add", [h, linear(attended, "attn_output", "o")], f"{name}.attention_residual")

    x = _norm(b, h, checkpoint.vectors[f"blk.{i}.ffn_norm.weight"], c.epsilon, f"{name}.mlp_norm")
    gate, up = (linear(x, f"ffn_{part}", part) for part in ("gate", "up"))
    silu = b.op("Mul", [gate, b.op("Sigmoid", [gate], f"{name}.sigmoid")], f"{name}.silu")
    gated = b.op("Mul", [silu, up], f"{name}.gated")
    return b.op("Add", [h, linear(gated, "ffn_down", "down")], f"{name}.mlp_residual")


def _norm(b: Builder, x: str, weight: np.ndarray, epsilon: float, name: str) -> str:
    return b.op("RMSNormalization", [x, b.weight(f"{name}.weight", weight)], name, axis=-1, epsilon=epsilon)


def _rotary(b: Builder, checkpoint: Checkpoint) -> list[str]:
    """Inputs of RotaryEmbedding after the data: cos and sin [context, head_dim / 2], and the positions."""
    c = checkpoint.config
    frequency = c.theta ** -(np.arange(0, c.head_dim, 2) / c.head_dim)
    angle = np.outer(np.arange(c.context), frequency)
    tables = {"rotary.cos": np.cos(angle), "rotary.sin": np.sin(angle)}
    return [*(b.weight(name, table.astype(np.float32)) for name, table in tables.items()), "position_ids"]


def _mask(b: Builder) -> str:
    """bool [batch, 1, seq, total]: key j is seen by query i where j <= past + i and attention_mask allows it.

    An explicit mask, because runtimes disagree about how Attention's is_causal counts a past.
    """

    def size(value: str, axis: int, name: str) -> str:
        return b.op("Gather", [b.op("Shape", [value], f"{name}.shape"), b.scalar(axis)], name, axis=0)

    past = size("past_key_values.0.key", 2, "past")
    total = b.op("Add", [past, size("input_ids", 1, "seq")], "total")
    query = b.op("Unsqueeze", [b.op("Range", [past, total, b.scalar(1)], "query.index"), b.ints(1)], "query")
    key = b.op("Unsqueeze", [b.op("Range", [b.scalar(0), total, b.scalar(1)], "key.index"), b.ints(0)], "key")
    causal = b.op("Unsqueeze", [b.op("LessOrEqual", [key, query], "causal"), b.ints(0, 1)], "causal.mask")
    allowed = b.op("Cast", ["attention_mask"], "allowed", to=TensorProto.BOOL)
    return b.op("And", [b.op("Unsqueeze", [allowed, b.ints(1, 2)], "allowed.mask"), causal], "mask")


def _embedding(b: Builder, table: Blocks) -> str:
    if not b.quantized:
        return b.op("Gather", [b.weight("embedding.weight", table.float32()), "input_ids"], "embedding")
    inputs = [b.weight("embedding.weight", table.q), "input_ids", b.weight("embedding.scale", table.scale)]
    axes = {"gather_axis": 0, "quantize_axis": 1, "block_size": BLOCK, "bits": 8}
    return b.op("GatherBlockQuantized", inputs, "embedding", domain=CONTRIB, **axes)


def _logits(b: Builder, h: str, head: Blocks | None, table: Blocks) -> str:
    """The output layer: its own weight, or (tied) the embedding's, of which the file then holds one copy."""
    if head is not None:
        return b.linear(h, head, "logits")
    if not b.quantized:
        return b.op("MatMul", [h, b.op("Transpose", ["embedding.weight"], "head", perm=[1, 0])], "logits")
    N, K = table.q.shape
    codes = b.op("Reshape", ["embedding.weight", b.ints(N, K // BLOCK, BLOCK)], "head")
    sizes = {"N": N, "K": K, "bits": 8, "block_size": BLOCK, "accuracy_level": 4}
    return b.op("MatMulNBits", [h, codes, "embedding.scale"], "logits", domain=CONTRIB, **sizes)
