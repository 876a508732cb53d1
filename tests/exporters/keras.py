"""What tf2onnx writes: channels last behind Transposes, sizes in int32, dense layers on flattened rows, layer
normalisation as moments and batch_normalization."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto

from tests.exporters.motif import Motif, encoder_feeds, weights
from tests.graphs import F32, Builder

I32 = TensorProto.INT32
E, H, D, VOCAB = 32, 4, 8, 37
END = 10**9  # what a slice without an end is written with


class Keras(Builder):
    """Names have colons, as TensorFlow's do."""

    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng(6)

    def __call__(self, op: str, *inputs: str, **attrs: Any) -> str:
        return self.op(op, list(inputs), f"{op}__{len(self.nodes)}:0", **attrs)

    def weight(self, *shape: int) -> str:
        return self.const(f"weight_{len(self.tensors)}:0", weights(self.rng, *shape))

    def number(self, value: float) -> str:
        return self.const(f"const_{value}", value, np.float32)

    def dense(self, x: str, inner: int, outer: int) -> str:
        """tensordot: rows are flattened, and the other dimensions restored from int32 sizes."""
        product = self("MatMul", self("Reshape", x, self.ints(-1, inner)), self.weight(inner, outer))
        free = self("Gather", self("Cast", self("Shape", x), to=6), self.const("free", [0, 1], np.int32), axis=0)
        shape = self("Concat", free, self.const(f"outer_{outer}", [outer], np.int32), axis=0)
        return self("Reshape", product, self("Cast", shape, to=7))

    def norm(self, x: str) -> str:
        """x * s + (beta - mean * s), s = gamma / sqrt(variance + epsilon); GlobalAveragePool means the last axis."""
        mean = self("GlobalAveragePool", x)
        difference = self("Sub", x, mean)
        variance = self("GlobalAveragePool", self("Mul", difference, difference))
        root = self("Reciprocal", self("Sqrt", self("Add", variance, self.number(1e-6))))
        scale = self("Mul", root, self.weight(E))
        shift = self("Sub", self.weight(E), self("Mul", mean, scale))
        return self("Add", self("Mul", x, scale), shift)


def encoder(path: Path) -> Path:
    g = Keras()
    g.input("input_ids", I32, ["unk__1", "unk__2"])
    g.input("attention_mask", I32, ["unk__3", "unk__4"])
    g.output("hidden", F32, ["unk__5", "unk__6", E])
    x = g("Gather", g.weight(VOCAB, E), "input_ids", axis=0)
    sizes = g("Cast", g("Shape", x), to=6)
    B, S = (g("Slice", sizes, g.ints(a), g.ints(a + 1), g.ints(0)) for a in (0, 1))
    numbers = [g.const(f"size_{n}", [n], np.int32) for n in (H, D)]
    split = g("Cast", g("Concat", B, S, *numbers, axis=0), to=7)
    y = g.norm(x)
    rows = g("Reshape", y, g.ints(-1, E))  # queries, keys and values share them
    parts = []
    for perm in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]):
        heads = g("Reshape", g("MatMul", rows, g.weight(E, E)), split)
        parts.append(g("Transpose", heads, perm=perm))
    wide = g("Unsqueeze", g("Cast", "attention_mask", to=1), g.ints(1, 2))
    every = [g.const(f"slice_{name}", value, np.int32) for name, value in (("0", [0] * 4), ("end", [END] * 4))]
    wide = g("Slice", wide, *every, g.const("slice_axes", range(4), np.int32))
    mask = g("Mul", g("Sub", g.number(1), wide), g.number(-1e9))
    scores = g("Mul", g("MatMul", parts[0], parts[1]), g.number(D**-0.5))
    mixed = g("Transpose", g("MatMul", g("Softmax", g("Add", scores, mask)), parts[2]), perm=[0, 2, 1, 3])
    joined = g("Concat", B, S, g.const(f"outer_{E}", [E], np.int32), axis=0)
    x = g("Add", x, g.dense(g("Reshape", mixed, g("Cast", joined, to=7)), E, E))
    up = g.dense(g.norm(x), E, 48)
    cubed = g("Mul", g("Pow", up, g.number(3)), g.number(0.044715))
    tanh = g("Tanh", g("Mul", g("Add", up, cubed), g.number(0.7978845608)))
    gelu = g("Mul", g("Mul", up, g.number(0.5)), g("Add", tanh, g.number(1)))
    g.op("Add", [x, g.dense(gelu, 48, E)], "hidden")
    return g.save(path, 17)


def pictures(path: Path) -> Path:
    """A convolution, ReLU6, a depthwise convolution, swish, the mean over a picture, softmax."""
    g = Keras()
    g.input("x", F32, ["unk__1", 9, 9, 3])
    g.output("y", F32, ["unk__2", 5])
    convolve = {"dilations": [1, 1], "kernel_shape": [3, 3], "pads": [1] * 4}
    x = g("Transpose", "x", perm=[0, 3, 1, 2])
    x = g("Conv", x, g.weight(8, 3, 3, 3), g.weight(8), strides=[2, 2], group=1, **convolve)
    x = g("Clip", x, g.number(0), g.number(6))
    x = g("Conv", x, g.weight(8, 1, 3, 3), strides=[1, 1], group=8, **convolve)
    x = g("GlobalAveragePool", g("Mul", x, g("Sigmoid", x)))
    x = g("MatMul", g("Squeeze", x, g.ints(2, 3)), g.weight(8, 5))
    g.op("Softmax", [g("Add", x, g.weight(5))], "y")
    return g.save(path, 17)


def recurrent(path: Path) -> Path:
    """An LSTM, batch first: states are expanded zeros, and the direction's axis is squeezed."""
    g = Keras()
    g.input("x", F32, ["unk__1", "unk__2", 4])
    g.output("y", F32, ["unk__3", "unk__4", 6])
    batch = g("Slice", g("Cast", g("Shape", "x"), to=6), g.ints(0), g.ints(1), g.ints(0))
    shape = g("Cast", g("Concat", batch, g.const("units", [6], np.int32), axis=0), to=7)
    state = g("Unsqueeze", g("Expand", g.number(0), shape), g.ints(0))
    sequence = g("Transpose", "x", perm=[1, 0, 2])
    inputs = [sequence, g.weight(1, 24, 4), g.weight(1, 24, 6), g.weight(1, 48), "", state, state]
    activations = ["Sigmoid", "Tanh", "Tanh"]
    names = ["LSTM:0", "LSTM:1", "LSTM:2"]
    g.op("LSTM", inputs, "LSTM", outputs=names, direction="forward", hidden_size=6, activations=activations)
    g.op("Transpose", [g("Squeeze", names[0], g.ints(1))], "y", perm=[1, 0, 2])
    return g.save(path, 17)


def _pictures(run: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(run).standard_normal(((2, 9, 9, 3), (1, 9, 9, 3))[run]).astype(np.float32)}


def _sequences(run: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(run).standard_normal(((2, 5, 4), (3, 1, 4))[run]).astype(np.float32)}


MOTIFS = (
    Motif(
        *("keras-encoder", encoder, lambda run: encoder_feeds(run, VOCAB, np.int32)),
        {"Embedding": 1, "Norm": 2, "Linear": 4, "Attention": 1},
        ("Softmax", "GlobalAveragePool", "MatMul", "Reshape"),
    ),
    Motif("keras-pictures", pictures, _pictures, {"Linear": 1}, ("MatMul", "Transpose")),
    Motif("keras-recurrent", recurrent, _sequences, {"Linear": 1}),
)
