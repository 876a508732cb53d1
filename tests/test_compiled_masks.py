"""Masks that exporters write, from the ONNX file to the kernel: the same numbers as onnxruntime's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import llmc
from llmc.pipeline import compile
from tests.fuse.test_masks import attention_model
from tests.graphs import Builder, Decoder, Shape, decoder_feeds
from tests.test_pipeline import WIDEST, close, onnx_run

CALLS = ((1, 1, 90), (2, 70, 0), (2, 17, 65))


MASKS = ["alibi_where", "sinks", "prefix_len", "documents_padded"]
MORE = ["alibi", "alibi_of_keys", "sinks_many", "prefix9", "documents"]


@pytest.mark.parametrize("mask", [*MASKS, *(pytest.param(mask, marks=pytest.mark.slow) for mask in MORE)])
def test_equal_onnxruntime(tmp_path: Path, mask: str) -> None:
    path = attention_model(tmp_path, mask, past=True)
    compile(path, target=WIDEST).save(tmp_path / "m.llmc")
    model, rng = llmc.load(tmp_path / "m.llmc"), np.random.default_rng(0)
    for batch, seq, past in CALLS:
        keys = seq + past
        feeds = {"x": rng.standard_normal((batch, seq, 16), np.float32)}
        feeds["attention_mask"] = np.maximum(1, np.sort(rng.integers(0, 4, (batch, keys))))
        feeds["attention_mask"][:, : keys // 3] = 0 if past else 1  # padding, but before the first query's own key
        feeds["prefix_len"] = rng.integers(0, keys + 1, batch)
        feeds |= {f"past_{k}": rng.standard_normal((batch, 2, past, 8), np.float32) for k in "kv"}
        actual = model({i.name: feeds[i.name] for i in model.inputs})
        close(actual if isinstance(actual, np.ndarray) else actual["y"], onnx_run(path, feeds)["y"])


class Sloped(Decoder):
    """A decoder with ALiBi, and a prefix of 9 keys that all queries see."""

    def _mask(self, g: Builder) -> str:
        """float32 [batch, heads, seq, total]"""
        causal = super()._mask(g)
        distance = g.op("Cast", [g.op("Sub", ["k.row", "q.column"], "distance")], "distance.f", to=1)
        slopes = 2.0 ** -np.arange(1, 1 + self.shape.heads)
        bias = g.op("Mul", [distance, g.const("slopes", slopes[:, None, None], np.float32)], "alibi")
        known = g.op("Less", ["k.row", g.const("prefix", 9, np.int64)], "known")
        kept = g.op("And", [known, "pad.4d"], "kept")
        lowest = g.const("lowest", np.finfo(np.float32).min, np.float32)
        return g.op("Where", [g.op("Or", [causal, kept], "seen"), bias, lowest], "sloped")


def test_a_session_keeps_slopes_and_prefix(tmp_path: Path) -> None:
    """Prompts of more tokens than the prefix, in one piece and token by token."""
    shape = Shape(layers=1)
    path = Sloped(shape).std23(tmp_path / "m.onnx")
    compile(path, target=WIDEST).save(tmp_path / "m.llmc")
    model = llmc.load(tmp_path / "m.llmc")
    feeds = decoder_feeds(shape, 1, 80, 0)
    expected = onnx_run(path, feeds)["logits"]
    close(np.asarray(model(**feeds)["logits"]), expected)
    session = model.session()
    first = session.append(feeds["input_ids"][0, :70], all=True)
    close(np.asarray(first).reshape(1, 70, -1), expected[:, :70])
    for i in range(70, 80):
        close(np.asarray(session.append(feeds["input_ids"][0, i : i + 1])).reshape(-1), expected[0, i])
