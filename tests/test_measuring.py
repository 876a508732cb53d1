"""Sample inputs, comparison, perplexity and interleaved timing, without a model."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from llmc import bench, checker, samples
from llmc.engines import Engine, open_engine
from llmc.errors import CheckError, InputError, LlmcError, ModelError, OptionError
from llmc.package.manifest import ArraySpec, FunctionSpec
from llmc.perplexity import perplexity

RNG = np.random.default_rng(0)


# -- samples ------------------------------------------------------------------------------------------------------
def test_cases_differ_and_keep_to_the_ranges() -> None:
    cases = samples.cases({"batch": (1, None), "seq": (1, 20), "past": (0, None)}, {})
    assert [c["batch"] for c in cases] == [1, 2, 3]
    assert cases[0]["past"] == 0 and all(c["past"] > 0 for c in cases[1:])
    assert cases[2]["seq"] == 20
    assert all(len(set(c.values())) == 3 for c in cases[1:])


def test_given_dimensions_stay() -> None:
    assert samples.cases({"batch": (1, None)}, {"batch": 4}) == [{"batch": 4}]
    assert samples.cases({}, {}) == [{}]


def test_inputs_make_sense() -> None:
    specs = [
        ArraySpec("input_ids", "int64", ("batch", "seq")),
        ArraySpec("attention_mask", "int64", ("batch", "past + seq")),
        ArraySpec("position_ids", "int64", ("batch", "seq")),
        ArraySpec("past_key_values.0.key", "float32", ("batch", 3, "past", 8)),
    ]
    made = samples.make(specs, {"batch": 2, "seq": 5, "past": 7}, RNG, vocabulary=11)
    assert made["input_ids"].shape == (2, 5) and made["input_ids"].max() < 11
    assert made["attention_mask"].shape == (2, 12) and made["attention_mask"].all()
    assert made["position_ids"].tolist() == [[7, 8, 9, 10, 11]] * 2
    assert made["past_key_values.0.key"].shape == (2, 3, 7, 8)


def test_masks_of_encoders_have_padding_at_the_end() -> None:
    (mask,) = samples.make([ArraySpec("attention_mask", "int64", (4, 30))], {}, RNG, 10).values()
    assert mask[0].all() and not mask.all()
    assert (np.diff(mask, axis=1) <= 0).all() and mask[:, 0].all()


@pytest.mark.parametrize(("dim", "size"), [(3, 3), ("s", 4), ("s + 1", 5), ("2*s - p", 6), ("s*(p + 1)//2", 6)])
def test_dimensions_are_computed(dim: int | str, size: int) -> None:
    assert samples.size(dim, {"s": 4, "p": 2}) == size


def test_unknown_dimensions() -> None:
    with pytest.raises(OptionError, match="--dim q="):
        samples.size("q + 1", {})
    with pytest.raises(OptionError, match="cannot compute"):
        samples.size("__import__('os')", {})


# -- comparison ---------------------------------------------------------------------------------------------------
PLAIN = types.SimpleNamespace(decoder=None, quantization={})
DECODER = types.SimpleNamespace(decoder=types.SimpleNamespace(vocab_size=4), quantization={})


def test_equal_outputs() -> None:
    x = RNG.standard_normal((2, 3)).astype(np.float32)
    c = checker.compare("", "y", x, x, PLAIN)
    assert (c.max_error, c.relative, c.top1, c.kl) == (0, 0, None, None)
    assert c.cosine == pytest.approx(1)


def test_logits_get_agreement_and_divergence() -> None:
    p = np.log([[[0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]]])
    q = np.log([[[0.1, 0.7, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]]])
    c = checker.compare("", "logits", p, q + 5, DECODER)  # a shift of all logits changes nothing
    assert c.top1 == 0.5
    assert c.kl == pytest.approx(0.6 * math.log(7) / 2)


def test_padding_does_not_count() -> None:
    x = np.ones((2, 3, 4), np.float32)
    y, mask = x.copy(), np.array([[1, 1, 1], [1, 0, 0]])
    y[1, 1:] = 9
    assert checker.compare("", "y", x, y, PLAIN, mask).max_error == 0
    y[1, 0, 0] = 3
    assert checker.compare("", "y", x, y, PLAIN, mask).max_error == 2
    assert checker.compare("", "y", x, y, PLAIN).max_error == 8


def test_shapes_must_agree() -> None:
    with pytest.raises(CheckError, match="shape"):
        checker.compare("", "y", np.zeros(3), np.zeros(4), PLAIN)


@pytest.mark.parametrize(
    ("bound", "relative", "cosine", "passes"),
    [(None, 1e-3, 1, True), (None, 3e-3, 1, False), (0.99, 0.2, 0.995, True), (0.99, 0, 0.98, False),
     (0.9, 0.5, 0.95, True), (0.9, 0, 0.8, False), (None, math.nan, 1, False), (0.9, 0, math.nan, False)],
)  # fmt: skip
def test_tolerances(bound: float | None, relative: float, cosine: float, passes: bool) -> None:
    report = checker.CheckReport((checker.OutputCheck("s=1", "y", 1.0, relative, cosine),), {}, bound)
    assert report.as_json()["passed"] is passes
    if passes:
        report.demand()
    else:
        with pytest.raises(CheckError, match="output 'y' at s=1"):
            report.demand()


def test_caches_of_a_rounded_model_are_not_judged() -> None:
    bad = checker.OutputCheck("s=1", "present.0.key", 1.0, 1.0, 0.1)
    checker.CheckReport((bad,), {}, 0.99).demand()
    with pytest.raises(CheckError):
        checker.CheckReport((bad,), {}, None).demand()


@pytest.mark.parametrize(
    ("format", "weights", "bound"),
    [("none", [], None), ("none", ["4-bit, groups of 32"], 0.99), ("w8a8", ["8-bit, groups of K"], 0.99),
     ("w4a8-g32", ["4-bit, groups of 32", "8-bit, groups of 32"], 0.9)],
)  # fmt: skip
def test_own_rounding_may_err_more(format: str, weights: list[str], bound: float | None) -> None:
    manifest = types.SimpleNamespace(quantization={"format": format, "weights": weights}, decoder=None)
    assert checker.cosine_bound(manifest) == bound


def test_ids_stay_inside_the_smallest_table(tmp_path: Path) -> None:
    tables = [helper.make_tensor(n, TensorProto.FLOAT, (rows, 1), [0.0] * rows) for n, rows in (("a", 9), ("b", 2))]
    nodes = [helper.make_node("Gather", ["a", "ids"], ["x"]), helper.make_node("Gather", ["b", "types"], ["y"])]
    ins = [helper.make_tensor_value_info(n, TensorProto.INT64, ["s"]) for n in ("ids", "types")]
    outs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["s", 1]) for n in "xy"]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", ins, outs, tables)), tmp_path / "m.onnx")
    assert checker.smallest_table(tmp_path / "m.onnx") == 2


class Batchless(Engine):
    """Doubles x, one row at a time only, as some of onnxruntime's operators do."""

    inputs, outputs = ("x",), ("y",)

    def reset(self, batch: int = 1, room: int = 0) -> None: ...

    def step(self, ids: np.ndarray) -> np.ndarray:
        raise AssertionError("no language model")

    def call(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if len(inputs["x"]) != 1:
            raise ModelError("batch_size must be 1")
        return {"y": 2 * inputs["x"]}


def test_a_reference_that_refuses_batches_gets_single_rows() -> None:
    main = FunctionSpec((ArraySpec("x", "float32", ("batch", "n")),), (ArraySpec("y", "float32", ("batch", "n")),), ())
    case, inputs, expected = checker._reference(Batchless(), main, {"batch": 3, "n": 5}, RNG, 1)
    assert case == {"batch": 1, "n": 5}
    np.testing.assert_array_equal(expected["y"], 2 * inputs["x"])
    other = FunctionSpec((ArraySpec("x", "float32", ("rows", "n")),), main.outputs, ())
    with pytest.raises(ModelError, match="must be 1"):
        checker._reference(Batchless(), other, {"rows": 3, "n": 5}, RNG, 1)


# -- perplexity ---------------------------------------------------------------------------------------------------
class Bigram(Engine):
    """Gives the token after t the probability `p`, the others the rest evenly."""

    def __init__(self, p: float, vocabulary: int) -> None:
        self.p, self.vocabulary, self.length = p, vocabulary, 0

    def reset(self, batch: int = 1, room: int = 0) -> None:
        self.length = 0

    def step(self, ids: np.ndarray) -> np.ndarray:
        assert self.length == 0, "every chunk starts anew"
        self.length += ids.shape[1]
        odds = np.full((*ids.shape, self.vocabulary), (1 - self.p) / (self.vocabulary - 1))
        np.put_along_axis(odds, (ids[..., None] + 1) % self.vocabulary, self.p, axis=-1)
        return (np.log(odds) + 3).astype(np.float32)


def test_perplexity_of_a_known_model() -> None:
    ids = np.arange(70) % 10
    assert perplexity(Bigram(0.25, 10), ids, chunk=20) == pytest.approx(4, rel=1e-6)
    ids[15] = 0  # in the second half of the first chunk: one surprise as target, one as source
    wrong = 0.75 / 9
    scored = 3 * 9
    expected = math.exp(((scored - 2) * -math.log(0.25) + 2 * -math.log(wrong)) / scored)
    assert perplexity(Bigram(0.25, 10), ids, chunk=20) == pytest.approx(expected, rel=1e-6)


def test_perplexity_needs_a_chunk() -> None:
    with pytest.raises(InputError, match="at least 20"):
        perplexity(Bigram(0.5, 4), np.zeros(19, np.int64), chunk=20)


# -- timing -------------------------------------------------------------------------------------------------------
def test_unknown_engines_are_refused() -> None:
    with pytest.raises(OptionError, match="no engine 'x'"):
        open_engine("x", "y", 1)


def test_a_contestant_that_fails_is_alone(tmp_path: Path) -> None:
    absent = bench.Contestant("onnxruntime", tmp_path / "absent.onnx")
    results = bench.compare([absent], bench.decoder_tasks([4], 2), threads=1, repeat=1, vocabulary=9)
    assert isinstance(results["onnxruntime"], LlmcError)
    assert "absent.onnx" in bench.as_json(results["onnxruntime"])["error"]


def test_rounds_are_timed(tmp_path: Path) -> None:
    """onnxruntime on a real, tiny model, in a process of its own."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 8]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    task = bench.Task("rows=4", inputs={"x": np.ones((4, 8), np.float32)})
    contestant = bench.Contestant("onnxruntime", tmp_path / "m.onnx", label="peer")
    (result,) = bench.compare([contestant], [task], threads=1, repeat=3, vocabulary=1).values()
    assert isinstance(result, bench.Result)
    spread = result.figures["rows=4"]
    assert 0 < spread.low <= spread.median <= spread.high < 1000
    assert bench.as_json(result)["call_ms"] == {"rows=4": spread.median}


def test_json_of_a_decoder() -> None:
    figures = {"prefill 128": bench.Spread(2, 1, 3), "decode 64": bench.Spread(5, 4, 6)}
    data = bench.as_json(bench.Result(figures, load_s=0.1, peak_rss_mb=9))
    assert data["prefill"] == {"128": 2} and data["decode"] == 5
    assert data["spread"] == {"prefill": {"128": [1, 3]}, "decode": [4, 6]}
