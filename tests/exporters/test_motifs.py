"""What exporters write becomes the same operators whoever wrote it, and computes what onnxruntime computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from benchmarks.conformance import build_functions
from llmc.fuse import decoder_of, fuse
from llmc.graph import Graph
from llmc.importer import import_model
from llmc.options import resolve_target
from llmc.quantize import quantize
from tests.exporters import dynamo, keras, quantisers, torchscript

MOTIFS = {m.name: m for m in (*torchscript.MOTIFS, *dynamo.MOTIFS, *keras.MOTIFS, *quantisers.MOTIFS)}
RUNS = 2
Function = Callable[..., list[np.ndarray]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exported")
    return {name: motif.write(folder / f"{name}.onnx") for name, motif in MOTIFS.items()}


@pytest.fixture(scope="module")
def graphs(files: dict[str, Path]) -> dict[str, Graph]:
    return {name: fuse(quantize(import_model(path), None)) for name, path in files.items()}


@pytest.fixture(scope="module")
def function(graphs: dict[str, Graph]) -> Callable[[str], Function]:
    """A motif as a function. All that are not slow are one library: most of building is the same for all."""
    built: dict[str, Function] = {}

    def of(name: str) -> Function:
        if name not in built:
            group = [n for n in graphs if MOTIFS[n].slow == MOTIFS[name].slow]
            calls = build_functions([graphs[n] for n in group], resolve_target("native"))
            built.update(zip(group, calls, strict=True))
        return built[name]

    return of


@pytest.mark.parametrize("name", MOTIFS)
def test_fuses_as_from_any_exporter(graphs: dict[str, Graph], name: str) -> None:
    motif, nodes = MOTIFS[name], graphs[name].nodes
    fused = Counter(n.op for n in nodes if n.domain == "llmc")
    assert {op: fused[op] for op in motif.operators} == dict(motif.operators)
    left = {n.op for n in nodes if n.domain != "llmc"}
    assert not left.intersection(motif.gone)


@pytest.mark.parametrize("name", [name for name in MOTIFS if "decoder" in name])
def test_decoders_get_sessions(graphs: dict[str, Graph], name: str) -> None:
    """Their masks are known for what they are, and their caches are updated in place."""
    (attention,) = [n for n in graphs[name].nodes if n.op == "Attention"]
    assert attention.attrs["causal"] and attention.inputs[8] and not attention.inputs[9]
    decoder = decoder_of(graphs[name])
    assert decoder is not None and len(decoder.caches) == 1


@pytest.mark.parametrize("run", range(RUNS))
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * m.slow) for n, m in MOTIFS.items()])
def test_equals_onnxruntime(
    files: dict[str, Path], graphs: dict[str, Graph], function: Callable[[str], Function], name: str, run: int
) -> None:
    motif = MOTIFS[name]
    feeds = motif.feeds(run)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # they round what is float
    session = onnxruntime.InferenceSession(str(files[name]), options, providers=["CPUExecutionProvider"])
    expected = session.run(list(graphs[name].outputs), feeds)
    got = function(name)(*(feeds[i] for i in graphs[name].inputs))
    for output, a, b in zip(graphs[name].outputs, expected, got, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, output
        if motif.cosine:
            a, b = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
            assert a @ b >= motif.cosine * np.linalg.norm(a) * np.linalg.norm(b), output
        else:
            np.testing.assert_allclose(
                b, a, motif.tolerance, motif.tolerance * np.abs(a).max(initial=0), err_msg=output
            )
