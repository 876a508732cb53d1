"""Masks are recognised by what they do: every spelling here, and none that merely looks like one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llmc.fuse import fuse
from llmc.graph import Node
from llmc.importer import import_model
from llmc.quantize import quantize
from tests.graphs import F32, I64, Builder

H, D = 2, 8


def attend(tmp_path: Path, mask: str, *, past: bool) -> Node:
    """The Attention node of a one-layer graph whose mask is spelled as `mask`."""
    graph = fuse(quantize(import_model(attention_model(tmp_path, mask, past=past)), None))
    return next(n for n in graph.nodes if n.op == "Attention")


def attention_model(tmp_path: Path, mask: str, *, past: bool) -> Path:
    """One attention layer over x [b, s, 16], 2 heads of 8, with a mask of SPELLINGS."""
    g = Builder()
    g.input("x", F32, ["b", "s", H * D])
    g.input("attention_mask", I64, ["b", "t"])

    if past:
        for kind in "kv":
            g.input(f"past_{kind}", F32, ["b", H, "p", D])
    else:
        g.inputs[1].type.tensor_type.shape.dim[1].dim_param = "s"
    g.output("y", F32, ["b", "s", H * D])
    shape = g.op("Shape", ["x"], "shape")
    S = g.op("Gather", [shape, g.const("one", 1, np.int64)], "S")
    T = S
    if past:
        P = g.op("Gather", [g.op("Shape", ["past_k"], "p.shape"), g.const("two", 2, np.int64)], "P")
        T = g.op("Add", [P, S], "T")
    bias = SPELLINGS[mask](g, S, T)
    heads = {}
    for kind in "qkv":
        weight = g.const(f"w{kind}", np.random.default_rng(ord(kind)).standard_normal((H * D, H * D)), np.float32)
        split = g.op("Reshape", [g.op("MatMul", ["x", weight], kind), g.ints(0, 0, H, D)], f"{kind}.s")
        heads[kind] = g.op("Transpose", [split], f"{kind}.h", perm=[0, 2, 1, 3])
    if past:
        for kind in "kv":
            heads[kind] = g.op("Concat", [f"past_{kind}", heads[kind]], f"{kind}.all", axis=2)
    keys = g.op("Transpose", [heads["k"]], "kt", perm=[0, 1, 3, 2])
    scores = g.op("MatMul", [heads["q"], keys], "scores")
    probs = g.op("Softmax", [g.op("Add", [scores, bias], "masked")], "probs", axis=-1)
    mixed = g.op("Transpose", [g.op("MatMul", [probs, heads["v"]], "mixed")], "back", perm=[0, 2, 1, 3])
    g.op("Reshape", [mixed, g.ints(0, 0, -1)], "y")
    return g.save(tmp_path / "m.onnx", 17)


def zero(g: Builder) -> str:
    return g.const("f0", 0, np.float32)


def low(g: Builder, value: float = np.finfo(np.float32).min) -> str:
    return g.const("low", value, np.float32)


def positions(g: Builder, S: str, T: str) -> tuple[str, str]:
    """(query positions as a column, key positions as a row)."""
    one, none = g.const("one", 1, np.int64), g.const("none", 0, np.int64)
    query = g.op("Range", [g.op("Sub", [T, S], "P0"), T, one], "q.range")
    return (
        g.op("Unsqueeze", [query, g.ints(1)], "q.col"),
        g.op("Unsqueeze", [g.op("Range", [none, T, one], "k.range"), g.ints(0)], "k.row"),
    )


def where(g: Builder, seen: str) -> str:
    return g.op("Where", [seen, zero(g), low(g)], "bias")


def causal(g: Builder, S: str, T: str) -> str:
    q, k = positions(g, S, T)
    return where(g, g.op("LessOrEqual", [k, q], "seen"))


def causal_by_trilu(g: Builder, S: str, T: str) -> str:
    """As torch writes it: the upper triangle of a matrix of -inf, shifted by the past."""
    sizes = [g.op("Unsqueeze", [x, g.ints(0)], name) for x, name in ((S, "rows"), (T, "columns"))]
    shape = g.op("Concat", sizes, "st", axis=0)
    full = g.op("Expand", [low(g, -np.inf), shape], "full")
    shift = g.op("Add", [g.op("Sub", [T, S], "past"), g.const("one", 1, np.int64)], "shift")
    return g.op("Trilu", [full, shift], "bias", upper=1)


def window(g: Builder, S: str, T: str, size: int) -> str:
    q, k = positions(g, S, T)
    near = g.op("Less", [g.op("Sub", [q, k], "distance"), g.const("window", size, np.int64)], "near")
    return where(g, g.op("And", [g.op("LessOrEqual", [k, q], "past_seen"), near], "seen"))


def padding(g: Builder, S: str, T: str) -> str:
    kept = g.op("Cast", [g.op("Unsqueeze", ["attention_mask", g.ints(1, 2)], "pad.4d")], "pad.f", to=1)
    return g.op("Mul", [g.op("Sub", [g.const("f1", 1, np.float32), kept], "dropped"), low(g)], "bias")


def both(g: Builder, S: str, T: str) -> str:
    q, k = positions(g, S, T)
    pad = g.op("Cast", [g.op("Unsqueeze", ["attention_mask", g.ints(1, 2)], "pad.4d")], "pad.b", to=9)
    return where(g, g.op("And", [g.op("LessOrEqual", [k, q], "c"), pad], "seen"))


def future_only(g: Builder, S: str, T: str) -> str:
    """The opposite of causal: no kernel parameter says that."""
    q, k = positions(g, S, T)
    return where(g, g.op("GreaterOrEqual", [k, q], "seen"))


def distance(g: Builder, S: str, T: str) -> str:
    """ALiBi: a number for every distance."""
    q, k = positions(g, S, T)
    far = g.op("Cast", [g.op("Sub", [k, q], "d")], "d.f", to=1)
    return g.op("Mul", [far, g.const("slopes", [[[0.5]], [[0.25]]], np.float32)], "bias")


def row(g: Builder, S: str, T: str) -> str:
    """A number for each query, the same for all keys."""
    q, _ = positions(g, S, T)
    return g.op("Cast", [q], "bias", to=1)


SPELLINGS = {
    "row": row,
    "causal": causal,
    "trilu": causal_by_trilu,
    "window12": lambda g, S, T: window(g, S, T, 12),
    "window4096": lambda g, S, T: window(g, S, T, 4096),
    "padding": padding,
    "both": both,
    "future": future_only,
    "distance": distance,
}


@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize(
    ("mask", "causal", "window", "padded"),
    [
        ("causal", True, 0, False),
        ("trilu", True, 0, False),
        ("window12", True, 12, False),
        ("window4096", True, 4096, False),
        ("padding", False, 0, True),
        ("both", True, 0, True),
    ],
)
def test_recognised(tmp_path: Path, mask: str, causal: bool, window: int, padded: bool, past: bool) -> None:
    node = attend(tmp_path, mask, past=past)
    assert (node.attrs["causal"], node.attrs["window"], bool(node.inputs[8])) == (causal, window, padded)
    assert not node.inputs[9], "nothing is left to add"


@pytest.mark.parametrize("mask", ["future", "distance", "row"])
def test_anything_else_is_added_as_it_is(tmp_path: Path, mask: str) -> None:
    node = attend(tmp_path, mask, past=True)
    assert not node.attrs["causal"] and node.attrs["window"] == 0 and not node.inputs[8]
    assert node.inputs[9]
