"""What torch.onnx's first exporter writes (dynamo=False), and optimum with it: every size that a module asks for is
Shape → Gather → Unsqueeze → Concat, `expand` is a comparison with -1, attention is the decomposition of
scaled_dot_product_attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from onnx import numpy_helper

from tests.exporters.motif import Motif, decoder_feeds, encoder_feeds, weights
from tests.graphs import F32, I64, Builder

LOWEST = np.finfo(np.float32).min
E, H, KV, D, VOCAB = 32, 4, 2, 8, 37


class TorchScript(Builder):
    """Names count up, as the exporter's do, and weights that it transposed have colons in their names."""

    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng(0)

    def __call__(self, op: str, *inputs: str, **attrs: Any) -> str:
        return self.op(op, list(inputs), f"{op}_{len(self.nodes)}_output_0", **attrs)

    def value(self, value: Any, dtype: Any = np.int64) -> str:
        """A Constant node."""
        return self("Constant", value=numpy_helper.from_array(np.asarray(value, dtype)))

    def weight(self, *shape: int) -> str:
        return self.const(f"onnx::MatMul_{len(self.tensors)}", weights(self.rng, *shape))

    def size(self, x: str, axis: int) -> str:
        return self("Gather", self("Shape", x), self.value(axis), axis=0)

    def sizes(self, *dims: int | str) -> str:
        """A list of sizes, numbers or scalars, as one tensor."""
        parts = [self.value([d]) if isinstance(d, int) else self("Unsqueeze", d, self.value([0])) for d in dims]
        return self("Concat", *parts, axis=0)

    def view(self, x: str, *dims: int | str) -> str:
        return self("Reshape", x, self.sizes(*dims), allowzero=0)

    def expand(self, x: str, *dims: int | str) -> str:
        """-1 keeps a dimension."""
        wanted = self("Reshape", self.sizes(*dims), self.value([-1]), allowzero=0)
        ones = self("ConstantOfShape", self("Shape", wanted), value=numpy_helper.from_array(np.array([1])))
        kept = self("Equal", wanted, self("Mul", ones, self.value(-1)))
        return self("Expand", x, self("Where", kept, ones, wanted))

    def linear(self, x: str, inner: int, outer: int, bias: bool = True) -> str:
        product = self("MatMul", x, self.weight(inner, outer))
        return self("Add", self.weight(outer), product) if bias else product

    def heads(self, x: str, like: str, n: int) -> str:
        width = self("Cast", self("Div", self.size(like, 2), self.value(H)), to=7)
        split = self.view(x, self.size(like, 0), self.size(like, 1), n, self("Cast", width, to=7))
        return self("Transpose", split, perm=[0, 2, 1, 3])

    def attend(self, q: str, k: str, v: str, mask: str, like: str, guard: bool) -> str:
        """scaled_dot_product_attention, [B, S, E]; with `guard`, a query that sees nothing gets zeros for NaNs."""
        width = self("Slice", self("Shape", q), self.value([-1]), self.value([2**63 - 1]))
        root = self("Sqrt", self("Cast", width, to=1))
        scale = self("Cast", self("Div", self.value([1.0], np.float32), root), to=1)
        keys = self("Transpose", k, perm=[0, 1, 3, 2])
        scaled = self("Mul", q, self("Sqrt", scale)), self("Mul", keys, self("Sqrt", scale))
        probabilities = self("Softmax", self("Add", self("MatMul", *scaled), mask), axis=-1)
        if guard:
            empty = self("IsNaN", probabilities)
            probabilities = self("Where", empty, self.value(0, np.float32), probabilities)
        mixed = self("Transpose", self("MatMul", probabilities, v), perm=[0, 2, 1, 3])
        return self.view(mixed, self.size(like, 0), self.size(like, 1), E)

    def rms(self, x: str) -> str:
        """With the casts that float16 models need, and float32 ones keep."""
        x = self("Cast", x, to=1)
        mean = self("ReduceMean", self("Pow", x, self.value(2, np.float32)), axes=[-1], keepdims=1)
        root = self("Sqrt", self("Add", mean, self.value(1e-6, np.float32)))
        normed = self("Mul", x, self("Div", self.value(1, np.float32), root))
        return self("Mul", self.weight(E), self("Cast", normed, to=1))

    def rotated(self, x: str, cos: str, sin: str) -> str:
        half = self("Cast", self("Div", self.size(x, 3), self.value(2)), to=7)
        half = self("Unsqueeze", half, self.value([0]))
        end, last, step = self.value([2**63 - 1]), self.value([3]), self.value([1])
        low = self("Slice", x, self.value([0]), half, last, step)
        high = self("Slice", x, half, end, last, step)
        turned = self("Concat", self("Neg", high), low, axis=-1)
        return self("Add", self("Mul", x, cos), self("Mul", turned, sin))

    def result(self, x: str, name: str) -> None:
        self.op("Identity", [x], name)


def encoder(path: Path) -> Path:
    """BERT of transformers: padding by a boolean mask, guarded attention, GELU by Erf."""
    g = TorchScript()
    g.input("input_ids", I64, ["batch", "seq"])
    g.input("attention_mask", I64, ["batch", "seq"])
    g.output("hidden", F32, ["batch", "seq", E])
    x = g("Gather", g.weight(VOCAB, E), "input_ids")
    norm = lambda x: g("LayerNormalization", x, g.weight(E), g.weight(E), axis=-1, epsilon=1e-12)  # noqa: E731
    wide = g("Unsqueeze", g("Unsqueeze", "attention_mask", g.value([1])), g.value([2]))
    seen = g("Cast", g.expand(wide, -1, -1, g.size("input_ids", 1), -1), to=9)
    mask = g("Where", seen, g.value(0, np.float32), g.value(-np.inf, np.float32))
    q, k, v = (g.heads(g.linear(x, E, E), x, H) for _ in range(3))
    x = norm(g("Add", g.linear(g.attend(q, k, v, mask, x, guard=True), E, E), x))
    up = g.linear(x, E, 48)
    grown = g("Add", g("Erf", g("Div", up, g.value(2**0.5, np.float32))), g.value(1, np.float32))
    gelu = g("Mul", g("Mul", up, grown), g.value(0.5, np.float32))
    g.result(norm(g("Add", g.linear(gelu, 48, E), x)), "hidden")
    return g.save(path, 17)


def decoder(path: Path) -> Path:
    """A Llama of transformers 4 as optimum exports it: the mask is made of floats, and padding written into it."""
    g = TorchScript()
    g.input("input_ids", I64, ["batch_size", "sequence_length"])
    g.input("attention_mask", I64, ["batch_size", "past_sequence_length + sequence_length"])
    g.input("position_ids", I64, ["batch_size", "sequence_length"])
    past = [g.input(f"past_key_values.0.{n}", F32, ["batch_size", KV, "past_sequence_length", D]) for n in PAST]
    g.output("logits", F32, ["batch_size", "sequence_length", VOCAB])
    for n in PAST:
        g.output(f"present.0.{n}", F32, ["batch_size", KV, "past_sequence_length + sequence_length", D])
    table = g.weight(VOCAB, E)
    x = g("Gather", table, "input_ids")
    S, P = g.size(x, 1), g.size(past[0], 2)
    mask = _float_mask(g, S, P)

    inverse = g.const("onnx::Expand_1", 1e4 ** -(np.arange(0, D, 2) / D).reshape(1, -1, 1), np.float32)
    rows = g("Cast", g("Unsqueeze", "position_ids", g.value([1])), to=1)
    angles = g("MatMul", g.expand(inverse, g.size("position_ids", 0), -1, 1), rows)
    twice = g("Concat", *[g("Transpose", angles, perm=[0, 2, 1])] * 2, axis=-1)
    one = g.value(1, np.float32)  # transformers' scaling of attention
    cos, sin = (g("Unsqueeze", g("Mul", g(op, twice), one), g.value([1])) for op in ("Cos", "Sin"))

    y = g.rms(x)
    q, k, v = (g.heads(g.linear(y, E, n * D, bias=False), x, n) for n in (H, KV, KV))
    q, k = (g.rotated(z, cos, sin) for z in (q, k))
    presents = [g("Concat", old, new, axis=-2) for old, new in zip(past, (k, v), strict=True)]
    seen = g("Slice", mask, g.value([0]), g("Unsqueeze", g.size(presents[0], 2), g.value([0])), g.value([3]))
    repeated = [_repeat(g, z) for z in presents]
    x = g("Add", x, g.linear(g.attend(q, *repeated, seen, x, guard=False), E, E, bias=False))
    y = g.rms(x)
    gate, up = (g.linear(y, E, 48, bias=False) for _ in range(2))
    x = g("Add", x, g.linear(g("Mul", g("Mul", gate, g("Sigmoid", gate)), up), 48, E, bias=False))
    g.result(g("MatMul", g.rms(x), g("Transpose", table, perm=[1, 0])), "logits")
    for n, z in zip(PAST, presents, strict=True):
        g.result(z, f"present.0.{n}")
    return g.save(path, 17)


PAST = ("key", "value")


def _float_mask(g: TorchScript, S: str, P: str) -> str:
    """float32 [B, 1, S, T]: a triangle times `arange(T) > position`, with `masked_fill` through a slice of a clone."""
    T, B = g.size("attention_mask", 1), g.size("input_ids", 0)
    lowest = numpy_helper.from_array(np.array([LOWEST], np.float32))
    triangle = g("Trilu", g("ConstantOfShape", g.sizes(S, T), value=lowest), g.value(1), upper=1)
    positions = g("Reshape", g("Range", P, g("Add", P, S), g.value(1)), g.value([-1, 1]), allowzero=0)
    later = g("Greater", g("Range", g.value(0), T, g.value(1)), positions)
    causal = g("Mul", triangle, g("Cast", later, to=1))
    wide = g.expand(g("Unsqueeze", g("Unsqueeze", causal, g.value([0])), g.value([1])), B, 1, -1, -1)
    padding = g("Cast", g("Unsqueeze", g("Unsqueeze", "attention_mask", g.value([1])), g.value([2])), to=1)
    hidden = g("Equal", g("Add", wide, padding), g.value(0, np.float32))
    filled = g("Where", hidden, g.value(LOWEST, np.float32), wide)
    index = [g("Range", g.value(0), n, g.value(1)) for n in (B, g.value(1), S, T)]
    shapes = ([-1, 1, 1, 1], [-1, 1, 1], [-1, 1], [-1])
    index = [g("Reshape", i, g.value(s), allowzero=0) for i, s in zip(index, shapes, strict=True)]
    total = g("Shape", g("Add", g("Add", g("Add", index[0], index[1]), index[2]), index[3]))
    places = [g("Unsqueeze", g("Expand", i, total), g.value([-1])) for i in index]
    return g("ScatterND", wide, g("Concat", *places, axis=-1), filled)


def _repeat(g: TorchScript, x: str) -> str:
    """Each head for its group of queries."""
    B, T = g.size(x, 0), g.size(x, 2)
    return g.view(g.expand(g("Unsqueeze", x, g.value([2])), B, KV, H // KV, T, D), B, H, T, D)


def pyramid(path: Path) -> Path:
    """A picture model: SiLU, a depthwise convolution, an upsampling to the size of another tensor, `view(size(0), -1)`.
    Two weights have equal shapes, and names with colons."""
    g = TorchScript()
    g.input("x", F32, ["batch", 3, "h", "w"])
    g.output("y", F32, ["batch", 5])
    conv = lambda x, c, k, s, group=1: g(  # noqa: E731
        *("Conv", x, g.const(f"onnx::Conv_{len(g.tensors)}", weights(g.rng, 8, c, k, k)), g.weight(8)),
        **{"dilations": [1, 1], "group": group, "kernel_shape": [k, k], "pads": [k // 2] * 4, "strides": [s, s]},
    )
    a = conv("x", 3, 3, 1)
    a = g("Mul", a, g("Sigmoid", a))
    b = g("HardSwish", conv(conv(a, 8, 3, 2), 1, 3, 1, group=8))
    b = g("Relu", conv(conv(b, 8, 1, 1), 8, 1, 1))
    wanted = g("Cast", g.sizes(g.size(a, 2), g.size(a, 3)), to=7)
    kept = g("Slice", g("Shape", b), g.value([0]), g.value([2]), g.value([0]))
    options = {"coordinate_transformation_mode": "half_pixel", "mode": "linear", "nearest_mode": "floor"}
    up = g("Resize", b, "", "", g("Concat", kept, wanted, axis=0), cubic_coeff_a=-0.75, **options)
    pooled = g("GlobalAveragePool", g("Add", up, a))
    flat = g.view(pooled, g.size(pooled, 0), -1)
    g.op("Gemm", [flat, g.weight(5, 8), g.weight(5)], "y", alpha=1.0, beta=1.0, transB=1)
    return g.save(path, 17)


def recurrent(path: Path) -> Path:
    """An embedding and a bidirectional LSTM, batch first: states of zeros for as many rows as there are."""
    g = TorchScript()
    g.input("ids", I64, ["batch", "seq"])
    g.output("y", F32, ["batch", "seq", 3])
    x = g("Gather", g.weight(VOCAB, 8), "ids")
    state = numpy_helper.from_array(np.zeros(1, np.float32))
    zeros = g("ConstantOfShape", g.sizes(2, g.size(x, 0), 6), value=state)
    names = [f"LSTM_{i}" for i in range(3)]
    inputs = [g("Transpose", x, perm=[1, 0, 2]), g.weight(2, 24, 8), g.weight(2, 24, 6), g.weight(2, 48), ""]
    g.op("LSTM", [*inputs, zeros, zeros], "LSTM", outputs=names, direction="bidirectional", hidden_size=6)
    joined = g("Reshape", g("Transpose", names[0], perm=[0, 2, 1, 3]), g.value([0, 0, -1]), allowzero=0)
    g.result(g.linear(g("Transpose", joined, perm=[1, 0, 2]), 12, 3), "y")
    return g.save(path, 17)


def _pictures(run: int) -> dict[str, np.ndarray]:
    shape = ((2, 3, 12, 9), (1, 3, 17, 20))[run]
    return {"x": np.random.default_rng(run).standard_normal(shape).astype(np.float32)}


def _ids(run: int) -> dict[str, np.ndarray]:
    return {"ids": np.random.default_rng(run).integers(0, VOCAB, ((2, 5), (3, 1))[run])}


def _decoder_feeds(run: int) -> dict[str, np.ndarray]:
    names = tuple(f"past_key_values.0.{n}" for n in PAST)
    return decoder_feeds(run, vocabulary=VOCAB, kv_heads=KV, head_dim=D, names=names)


ONE_LAYER = {"Embedding": 1, "Norm": 3, "Linear": 5, "Attention": 1}
LEFT_OVER = ("Softmax", "IsNaN", "ScatterND", "Trilu", "ReduceMean", "Sigmoid")

MOTIFS = (
    Motif(
        *("torchscript-encoder", encoder, lambda run: encoder_feeds(run, VOCAB)),
        {"Embedding": 1, "Norm": 2, "Linear": 4, "Attention": 1},
        ("Softmax", "IsNaN", "Erf", "MatMul"),
    ),
    Motif("torchscript-decoder", decoder, _decoder_feeds, ONE_LAYER, LEFT_OVER),
    Motif("torchscript-pyramid", pyramid, _pictures, {"Linear": 1}, ("Relu", "HardSwish", "Gemm"), slow=True),
    Motif("torchscript-recurrent", recurrent, _ids, {"Linear": 2}),
)
