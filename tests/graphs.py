"""Small random models in the spellings that exporters write, for tests of whole stages.

One set of weights gives a decoder in three forms that must compile to the same kernels: primitive operators (as
torch.onnx writes them), com.microsoft's fused ones (as onnxruntime-genai's builder does), and opset 23.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

MS = "com.microsoft"
F32, I64 = TensorProto.FLOAT, TensorProto.INT64


class Builder:
    """Collects nodes and initialisers; every method returns the name of what it made."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: dict[str, np.ndarray] = {}
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def const(self, name: str, value: Any, dtype: Any = None) -> str:
        self.tensors.setdefault(name, np.asarray(value, dtype))
        return name

    def ints(self, *values: int) -> str:
        return self.const(f"i_{'_'.join(map(str, values))}", values, np.int64)

    def op(self, op: str, inputs: list[str], name: str, *, outputs: list[str] | None = None, **attrs: Any) -> str:
        outs = outputs or [name]
        self.nodes.append(helper.make_node(op, inputs, outs, name=f"/{name}", **attrs))
        return outs[0]

    def input(self, name: str, dtype: int, shape: list[int | str]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, dtype: int, shape: list[int | str]) -> str:
        self.outputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def save(self, path: Path, opset: int) -> Path:
        tensors = [numpy_helper.from_array(value, name) for name, value in self.tensors.items()]
        graph = helper.make_graph(self.nodes, path.stem, self.inputs, self.outputs, tensors)
        opsets = [helper.make_opsetid("", opset), helper.make_opsetid(MS, 1)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8 if opset < 19 else 11), path)
        return path


@dataclass(frozen=True)
class Shape:
    """Sizes of a small decoder; nothing is a multiple of a vector."""

    layers: int = 2
    hidden: int = 48
    inner: int = 80
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 16
    vocab: int = 211
    context: int = 128
    epsilon: float = 1e-5


@dataclass
class Decoder:
    """Random weights of a Llama-like decoder, [out, in] each."""

    shape: Shape = field(default_factory=Shape)
    seed: int = 0

    def __post_init__(self) -> None:
        rng, s = np.random.default_rng(self.seed), self.shape
        matrix = lambda n, k: (rng.standard_normal((n, k)) / np.sqrt(k)).astype(np.float32)  # noqa: E731
        row = lambda n: (1 + 0.1 * rng.standard_normal(n)).astype(np.float32)  # noqa: E731
        q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
        self.embed = matrix(s.vocab, s.hidden)
        self.final = row(s.hidden)
        self.blocks = [
            {
                "norm1": row(s.hidden),
                "q": matrix(q, s.hidden),
                "k": matrix(kv, s.hidden),
                "v": matrix(kv, s.hidden),
                "o": matrix(s.hidden, q),
                "norm2": row(s.hidden),
                "gate": matrix(s.inner, s.hidden),
                "up": matrix(s.inner, s.hidden),
                "down": matrix(s.hidden, s.inner),
            }
            for _ in range(s.layers)
        ]

    # -- what the three forms share -----------------------------------------------------------------------------
    def _start(self, positions: bool) -> Builder:
        g, s = Builder(), self.shape
        g.input("input_ids", I64, ["batch", "seq"])
        g.input("attention_mask", I64, ["batch", "total"])
        if positions:
            g.input("position_ids", I64, ["batch", "seq"])
        for i in range(s.layers):
            for kind in ("key", "value"):
                g.input(f"past.{i}.{kind}", F32, ["batch", s.kv_heads, "past", s.head_dim])
        g.output("logits", F32, ["batch", "seq", s.vocab])
        for i in range(s.layers):
            for kind in ("key", "value"):
                g.output(f"present.{i}.{kind}", F32, ["batch", s.kv_heads, "total", s.head_dim])
        g.const("embed.weight", self.embed)
        return g

    def _angles(self) -> np.ndarray:
        s = self.shape
        return 1.0 / 10000.0 ** (np.arange(0, s.head_dim, 2) / s.head_dim)

    def _tables(self, g: Builder) -> tuple[str, str]:
        angles = np.outer(np.arange(self.shape.context), self._angles())
        return g.const("cos_cache", np.cos(angles), np.float32), g.const("sin_cache", np.sin(angles), np.float32)

    def _matmul(self, g: Builder, x: str, name: str, weight: np.ndarray) -> str:
        return g.op("MatMul", [x, g.const(f"{name}.weight", np.ascontiguousarray(weight.T))], name)

    def _mask(self, g: Builder) -> str:
        """Boolean [batch, 1, seq, total]: causal and not padding."""
        ids = g.op("Shape", ["input_ids"], "ids.shape")
        S = g.op("Gather", [ids, g.const("one", 1, np.int64)], "S", axis=0)
        P = g.op("Gather", [g.op("Shape", ["past.0.key"], "past.shape"), g.const("two", 2, np.int64)], "P", axis=0)
        total = g.op("Add", [P, S], "T")
        step, zero = g.const("one", 1, np.int64), g.const("zero", 0, np.int64)
        query = g.op("Unsqueeze", [g.op("Range", [P, total, step], "q.range"), g.ints(1)], "q.column")
        key = g.op("Unsqueeze", [g.op("Range", [zero, total, step], "k.range"), g.ints(0)], "k.row")
        causal = g.op("Unsqueeze", [g.op("LessOrEqual", [key, query], "causal"), g.ints(0, 1)], "causal.4d")
        padding = g.op("Unsqueeze", [g.op("Cast", ["attention_mask"], "pad.bool", to=9), g.ints(1, 2)], "pad.4d")
        return g.op("And", [padding, causal], "mask")

    # -- primitive operators, opset 17 -----------------------------------------------------------------------------
    def plain(self, path: Path, *, tied: bool = True) -> Path:
        g, s = self._start(True), self.shape
        lowest = np.finfo(np.float32).min
        bias = g.op("Where", [self._mask(g), g.const("f0", 0, np.float32), g.const("low", lowest, np.float32)], "bias")
        frequencies = g.const("inv_freq", self._angles()[None, :, None], np.float32)
        position = g.op("Cast", [g.op("Unsqueeze", ["position_ids", g.ints(1)], "pos.row")], "pos.f", to=1)
        angles = g.op("Transpose", [g.op("MatMul", [frequencies, position], "angles.t")], "angles", perm=[0, 2, 1])
        twice = g.op("Concat", [angles, angles], "angles.twice", axis=-1)
        cos = g.op("Unsqueeze", [g.op("Cos", [twice], "cos"), g.ints(1)], "cos.4d")
        sin = g.op("Unsqueeze", [g.op("Sin", [twice], "sin"), g.ints(1)], "sin.4d")

        def norm(x: str, weight: np.ndarray, name: str) -> str:
            square = g.op("Pow", [x, g.const("f2", 2, np.float32)], f"{name}.square")
            mean = g.op("ReduceMean", [square], f"{name}.mean", axes=[-1], keepdims=1)
            root = g.op("Sqrt", [g.op("Add", [mean, g.const("eps", s.epsilon, np.float32)], f"{name}.e")], f"{name}.r")
            inverse = g.op("Div", [g.const("f1", 1, np.float32), root], f"{name}.inv")
            scaled = g.op("Mul", [x, inverse], f"{name}.scaled")
            return g.op("Mul", [g.const(f"{name}.weight", weight), scaled], name)

        def heads(x: str, name: str, n: int) -> str:
            split = g.op("Reshape", [x, g.ints(0, 0, n, s.head_dim)], f"{name}.split")
            return g.op("Transpose", [split], f"{name}.heads", perm=[0, 2, 1, 3])

        def rotate(x: str, name: str) -> str:
            half = s.head_dim // 2
            low = g.op("Slice", [x, g.ints(0), g.ints(half), g.ints(3)], f"{name}.low")
            high = g.op("Slice", [x, g.ints(half), g.ints(2**62), g.ints(3)], f"{name}.high")
            turned = g.op("Concat", [g.op("Neg", [high], f"{name}.neg"), low], f"{name}.turned", axis=-1)
            parts = [g.op("Mul", [x, cos], f"{name}.c"), g.op("Mul", [turned, sin], f"{name}.s")]
            return g.op("Add", parts, f"{name}.rope")

        def repeat(x: str, name: str) -> str:
            group = s.heads // s.kv_heads
            wide = g.op("Unsqueeze", [x, g.ints(2)], f"{name}.u")
            expanded = g.op("Expand", [wide, g.ints(1, 1, group, 1, 1)], f"{name}.e")
            shape = g.op("Shape", [x], f"{name}.shape")
            length = g.op("Slice", [shape, g.ints(2), g.ints(3)], f"{name}.len")
            target = g.op("Concat", [g.ints(0), g.ints(s.heads), length, g.ints(s.head_dim)], f"{name}.to", axis=0)
            return g.op("Reshape", [expanded, target], f"{name}.rep")

        h = g.op("Gather", ["embed.weight", "input_ids"], "embed")
        for i, w in enumerate(self.blocks):
            p = f"l{i}"
            x = norm(h, w["norm1"], f"{p}.norm1")
            q = rotate(heads(self._matmul(g, x, f"{p}.q", w["q"]), f"{p}.q", s.heads), f"{p}.q")
            k = rotate(heads(self._matmul(g, x, f"{p}.k", w["k"]), f"{p}.k", s.kv_heads), f"{p}.k")
            v = heads(self._matmul(g, x, f"{p}.v", w["v"]), f"{p}.v", s.kv_heads)
            k = g.op("Concat", [f"past.{i}.key", k], f"present.{i}.key", axis=2)
            v = g.op("Concat", [f"past.{i}.value", v], f"present.{i}.value", axis=2)
            keys = g.op("Transpose", [repeat(k, f"{p}.kr")], f"{p}.kt", perm=[0, 1, 3, 2])
            scale = g.const("scale", s.head_dim**-0.5, np.float32)
            scores = g.op("Mul", [g.op("MatMul", [q, keys], f"{p}.qk"), scale], f"{p}.scores")
            weights = g.op("Softmax", [g.op("Add", [scores, bias], f"{p}.masked")], f"{p}.probs", axis=-1)
            mixed = g.op("MatMul", [weights, repeat(v, f"{p}.vr")], f"{p}.mixed")
            back = g.op("Transpose", [mixed], f"{p}.back", perm=[0, 2, 1, 3])
            o = g.op("Reshape", [back, g.ints(0, 0, -1)], f"{p}.merged")
            h = g.op("Add", [h, self._matmul(g, o, f"{p}.o", w["o"])], f"{p}.res1")
            x = norm(h, w["norm2"], f"{p}.norm2")
            h = g.op("Add", [h, self._mlp(g, x, p, w)], f"{p}.res2")
        h = norm(h, self.final, "final")
        if tied:
            g.op("MatMul", [h, g.op("Transpose", ["embed.weight"], "embed.t", perm=[1, 0])], "logits")
        else:
            g.op("MatMul", [h, g.const("head.weight", np.ascontiguousarray(self.embed.T))], "logits")
        return g.save(path, 17)

    def _mlp(self, g: Builder, x: str, p: str, w: dict[str, np.ndarray]) -> str:
        gate, up = self._matmul(g, x, f"{p}.gate", w["gate"]), self._matmul(g, x, f"{p}.up", w["up"])
        silu = g.op("Mul", [gate, g.op("Sigmoid", [gate], f"{p}.sigmoid")], f"{p}.silu")
        return self._matmul(g, g.op("Mul", [silu, up], f"{p}.act"), f"{p}.down", w["down"])

    # -- opset 23 --------------------------------------------------------------------------------------------------
    def std23(self, path: Path) -> Path:
        g, s = self._start(True), self.shape
        mask, (cos, sin) = self._mask(g), self._tables(g)

        def norm(x: str, weight: np.ndarray, name: str) -> str:
            return g.op("RMSNormalization", [x, g.const(f"{name}.weight", weight)], name, axis=-1, epsilon=s.epsilon)

        def rotate(x: str, name: str, n: int) -> str:
            return g.op("RotaryEmbedding", [x, cos, sin, "position_ids"], name, num_heads=n)

        h = g.op("Gather", ["embed.weight", "input_ids"], "embed")
        for i, w in enumerate(self.blocks):
            p = f"l{i}"
            x = norm(h, w["norm1"], f"{p}.norm1")
            q = rotate(self._matmul(g, x, f"{p}.q", w["q"]), f"{p}.q.rope", s.heads)
            k = rotate(self._matmul(g, x, f"{p}.k", w["k"]), f"{p}.k.rope", s.kv_heads)
            v = self._matmul(g, x, f"{p}.v", w["v"])
            o = g.op(
                "Attention",
                [q, k, v, mask, f"past.{i}.key", f"past.{i}.value"],
                f"{p}.attn",
                outputs=[f"{p}.attn", f"present.{i}.key", f"present.{i}.value"],
                q_num_heads=s.heads,
                kv_num_heads=s.kv_heads,
                scale=s.head_dim**-0.5,
            )
            h = g.op("Add", [h, self._matmul(g, o, f"{p}.o", w["o"])], f"{p}.res1")
            h = g.op("Add", [h, self._mlp(g, norm(h, w["norm2"], f"{p}.norm2"), p, w)], f"{p}.res2")
        h = norm(h, self.final, "final")
        g.op("MatMul", [h, g.op("Transpose", ["embed.weight"], "embed.t", perm=[1, 0])], "logits")
        return g.save(path, 23)

    # -- com.microsoft ---------------------------------------------------------------------------------------------
    def genai(self, path: Path) -> Path:
        g, s = self._start(False), self.shape
        cos, sin = self._tables(g)
        count = g.op("ReduceSum", ["attention_mask", g.ints(1)], "mask.sum", keepdims=0)
        g.op("Cast", [g.op("Sub", [count, g.const("one", 1, np.int64)], "mask.last")], "seqlens_k", to=6)
        width = g.op("Shape", ["attention_mask"], "mask.shape")
        total = g.op(
            "Cast", [g.op("Gather", [width, g.const("one", 1, np.int64)], "mask.width", axis=0)], "total", to=6
        )

        def skip(x: str, residual: str, weight: np.ndarray, name: str) -> tuple[str, str]:
            inputs = [x, residual, g.const(f"{name}.weight", weight)]
            outputs = [name, "", "", f"{name}.sum"]
            op = "SkipSimplifiedLayerNormalization"
            return g.op(op, inputs, name, outputs=outputs, domain=MS, epsilon=s.epsilon), f"{name}.sum"

        h, d = g.op("Gather", ["embed.weight", "input_ids"], "embed"), ""
        for i, w in enumerate(self.blocks):
            p = f"l{i}"
            if d:
                x, h = skip(h, d, w["norm1"], f"{p}.norm1")
            else:
                weight = g.const(f"{p}.norm1.weight", w["norm1"])
                x = g.op("SimplifiedLayerNormalization", [h, weight], f"{p}.norm1", axis=-1, epsilon=s.epsilon)
            qkv = self._matmul(g, x, f"{p}.qkv", np.concatenate([w["q"], w["k"], w["v"]]))
            o = g.op(
                "GroupQueryAttention",
                [qkv, "", "", f"past.{i}.key", f"past.{i}.value", "seqlens_k", total, cos, sin],
                f"{p}.attn",
                outputs=[f"{p}.attn", f"present.{i}.key", f"present.{i}.value"],
                domain=MS,
                num_heads=s.heads,
                kv_num_heads=s.kv_heads,
                scale=s.head_dim**-0.5,
                do_rotary=1,
            )
            x, h = skip(h, self._matmul(g, o, f"{p}.o", w["o"]), w["norm2"], f"{p}.norm2")
            d = self._mlp(g, x, p, w)
        x, _ = skip(h, d, self.final, "final")
        self._matmul(g, x, "logits", self.embed)
        return g.save(path, 17)


FORMS = ("plain", "std23", "genai")


def decoder_feeds(shape: Shape, batch: int, seq: int, past: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs of the functional form, without position_ids for forms that have none: drop what is not asked."""
    rng = np.random.default_rng(seed)
    feeds = {
        "input_ids": rng.integers(0, shape.vocab, (batch, seq)),
        "attention_mask": np.ones((batch, seq + past), np.int64),
        "position_ids": np.broadcast_to(np.arange(past, past + seq), (batch, seq)).copy(),
    }
    for i in range(shape.layers):
        for kind in ("key", "value"):
            size = (batch, shape.kv_heads, past, shape.head_dim)
            feeds[f"past.{i}.{kind}"] = rng.standard_normal(size).astype(np.float32)
    return feeds


def linear(path: Path, size: int) -> Path:
    """y = relu(x W), x [rows, size]: the smallest model with a linear layer."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", size]) for name in "xy")
    weight = numpy_helper.from_array(np.random.default_rng(0).standard_normal((size, size), np.float32), "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Relu", ["p"], ["y"])]
    graph = helper.make_graph(nodes, "g", [x], [y], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def encoder(path: Path, *, layers: int = 2, hidden: int = 48, heads: int = 4, inner: int = 96, seed: int = 0) -> Path:
    """A BERT-like encoder in primitives: padding mask, layer norm with bias, exact GELU."""
    rng, g, D = np.random.default_rng(seed), Builder(), hidden // heads
    g.input("input_ids", I64, ["batch", "seq"])
    g.input("attention_mask", I64, ["batch", "seq"])
    g.output("hidden", F32, ["batch", "seq", hidden])

    def linear(x: str, name: str, n: int, k: int) -> str:
        weight = g.const(f"{name}.weight", rng.standard_normal((k, n)) / np.sqrt(k), np.float32)
        bias = g.const(f"{name}.bias", rng.standard_normal(n) * 0.1, np.float32)
        return g.op("Add", [g.op("MatMul", [x, weight], f"{name}.mm"), bias], name)

    def norm(x: str, name: str) -> str:
        weight = g.const(f"{name}.weight", 1 + 0.1 * rng.standard_normal(hidden), np.float32)
        bias = g.const(f"{name}.bias", 0.1 * rng.standard_normal(hidden), np.float32)
        return g.op("LayerNormalization", [x, weight, bias], name, axis=-1, epsilon=1e-12)

    mask = g.op("Cast", [g.op("Unsqueeze", ["attention_mask", g.ints(1, 2)], "mask.4d")], "mask.f", to=1)
    hidden_bias = g.op("Sub", [g.const("f1", 1, np.float32), mask], "mask.inverse")
    bias = g.op("Mul", [hidden_bias, g.const("low", np.finfo(np.float32).min, np.float32)], "mask.bias")
    table = g.const("words.weight", rng.standard_normal((97, hidden)), np.float32)
    h = norm(g.op("Gather", [table, "input_ids"], "words"), "norm0")
    for i in range(layers):
        p = f"l{i}"
        parts = {}
        for name, perm in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
            split = g.op("Reshape", [linear(h, f"{p}.{name}", hidden, hidden), g.ints(0, 0, heads, D)], f"{p}.{name}.s")
            parts[name] = g.op("Transpose", [split], f"{p}.{name}.t", perm=perm)
        product = g.op("MatMul", [parts["q"], parts["k"]], f"{p}.qk")
        scores = g.op("Div", [product, g.const("root", D**0.5, np.float32)], f"{p}.scores")
        weights = g.op("Softmax", [g.op("Add", [scores, bias], f"{p}.masked")], f"{p}.probs", axis=-1)
        mixed = g.op("MatMul", [weights, parts["v"]], f"{p}.mixed")
        back = g.op("Transpose", [mixed], f"{p}.back", perm=[0, 2, 1, 3])
        merged = g.op("Reshape", [back, g.ints(0, 0, hidden)], f"{p}.merged")
        h = norm(g.op("Add", [linear(merged, f"{p}.o", hidden, hidden), h], f"{p}.res1"), f"{p}.norm1")
        up = linear(h, f"{p}.up", inner, hidden)
        erf = g.op("Erf", [g.op("Div", [up, g.const("root2", 2**0.5, np.float32)], f"{p}.d")], f"{p}.erf")
        gate = g.op("Mul", [up, g.op("Add", [erf, g.const("f1", 1, np.float32)], f"{p}.e1")], f"{p}.g")
        gelu = g.op("Mul", [gate, g.const("half", 0.5, np.float32)], f"{p}.gelu")
        out = g.op("Add", [linear(gelu, f"{p}.down", hidden, inner), h], f"{p}.res2")
        h = norm(out, "hidden" if i == layers - 1 else f"{p}.norm2")
    return g.save(path, 17)
