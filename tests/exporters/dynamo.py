"""What torch.onnx's second exporter writes (dynamo=True): sizes come from Shape with start and end, reshapes have
allowzero=1, keys are transposed with batch and heads in one dimension. Its first releases called every operator of
torch as a function of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.exporters.motif import Motif, decoder_feeds, encoder_feeds, weights
from tests.graphs import F32, I64, Builder

E, H, KV, D, VOCAB = 32, 4, 2, 8, 37
NEWEST = 2**63 - 1


class Dynamo(Builder):
    """Names count up; weights are initializers."""

    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng(1)

    def __call__(self, op: str, *inputs: str, **attrs: Any) -> str:
        return self.op(op, list(inputs), f"val_{len(self.nodes)}", **attrs)

    def weight(self, *shape: int) -> str:
        return self.const(f"weight_{len(self.tensors)}", weights(self.rng, *shape))

    def number(self, value: float) -> str:
        return self.const(f"number_{value}", value, np.float32)

    def size(self, x: str, axis: int) -> str:
        return self("Shape", x, start=axis, end=axis + 1)

    def linear(self, x: str, inner: int, outer: int, bias: bool = True) -> str:
        product = self("MatMul", x, self.weight(inner, outer))
        return self("Add", product, self.weight(outer)) if bias else product

    def heads(self, x: str, like: str, n: int) -> str:
        shape = self("Concat", self.size(like, 0), self.size(like, 1), self.ints(n), self.ints(D), axis=0)
        return self("Transpose", self("Reshape", x, shape, allowzero=1), perm=[0, 2, 1, 3])

    def merged(self, x: str, like: str) -> str:
        shape = self("Concat", self.size(like, 0), self.size(like, 1), self.ints(E), axis=0)
        return self("Reshape", self("Transpose", x, perm=[0, 2, 1, 3]), shape, allowzero=1)

    def attend(self, q: str, k: str, v: str, mask: str, guard: bool) -> str:
        """scaled_dot_product_attention before there was an operator for it, [B, H, S, D]."""
        shape = self("Shape", k, start=0)
        width = self("Slice", shape, self.ints(-1), self.ints(NEWEST))
        length = self("Slice", shape, self.ints(-2), self.ints(-1))
        leading = self("Slice", shape, self.ints(-(2**63)), self.ints(-2))
        flat = self("Reshape", k, self("Concat", self.ints(-1), length, width, axis=0), allowzero=0)
        back = self("Concat", leading, width, length, axis=0)
        keys = self("Reshape", self("Transpose", flat, perm=[0, 2, 1]), back, allowzero=0)
        scale = self.const("scale", [D**-0.25], np.float32)
        scores = self("Add", self("MatMul", self("Mul", q, scale), self("Mul", keys, scale)), mask)
        probabilities = self("Softmax", scores, axis=-1)
        if guard:
            probabilities = self("Where", self("IsNaN", probabilities), self.number(0), probabilities)
        return self("MatMul", probabilities, v)

    def rms(self, x: str) -> str:
        mean = self("ReduceMean", self("Pow", x, self.number(2)), self.ints(-1), keepdims=1, noop_with_empty_axes=0)
        root = self("Sqrt", self("Add", mean, self.number(1e-6)))
        return self("Mul", self.weight(E), self("Mul", x, self("Reciprocal", root)))


def encoder(path: Path) -> Path:
    """Opset 20: Gelu is an operator."""
    g = Dynamo()
    g.input("input_ids", I64, ["s23", "s27"])
    g.input("attention_mask", I64, ["s23", "s27"])
    g.output("hidden", F32, ["s23", "s27", E])
    mask = g("Cast", g("Unsqueeze", "attention_mask", g.ints(1, 2)), to=1)
    mask = g("Mul", g("Sub", g.number(1), mask), g.number(float(np.finfo(np.float32).min)))
    mask = g("Expand", mask, g("Concat", g.ints(1), g.ints(1), g.size("input_ids", 1), g.ints(1), axis=0))
    x = g("Gather", g.weight(VOCAB, E), "input_ids", axis=0)
    norm = lambda x: g(  # noqa: E731
        *("LayerNormalization", x, g.weight(E), g.weight(E)), axis=-1, epsilon=1e-5, stash_type=1
    )
    y = norm(x)
    q, k, v = (g.heads(g.linear(y, E, E), x, H) for _ in range(3))
    x = g("Add", x, g.linear(g.merged(g.attend(q, k, v, mask, guard=False), x), E, E))
    up = g("Gelu", g.linear(norm(x), E, 48), approximate="none")
    g.op("Add", [x, g.linear(up, 48, E)], "hidden")
    return g.save(path, 20)


def _decoder(path: Path, opset: int) -> Path:
    """A Llama of transformers 5: a boolean mask; before opset 23 torch decomposes its attention.

    From 23 on there is Attention, behind a past that torch joins and heads that it repeats itself, and RotaryEmbedding,
    with tables of its own for queries and for keys. Past keys and past values have dimensions of other names.
    """
    g, standard = Dynamo(), opset >= 23
    g.input("input_ids", I64, ["batch", "seq"])
    g.input("attention_mask", I64, ["batch", "s53"])
    g.input("position_ids", I64, ["batch", "seq"])
    past = [g.input(f"past_{n}", F32, ["batch", KV, f"s{i}", D]) for i, n in enumerate(PAST)]
    g.output("logits", F32, ["batch", "seq", VOCAB])
    for i, n in enumerate(PAST):
        g.output(f"present_{n}", F32, ["batch", KV, f"s{i} + seq", D])
    S, P = (g("Squeeze", g.size(x, axis)) for x, axis in (("input_ids", 1), (past[0], 2)))
    zero, one = g.const("zero", 0, np.int64), g.const("one", 1, np.int64)
    T = g("Add", P, S)
    row = g("Unsqueeze", g("Range", P, T, one), g.ints(1))
    causal = g("LessOrEqual", g("Unsqueeze", g("Range", zero, T, one), g.ints(0)), row)
    padding = g("Unsqueeze", g("Cast", "attention_mask", to=9), g.ints(1, 2))
    mask = g("And", g("Unsqueeze", causal, g.ints(0, 1)), padding)
    if not standard:
        mask = g("Where", mask, g.number(0), g.number(float("-inf")))

    x = g("Gather", "embed", "input_ids", axis=0)
    g.const("embed", weights(g.rng, VOCAB, E))
    inverse = g.const("inverse", 1e4 ** -(np.arange(0, D, 2) / D).reshape(1, -1, 1), np.float32)
    wide = g("Expand", inverse, g("Concat", g.size("position_ids", 0), g.ints(1), g.ints(1), axis=0))
    rows = g("Cast", g("Unsqueeze", "position_ids", g.ints(1)), to=1)
    angles = g("Transpose", g("MatMul", wide, rows), perm=[0, 2, 1])
    twice = g("Concat", angles, angles, axis=-1)
    tables = [g("Unsqueeze", g(op, twice), g.ints(1)) for op in ("Cos", "Sin")]

    def rotate(x: str, heads: int) -> str:
        if standard:
            return g("RotaryEmbedding", x, g("Cos", angles), g("Sin", angles), num_heads=heads)
        low = g("Slice", x, g.ints(0), g.ints(D // 2), g.ints(3), g.ints(1))
        high = g("Slice", x, g.ints(D // 2), g.ints(NEWEST), g.ints(3), g.ints(1))
        turned = g("Concat", g("Neg", high), low, axis=-1)
        return g("Add", g("Mul", x, tables[0]), g("Mul", turned, tables[1]))

    y = g.rms(x)
    q, k, v = (g.heads(g.linear(y, E, n * D, bias=False), x, n) for n in (H, KV, KV))
    new = rotate(k, KV), v
    presents = [g.op("Concat", [old, z], f"present_{n}", axis=2) for old, z, n in zip(past, new, PAST, strict=True)]
    length = g("Reshape", T, g.ints(-1), allowzero=0)
    grouped = g("Concat", g.size(past[0], 0), g.ints(KV), g.ints(H // KV), length, g.ints(D), axis=0)
    joined = g("Concat", g.size(past[0], 0), g.ints(H), length, g.ints(D), axis=0)
    k, v = (g("Reshape", g("Expand", g("Unsqueeze", z, g.ints(2)), grouped), joined, allowzero=1) for z in presents)
    q = rotate(q, H)
    mixed = g("Attention", q, k, v, mask, is_causal=0, softcap=0.0) if standard else g.attend(q, k, v, mask, guard=True)
    x = g("Add", x, g.linear(g.merged(mixed, x), E, E, bias=False))
    y = g.rms(x)
    gate, up = (g.linear(y, E, 48, bias=False) for _ in range(2))
    gate = g("Swish", gate) if opset >= 24 else g("Mul", gate, g("Sigmoid", gate))
    x = g("Add", x, g.linear(g("Mul", gate, up), 48, E, bias=False))
    g.op("MatMul", [g.rms(x), g.const("embed.T", np.ascontiguousarray(g.tensors["embed"].T))], "logits")
    return g.save(path, opset)


PAST = ("key", "value")


def decoder18(path: Path) -> Path:
    return _decoder(path, 18)


def decoder23(path: Path) -> Path:
    return _decoder(path, 23)


TORCH, COMMON = "pkg.onnxscript.torch_lib", "pkg.onnxscript.torch_lib.common"


def functions(path: Path) -> Path:
    """A perceptron of the releases up to 2.5: functions that call functions, with attributes that refer to theirs."""
    node, opsets = helper.make_node, [helper.make_opsetid("", 18), helper.make_opsetid(COMMON, 1)]

    def function(
        domain: str, name: str, inputs: list[str], nodes: list[Any], attributes: list[str] | None = None
    ) -> Any:
        return helper.make_function(domain, name, inputs, ["result"], nodes, opsets, attributes or [])

    def refer(made: onnx.NodeProto, attribute: str, to: str, kind: int) -> onnx.NodeProto:
        made.attribute.append(onnx.AttributeProto(name=attribute, ref_attr_name=to, type=kind))
        return made

    constant = lambda name, value, dtype: node(  # noqa: E731
        "Constant", [], [name], value=numpy_helper.from_array(np.asarray(value, dtype))
    )
    rank = [node("Shape", ["x"], ["shape"]), node("Size", ["shape"], ["result"])]
    linear = [
        node("Transpose", ["weight"], ["turned"], perm=[1, 0]),
        node("MatMul", ["x", "turned"], ["product"]),
        node("Add", ["product", "bias"], ["result"]),
    ]
    softmax = [
        node("Rank", ["x"], ["rank"], domain=COMMON),
        constant("zero", 0, np.int64),
        node("Equal", ["rank", "zero"], ["is_scalar"]),
        node(
            "If",
            ["is_scalar"],
            ["result"],
            then_branch=helper.make_graph(
                [constant("axes", [0], np.int64), node("Unsqueeze", ["x", "axes"], ["row"])],
                "then",
                [],
                [helper.make_tensor_value_info("row", TensorProto.FLOAT, None)],
            ),
            else_branch=helper.make_graph(
                [refer(node("Softmax", ["x"], ["y"]), "axis", "dim", onnx.AttributeProto.INT)],
                "else",
                [],
                [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            ),
        ),
    ]
    rng = np.random.default_rng(2)
    tensors = {"w1": weights(rng, 48, E), "b1": weights(rng, 48), "w2": weights(rng, 7, 48), "b2": weights(rng, 7)}
    calls = [
        node("aten_linear", ["x", "w1", "b1"], ["h"], domain=TORCH),
        node("aten_relu", ["h"], ["r"], domain=TORCH),
        node("aten_linear", ["r", "w2", "b2"], ["logits"], domain=TORCH),
        node("aten_softmax", ["logits"], ["y"], domain=TORCH, dim=-1),
    ]
    graph = helper.make_graph(
        calls,
        "main_graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", E])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 7])],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    made = [
        function(TORCH, "aten_linear", ["x", "weight", "bias"], linear),
        function(TORCH, "aten_relu", ["x"], [node("Relu", ["x"], ["result"])]),
        function(TORCH, "aten_softmax", ["x"], softmax, ["dim"]),
        function(COMMON, "Rank", ["x"], rank),
    ]
    imports = [helper.make_opsetid("", 18), helper.make_opsetid(TORCH, 1), helper.make_opsetid(COMMON, 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports, functions=made, ir_version=8), path)
    return path


def _rows(run: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(run).standard_normal(((4, E), (1, E))[run]).astype(np.float32)}


def _decoder_feeds(run: int) -> dict[str, np.ndarray]:
    names = tuple(f"past_{n}" for n in PAST)
    return decoder_feeds(run, vocabulary=VOCAB, kv_heads=KV, head_dim=D, names=names)


ONE_LAYER = {"Embedding": 1, "Norm": 3, "Linear": 5, "Attention": 1}
LEFT_OVER = ("Softmax", "IsNaN", "And", "ReduceMean", "Sigmoid", "RotaryEmbedding", "Reciprocal")

MOTIFS = (
    Motif(
        *("dynamo-encoder", encoder, lambda run: encoder_feeds(run, VOCAB)),
        {"Embedding": 1, "Norm": 2, "Linear": 4, "Attention": 1},
        ("Softmax", "Gelu", "MatMul"),
    ),
    Motif("dynamo-decoder-18", decoder18, _decoder_feeds, ONE_LAYER, LEFT_OVER),
    Motif("dynamo-decoder-23", decoder23, _decoder_feeds, ONE_LAYER, LEFT_OVER),
    Motif("dynamo-functions", functions, _rows, {"Linear": 2}, ("Relu", "MatMul", "Transpose")),
)
