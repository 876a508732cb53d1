"""An imported graph, run node by node through its rules, computes what onnxruntime computes from the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from llmc.fallback import legalize_and_schedule
from llmc.graph import Graph
from llmc.importer import import_model
from llmc.ops import RULES
from llmc.ops.context import Emitter
from llmc.targets.x86 import AVX2
from llmc.tvm_shim import TvmTarget, relax, tvm
from tests.importer.helpers import FLOAT, model, node, saved
from tests.importer.test_import import decoder


def compiled(graph: Graph) -> relax.VirtualMachine:
    bb = relax.BlockBuilder()
    exprs = {
        name: relax.Var(name, relax.TensorType(list(graph.types[name].shape), graph.types[name].dtype))
        for name in graph.inputs
    }
    emitter = Emitter.bind_graph(graph, exprs, RULES, bb)
    with bb.function("main", list(exprs.values())):
        with bb.dataflow():
            for n in graph.nodes:
                emitter.run(n)
            result = bb.emit_output(relax.Tuple([emitter.expr(o) for o in graph.outputs]))
        bb.emit_func_output(result)
    built = tvm.compile(legalize_and_schedule(bb.finalize(), AVX2), target=TvmTarget(AVX2.tvm()))
    return relax.VirtualMachine(built, tvm.cpu())


def check(path: Path, feeds: list[dict[str, np.ndarray]]) -> None:
    graph = import_model(path)
    vm = compiled(graph)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for feed in feeds:
        want = session.run(None, feed)
        got = [r.numpy() for r in vm["main"](*(tvm.runtime.tensor(feed[i]) for i in graph.inputs))]
        for g, w, name in zip(got, want, graph.outputs, strict=True):
            assert g.dtype == w.dtype == np.dtype(graph.types[name].dtype)
            np.testing.assert_allclose(g, w, rtol=1e-6)


@pytest.mark.parametrize("declared", [True, False])
def test_decoder(tmp_path: Path, rng: np.random.Generator, declared: bool) -> None:
    feeds = [
        {
            "ids": rng.integers(0, 10, (batch, seq)),
            "mask": rng.integers(0, 2, (batch, past + seq)),
            "past_k": rng.standard_normal((batch, 2, past, 4)).astype(np.float32),
        }
        for batch, seq, past in [(1, 1, 0), (2, 5, 0), (3, 1, 7), (1, 4, 3)]
    ]
    check(saved(tmp_path, decoder(["batch", 2, "total", 4] if declared else None)), feeds)


def test_shape_values_become_tensors(tmp_path: Path) -> None:
    nodes = [
        node("Shape", "x", "vector"),
        node("Size", "x", "scalar"),
        node("Cast", "scalar", "narrow", to=6),
        node("Reshape", "vector square", "table"),
        node("Cast", "vector", "floats", to=FLOAT),
        node("Mul", "x constant", "scaled"),
    ]
    outputs = ["vector", "scalar", "narrow", "table", "floats", "scaled", "constant"]
    constants = {"square": np.array([2, -1]), "constant": np.array([0.5, 2.0], np.float32)}
    proto = model(nodes, [("x", FLOAT, ["n", "m", 1, 2])], outputs, constants)
    feeds = [{"x": np.ones((n, m, 1, 2), np.float32)} for n, m in [(1, 1), (3, 5)]]
    check(saved(tmp_path, proto), feeds)
