"""Decoders for GPUs choose their tokens there: they have a function `sample`."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmc.fuse import decoder_of, fuse, sampler_of
from llmc.importer import import_model
from llmc.package.manifest import Manifest
from llmc.pipeline import compile
from llmc.schedules.sampling.sample import SampleWorkload
from llmc.select import select
from llmc.targets.cuda import TARGETS
from tests.gpu.tools import needs_compiler
from tests.graphs import Decoder, Shape


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Decoder(Shape()).std23(tmp_path_factory.mktemp("sampler") / "m.onnx")


def test_a_graph_of_one_kernel(model: Path) -> None:
    decoder = decoder_of(fuse(import_model(model)))
    assert decoder is not None
    plan = select({"sample": sampler_of(decoder.vocab_size)}, TARGETS["cuda-sm80"])
    ((kernel,),) = plan.kernels.values()
    assert kernel.workload == SampleWorkload(decoder.vocab_size)


@needs_compiler
@pytest.mark.slow
def test_in_artifacts_for_gpus_alone(model: Path, tmp_path: Path) -> None:
    def manifest(target: str) -> Manifest:
        return compile(model, target=target).save(tmp_path / "m.llmc")

    function = manifest("cuda-sm80").functions["sample"]
    names = ["logits", "temperature", "top_k", "top_p", "uniform"]
    assert [spec.name for spec in function.inputs] == names
    assert {spec.shape for spec in function.inputs[1:]} == {("rows",)}
    assert "sample" not in manifest("x86-avx2").functions
