"""The format f16 through the whole corridor, against onnxruntime on the same rounded weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

import llmc
from llmc.errors import OptionError
from llmc.importer import import_model
from llmc.pipeline import compile
from llmc.quantize import quantize
from llmc.quantize.formats import resolve_format
from llmc.schedules.gemm.cuda_f16 import MMA_F16
from llmc.schedules.gemm.f16 import F16
from llmc.select import select
from llmc.targets.cuda import SM80, SM90
from llmc.targets.x86 import AMX, AVX2, AVX512
from tests.graphs import Decoder, Shape, decoder_feeds
from tests.halves import half
from tests.schedules.kernels import X86

SHAPE = Shape(hidden=96, inner=200)


def with_rounded_weights(path: Path, out: Path) -> Path:
    """The matrices in float16, and the rest, which the format leaves alone, as it is."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        value = onnx.numpy_helper.to_array(tensor)
        if value.ndim == 2 and value.dtype == np.float32 and value.size >= 4096:
            tensor.CopyFrom(onnx.numpy_helper.from_array(half(value).astype(np.float32), tensor.name))
    onnx.save(model, out)
    return out


@pytest.mark.parametrize("target", X86[1:])
def test_decoder_with_tied_embedding(tmp_path: Path, target: object) -> None:
    """One copy of the table, in float16, serves the embedding and the output layer."""
    name = getattr(target, "name")  # noqa: B009
    path = Decoder(SHAPE).plain(tmp_path / "plain.onnx")
    compile(path, target=name, quantize="f16").save(tmp_path / "m.llmc")
    model = llmc.load(tmp_path / "m.llmc")
    assert {"f16", "embedding_dense"} <= {k.template for k in model.manifest.kernels}
    assert model.manifest.quantization == {"format": "f16", "weights": ["float16"], "quantized_matrices": 9}
    tables = [(p.tensor, p.dtype) for name, p in model.manifest.params.items() if name.startswith("embed.weight:")]
    assert len({*tables}) == 1 and tables[0][1] == "float16"
    ids = np.random.default_rng(5).integers(0, SHAPE.vocab, 40)
    feeds = decoder_feeds(SHAPE, 1, len(ids), 0) | {"input_ids": ids[None]}
    session = onnxruntime.InferenceSession(with_rounded_weights(path, tmp_path / "rounded.onnx"))
    expected = session.run(["logits"], {i.name: feeds[i.name] for i in session.get_inputs()})[0]
    logits = model.session().append(ids, all=True)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_what_multiplies_on_each_target(tmp_path: Path) -> None:
    graph = quantize(import_model(Decoder(SHAPE).plain(tmp_path / "plain.onnx")), resolve_format("f16"))
    for targets, template, x in (((AVX2, AVX512, AMX), F16, "a32"), ((SM80, SM90), MMA_F16, "f16")):
        for target in targets:
            kernels = select({"main": graph}, target).calls()
            linears = [k for k in kernels if k.template is template]
            assert linears and all(k.workload.activations == x for k in linears)  # type: ignore[attr-defined]


def test_its_output_layer_has_no_bits_to_choose() -> None:
    with pytest.raises(OptionError, match="no weight format 'f16-head4'"):
        resolve_format("f16-head4")
