"""Masks are recognised by what they do: every spelling here, and none that merely looks like one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llmc.fuse import fuse
from llmc.graph import Graph, Node
from llmc.importer import import_model
from llmc.quantize import quantize
from tests.graphs import F32, I64, Builder

H, D = 2, 8


Scores = Callable[[str], str]  # from scores to masked ones


def fused(tmp_path: Path, mask: str, *, past: bool) -> Graph:
    """A one-layer graph whose mask is spelled as `mask`."""
    return fuse(quantize(import_model(attention_model(tmp_path, mask, past=past)), None))


def attend(tmp_path: Path, mask: str, *, past: bool) -> Node:
    """Its Attention node."""
    return next(n for n in fused(tmp_path, mask, past=past).nodes if n.op == "Attention")


def attention_model(tmp_path: Path, mask: str, *, past: bool) -> Path:
    """One attention layer over x [b, s, 16], 2 heads of 8, with a mask of SPELLINGS."""
    g = Builder()
    g.input("x", F32, ["b", "s", H * D])
    g.input("attention_mask", I64, ["b", "t"])
    if "prefix_len" in mask:
        g.input("prefix_len", I64, ["b"])
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
    masked = bias(scores) if callable(bias) else g.op("Add", [scores, bias], "masked")
    probs = g.op("Softmax", [masked], "probs", axis=-1)
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


SLOPES = np.array([0.5, 2**-1.5], np.float32)


def alibi(g: Builder, S: str, T: str) -> str:
    """A number for every distance, with no mask."""
    q, k = positions(g, S, T)
    return times_slopes(g, g.op("Sub", [k, q], "d"))


def times_slopes(g: Builder, distance: str) -> str:
    far = g.op("Cast", [distance], "d.f", to=1)
    return g.op("Mul", [far, g.const("slopes", SLOPES[:, None, None], np.float32)], "alibi")


def alibi_of_keys(g: Builder, S: str, T: str) -> Scores:
    """As in BLOOM and Falcon: slope * key, a number for each row away from slope * distance; scaled with the scores,
    and the mask is added after that."""
    q, k = positions(g, S, T)
    slopes = times_slopes(g, k)
    mask = where(g, g.op("LessOrEqual", [k, q], "seen"))

    def masked(scores: str) -> str:
        scaled = g.op("Mul", [g.op("Add", [slopes, scores], "added"), g.const("factor", 0.25, np.float32)], "scaled")
        return g.op("Add", [scaled, mask], "masked")

    return masked


def alibi_where(g: Builder, S: str, T: str) -> Scores:
    """As in MPT: slopes times 1-T .. 0, after the scale; then the lowest float over what is not seen."""
    q, k = positions(g, S, T)
    last = g.op("Sub", [T, g.const("one", 1, np.int64)], "last")
    slopes = times_slopes(g, g.op("Sub", [k, last], "from_last"))
    unseen = g.op("Greater", [k, q], "unseen")

    def masked(scores: str) -> str:
        scaled = g.op("Mul", [scores, g.const("factor", 0.25, np.float32)], "scaled")
        return g.op("Where", [unseen, low(g), g.op("Add", [scaled, slopes], "added")], "masked")

    return masked


def clipped(g: Builder, S: str, T: str) -> str:
    """Like ALiBi, but for distances over 100."""
    q, k = positions(g, S, T)
    near = g.op("Max", [g.op("Sub", [k, q], "d"), g.const("farthest", -100, np.int64)], "near")
    return times_slopes(g, near)


def sinks(g: Builder, S: str, T: str, size: int, first: int) -> str:
    """As in StreamingLLM: the nearest keys, and the first ones."""
    q, k = positions(g, S, T)
    near = g.op("Greater", [k, g.op("Sub", [q, g.const("window", size, np.int64)], "oldest")], "near")
    kept = g.op("Less", [k, g.const("sinks", first, np.int64)], "kept")
    return where(g, g.op("And", [g.op("LessOrEqual", [k, q], "c"), g.op("Or", [near, kept], "either")], "seen"))


def prefix(g: Builder, S: str, T: str, length: str) -> str:
    q, k = positions(g, S, T)
    known = g.op("Less", [k, length], "known")
    return where(g, g.op("Or", [g.op("LessOrEqual", [k, q], "c"), known], "seen"))


def prefix_of_sequence(g: Builder, S: str, T: str) -> str:
    return prefix(g, S, T, g.op("Unsqueeze", ["prefix_len", g.ints(1, 2, 3)], "prefix.4d"))


def same_document(g: Builder, S: str, T: str, both: bool) -> str:
    """attention_mask numbers the documents: 0 is padding if `both`."""
    q, k = positions(g, S, T)
    size = g.op("Shape", ["attention_mask"], "mask.shape")
    total = g.op("Gather", [size, g.ints(1)], "mask.keys")
    past = g.op("Sub", [total, g.op("Unsqueeze", [S, g.ints(0)], "S.1")], "mask.past")
    own = g.op("Slice", ["attention_mask", past, total, g.ints(1)], "own")
    row, column = (
        g.op("Unsqueeze", ["attention_mask", g.ints(1, 2)], "k.doc"),
        g.op("Unsqueeze", [own, g.ints(1, 3)], "q.doc"),
    )
    seen = g.op("And", [g.op("LessOrEqual", [k, q], "c"), g.op("Equal", [row, column], "same")], "seen.doc")
    if both:
        kept = g.op("Cast", [row], "kept", to=9)
        seen = g.op("And", [seen, kept], "seen")
    return where(g, seen)


def row(g: Builder, S: str, T: str) -> str:
    """A number for each query, the same for all keys."""
    q, _ = positions(g, S, T)
    return g.op("Cast", [q], "bias", to=1)


SPELLINGS: dict[str, Callable[[Builder, str, str], str | Scores]] = {
    "row": row,
    "causal": causal,
    "trilu": causal_by_trilu,
    "window12": lambda g, S, T: window(g, S, T, 12),
    "window4096": lambda g, S, T: window(g, S, T, 4096),
    "padding": padding,
    "both": both,
    "future": future_only,
    "alibi": alibi,
    "alibi_of_keys": alibi_of_keys,
    "alibi_where": alibi_where,
    "clipped": clipped,
    "sinks": lambda g, S, T: sinks(g, S, T, 12, 4),
    "sinks_few": lambda g, S, T: sinks(g, S, T, 7, 1),
    "sinks_many": lambda g, S, T: sinks(g, S, T, 30, 20),
    "prefix9": lambda g, S, T: prefix(g, S, T, g.const("prefix", 9, np.int64)),
    "prefix70": lambda g, S, T: prefix(g, S, T, g.const("prefix", 70, np.int64)),
    "prefix_len": prefix_of_sequence,
    "documents": lambda g, S, T: same_document(g, S, T, False),
    "documents_padded": lambda g, S, T: same_document(g, S, T, True),
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


@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize(("mask", "causal"), [("alibi", False), ("alibi_of_keys", True), ("alibi_where", True)])
def test_slopes_are_found(tmp_path: Path, mask: str, causal: bool, past: bool) -> None:
    graph = fused(tmp_path, mask, past=past)
    node = next(n for n in graph.nodes if n.op == "Attention")
    assert node.attrs["causal"] == causal and not any(node.inputs[8:10]), "nothing is left to add"
    scaled = 0.25 if mask == "alibi_of_keys" else 1
    np.testing.assert_allclose(graph.constants[node.inputs[13]], scaled * SLOPES, rtol=1e-6)
    assert not any(n.op in ("Range", "Mul", "Where") for n in graph.nodes)


@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize(
    ("mask", "window", "first"), [("sinks", 12, 4), ("sinks_few", 7, 1), ("sinks_many", 30, 20), ("window12", 12, 0)]
)
def test_sinks_are_counted(tmp_path: Path, mask: str, window: int, first: int, past: bool) -> None:
    node = attend(tmp_path, mask, past=past)
    assert (node.attrs["causal"], node.attrs["window"], node.attrs["sinks"]) == (True, window, first)
    assert not any(node.inputs[8:10])


@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize(("mask", "length"), [("prefix9", 9), ("prefix70", 70), ("prefix_len", None)])
def test_prefixes_are_measured(tmp_path: Path, mask: str, length: int | None, past: bool) -> None:
    graph = fused(tmp_path, mask, past=past)
    node = next(n for n in graph.nodes if n.op == "Attention")
    assert node.attrs["causal"] and not any(node.inputs[8:10]) and graph.types[node.inputs[14]].dtype == "int64"
    maker = next(n for n in graph.nodes if node.inputs[14] in n.outputs)
    assert maker.attrs.get("length") == length and (length is not None or "prefix_len" in graph.inputs)


@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize(("mask", "padded"), [("documents", False), ("documents_padded", True)])
def test_documents_are_told_apart(tmp_path: Path, mask: str, padded: bool, past: bool) -> None:
    node = attend(tmp_path, mask, past=past)
    assert (node.attrs["causal"], bool(node.inputs[8]), node.inputs[15]) == (True, padded, "attention_mask")
    assert not node.inputs[9]


@pytest.mark.parametrize("mask", ["future", "clipped", "row"])
def test_anything_else_is_added_as_it_is(tmp_path: Path, mask: str) -> None:
    node = attend(tmp_path, mask, past=True)
    assert not node.attrs["causal"] and node.attrs["window"] == 0 and not node.inputs[8]
    assert node.inputs[9]
