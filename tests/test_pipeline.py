"""The whole corridor on small models: every form, both vector widths, against onnxruntime."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

import llmc
from llmc.importer import import_model
from llmc.pipeline import StageEvent, compile
from llmc.quantize import quantize
from llmc.quantize.formats import resolve_format
from llmc.runtime import Model
from llmc.schedules.formats import QuantizedWeight
from llmc.targets.detect import machine
from llmc.targets.x86 import TARGETS
from tests.fuse.test_masks import attention_model
from tests.graphs import FORMS, Decoder, Shape, decoder_feeds, encoder

SHAPE = Shape()


def runs(target: str) -> bool:
    return set(TARGETS[target].requires) <= set(machine().flags)


def needs(target: str) -> None:
    missing = sorted(set(TARGETS[target].requires) - set(machine().flags))
    if missing:
        pytest.skip(f"this machine lacks {', '.join(missing)}")


WIDEST = "x86-avx512" if runs("x86-avx512") else "x86-avx2"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    decoder = Decoder(SHAPE)
    return {form: getattr(decoder, form)(folder / f"{form}.onnx") for form in FORMS} | {
        "encoder": encoder(folder / "encoder.onnx")
    }


@pytest.fixture(scope="module")
def compiled(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """Every form for the widest target of this machine."""
    folder = tmp_path_factory.mktemp("artifacts")
    for form, path in models.items():
        compile(path, target=WIDEST).save(folder / f"{form}.llmc")
    return {form: llmc.load(folder / f"{form}.llmc") for form in models}


def onnx_run(path: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(path)
    wanted = {i.name for i in session.get_inputs()}
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, {k: v for k, v in feeds.items() if k in wanted}), strict=True))


def close(actual: np.ndarray, expected: np.ndarray, tolerance: float = 2e-5) -> None:
    assert actual.shape == expected.shape and expected.size
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * max(1.0, float(np.abs(expected).max())))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("batch", "seq", "past"), [(1, 1, 0), (1, 7, 0), (1, 70, 0), (2, 5, 0), (1, 1, 64), (2, 1, 9)])
def test_functional_form(
    compiled: dict[str, Model], models: dict[str, Path], form: str, batch: int, seq: int, past: int
) -> None:
    feeds = decoder_feeds(SHAPE, batch, seq, past, seed=seq)
    model = compiled[form]
    outputs = model({i.name: feeds[i.name] for i in model.inputs})
    for name, expected in onnx_run(models[form], feeds).items():
        close(outputs[name], expected)


@pytest.mark.parametrize("form", ["plain", "std23"])
def test_padding_is_masked(compiled: dict[str, Model], models: dict[str, Path], form: str) -> None:
    feeds = decoder_feeds(SHAPE, 2, 6, 0)
    feeds["attention_mask"][0, :2] = 0
    model = compiled[form]
    logits = model({i.name: feeds[i.name] for i in model.inputs})["logits"]
    expected = onnx_run(models[form], feeds)["logits"]
    close(logits[0, 2:], expected[0, 2:])
    close(logits[1], expected[1])


def test_all_forms_call_the_same_kernels(compiled: dict[str, Model]) -> None:
    """Per function that a session runs: same templates, workloads and number of calls."""

    def layer_kernels(model: Model) -> dict[str, int]:
        kernels = [k for k in model.manifest.kernels if k.template not in ("embedding_dense",)]
        return {f"{k.template} {sorted(k.workload.items())}": k.calls for k in kernels}

    plain, std23, genai = (layer_kernels(compiled[form]) for form in FORMS)
    assert plain == std23 == genai


@pytest.mark.parametrize("form", FORMS)
def test_session_equals_the_functional_form(compiled: dict[str, Model], models: dict[str, Path], form: str) -> None:
    ids = np.random.default_rng(3).integers(0, SHAPE.vocab, 75)
    feeds = decoder_feeds(SHAPE, 1, len(ids), 0)
    feeds["input_ids"] = ids[None]
    expected = onnx_run(models[form], feeds)["logits"]
    session = compiled[form].session()
    pieces = [session.append(ids[a:b], all=True) for a, b in ((0, 1), (1, 5), (5, 70), (70, 71), (71, 75))]
    close(np.concatenate(pieces, axis=1), expected)
    session.reset()
    close(session.append(ids), expected[:, -1])


@pytest.mark.parametrize("form", FORMS)
def test_one_token_at_a_time(compiled: dict[str, Model], form: str) -> None:
    """`decode` (one token of one sequence, memory owned by the session) says what `step` says of a whole prompt."""
    ids = np.random.default_rng(6).integers(0, SHAPE.vocab, 66)
    one, whole = compiled[form].session(), compiled[form].session()
    singly = [one.append([token])[0] for token in ids]
    close(np.stack(singly), whole.append(ids, all=True)[0])


def test_encoder(compiled: dict[str, Model], models: dict[str, Path]) -> None:
    rng = np.random.default_rng(0)
    for batch, seq in ((1, 1), (2, 17), (3, 65)):
        feeds = {"input_ids": rng.integers(0, 97, (batch, seq)), "attention_mask": np.ones((batch, seq), np.int64)}
        feeds["attention_mask"][0, (seq + 1) // 2 :] = 0
        actual = compiled["encoder"](feeds)
        hidden = actual["hidden"] if isinstance(actual, dict) else actual
        expected = onnx_run(models["encoder"], feeds)["hidden"]
        close(hidden[0, : (seq + 1) // 2], expected[0, : (seq + 1) // 2])
        if batch > 1:
            close(hidden[1:], expected[1:])


@pytest.mark.alone
def test_idle_threads_sleep(compiled: dict[str, Model]) -> None:
    """TVM's own pool keeps a core busy for 80 ms after every call."""
    script = f"""
        import time
        import numpy as np
        import llmc
        ids = np.ones((4, 64), np.int64)
        model = llmc.load({str(compiled["encoder"].artifact.path)!r})
        model(input_ids=ids, attention_mask=ids)
        before = time.process_time()
        time.sleep(0.3)
        print(time.process_time() - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    own = {name: value for name, value in os.environ.items() if not name.startswith("TVM_")}  # the tests' pool is tame
    done = subprocess.run(command, env=own, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.03


@pytest.mark.parametrize("mask", ["window12", "clipped", "row"])
def test_masks_of_all_kinds(tmp_path: Path, mask: str) -> None:
    """A window, a bias for every distance, and one for every query, through the kernels."""
    path = attention_model(tmp_path, mask, past=True)
    compile(path, target=WIDEST).save(tmp_path / "m.llmc")
    model, rng = llmc.load(tmp_path / "m.llmc"), np.random.default_rng(0)
    for batch, seq, past in ((1, 1, 30), (2, 40, 0), (1, 17, 5)):
        feeds = {"x": rng.standard_normal((batch, seq, 16), np.float32)}
        feeds["attention_mask"] = np.ones((batch, seq + past), np.int64)
        feeds |= {f"past_{k}": rng.standard_normal((batch, 2, past, 8), np.float32) for k in "kv"}
        actual = model({i.name: feeds[i.name] for i in model.inputs})
        close(actual if isinstance(actual, np.ndarray) else actual["y"], onnx_run(path, feeds)["y"])


def test_avx2_equals_the_widest(compiled: dict[str, Model], models: dict[str, Path], tmp_path: Path) -> None:
    needs("x86-avx2")
    compile(models["std23"], target="x86-avx2").save(tmp_path / "m.llmc")
    ids = np.random.default_rng(4).integers(0, SHAPE.vocab, 70)
    narrow, wide = llmc.load(tmp_path / "m.llmc").session(), compiled["std23"].session()
    close(narrow.append(ids, all=True), wide.append(ids, all=True))
    close(narrow.append([5]), wide.append([5]))


def with_rounded_weights(path: Path, format: str, out: Path) -> Path:
    """The float model with every weight that `format` rounds replaced by what its codes stand for."""
    model = onnx.load(path)
    rounded = quantize(import_model(path), resolve_format(format)).constants
    values = {k: v.dequantize() for k, v in rounded.items() if isinstance(v, QuantizedWeight)}
    for tensor in model.graph.initializer:
        for name, turned in ((tensor.name, False), (f"{tensor.name}.T", True)):
            if name in values:
                value = values.pop(name).T if turned else values.pop(name)
                tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(value), tensor.name))
    assert not values, "every rounded weight stands for one of the model's"
    onnx.save(model, out)
    return out


@pytest.mark.parametrize("target", ["x86-avx512", "x86-avx2"])
@pytest.mark.parametrize(
    "format",
    ["w8a8", "w4a8-g32", "w4a16-g32", *(pytest.param(f, marks=pytest.mark.slow) for f in ("w3a8-asym", "w4a8-row"))],
)
def test_quantised_decoder_computes_with_its_codes(
    models: dict[str, Path], tmp_path: Path, target: str, format: str
) -> None:
    """Against onnxruntime on the same rounded weights in float32: what is left is the rounding of activations."""
    needs(target)
    compile(models["plain"], target=target, quantize=format).save(tmp_path / "m.llmc")
    ids = np.random.default_rng(5).integers(0, SHAPE.vocab, 40)
    feeds = decoder_feeds(SHAPE, 1, len(ids), 0) | {"input_ids": ids[None]}
    expected = onnx_run(with_rounded_weights(models["plain"], format, tmp_path / "rounded.onnx"), feeds)["logits"]
    logits = llmc.load(tmp_path / "m.llmc").session().append(ids, all=True)
    if format.startswith("w4a16"):  # its output layer is a8 nowhere: only the order of additions differs
        close(logits, expected)
        return
    cosine = (logits * expected).sum(-1) / np.linalg.norm(logits, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert cosine.min() > 0.999


def test_a_second_compilation_says_its_stages_and_makes_the_same_bytes(
    compiled: dict[str, Model], models: dict[str, Path], tmp_path: Path
) -> None:
    events: list[StageEvent] = []
    again = compile(models["encoder"], target=WIDEST, dump_ir=tmp_path / "ir", progress=events.append)
    names = [e.name for e in events]
    assert names == ["import", "quantize", "fuse", "kv-cache", "select", "tune", "lower", "build"]
    dumped = sorted(p.name for p in (tmp_path / "ir").iterdir())
    assert dumped == [f"{i}-{name}.txt" for i, name in enumerate(names)]
    assert "llmc.Attention" in (tmp_path / "ir" / "2-fuse.txt").read_text()
    again.save(tmp_path / "again.llmc")
    assert (tmp_path / "again.llmc").read_bytes() == compiled["encoder"].artifact.path.read_bytes()
