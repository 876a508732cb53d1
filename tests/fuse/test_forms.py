"""Every spelling of one decoder fuses into the same operators."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from llmc.fuse import decoder_of, fuse
from llmc.graph import Graph
from llmc.importer import import_model
from llmc.quantize import quantize
from tests.graphs import FORMS, Decoder, Shape, encoder


def fused(path: Path) -> Graph:
    return fuse(quantize(import_model(path), None))


def big_operators(graph: Graph) -> Counter[str]:
    return Counter(n.op for n in graph.nodes if n.domain == "llmc")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layers", [1, 3])
def test_a_layer_is_a_handful_of_operators(tmp_path: Path, form: str, layers: int) -> None:
    graph = fused(getattr(Decoder(replace(Shape(), layers=layers)), form)(tmp_path / "m.onnx"))
    found = big_operators(graph)
    assert found["Norm"] == 2 * layers + 1
    assert found["Linear"] == 4 * layers + 1
    assert found["Attention"] == layers
    left = Counter(n.op for n in graph.nodes if n.domain == "")
    assert not set(left) & {"Softmax", "Add", "Mul", "Sigmoid", "ReduceMean", "Identity"}
    assert left["MatMul"] == (form == "plain"), "the one that makes the angles from the positions"


@pytest.mark.parametrize("form", FORMS)
def test_what_the_operators_say(tmp_path: Path, form: str) -> None:
    s = Shape()
    graph = fused(getattr(Decoder(s), form)(tmp_path / "m.onnx"))
    attention = [n for n in graph.nodes if n.op == "Attention"]
    for node in attention:
        a = node.attrs
        assert (a["n_heads"], a["n_kv_heads"], a["head_dim"]) == (s.heads, s.kv_heads, s.head_dim)
        assert a["causal"] and a["window"] == 0 and a["scale"] == pytest.approx(s.head_dim**-0.5)
        assert node.inputs[1] == node.inputs[2] == "", "q, k and v come from one linear"
        assert node.inputs[5] and node.inputs[6], "rope is inside"
        assert node.inputs[8] and not node.inputs[9], "the padding mask is a row of keys, not a matrix"
    linears = [n for n in graph.nodes if n.op == "Linear"]
    assert [n.attrs["activation"] for n in linears[:4]] == ["none", "none", "silu_mul", "none"]
    assert [bool(n.inputs[3]) for n in linears[:4]] == [False, True, False, True], "residuals are epilogues"


@pytest.mark.parametrize("form", FORMS)
def test_session_form_has_no_mask_and_no_past(tmp_path: Path, form: str) -> None:
    s = Shape()
    decoder = decoder_of(fused(getattr(Decoder(s), form)(tmp_path / "m.onnx")))
    assert decoder is not None
    for name, graph in decoder.functions.items():
        assert graph.inputs[:3] == ("input_ids", "position_ids", "kv_len")
        assert len(graph.inputs) == 3 + 2 * s.layers
        assert not any("past" in str(graph.types[i]) for n in graph.nodes for i in n.outputs if i), name
        assert big_operators(graph)["Attention"] == s.layers
    assert decoder.functions["step"].types["logits"].shape[1] != 1
    assert decoder.functions["step_last"].types["logits"].shape[1] == 1


def test_encoder(tmp_path: Path) -> None:
    graph = fused(encoder(tmp_path / "m.onnx"))
    assert big_operators(graph) == {"Embedding": 1, "Norm": 5, "Linear": 8, "Attention": 2, "Lengths": 1}
    assert decoder_of(graph) is None
    attention = next(n for n in graph.nodes if n.op == "Attention")
    assert not attention.attrs["causal"] and attention.inputs[8]
    assert Counter(n.attrs["activation"] for n in graph.nodes if n.op == "Linear") == {"none": 6, "gelu": 2}
