"""ONNX's own conformance cases, for types alone: what imports has the types that the case's expected outputs have.

Values are compared in tests/ops; here a rule may be missing, but the importer may neither crash nor be wrong.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from llmc.errors import LlmcError
from llmc.graph import Dim, Graph
from llmc.importer import import_model
from llmc.tvm_shim import Analyzer, substitute, tirx


@cache
def cases() -> list[Any]:
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(collect_testcases(None))


def symbolic(case: Any) -> onnx.ModelProto:
    """The case's model, every input dimension of size n > 1 named "dn"."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    for info in model.graph.input:
        for dim in info.type.tensor_type.shape.dim:
            if dim.dim_value > 1:
                dim.dim_param = f"d{dim.dim_value}"
    return model


def size(dim: Dim) -> int | None:
    """A dimension over symbols "dn", as a number; None where it has symbols that are measured at run time."""
    if isinstance(dim, int):
        return dim
    symbols = tirx.analysis.undefined_vars(dim)
    if not all(re.fullmatch(r"d\d+", v.name) for v in symbols):
        return None
    return int(Analyzer().simplify(substitute(dim, {v: int(v.name[1:]) for v in symbols})))


def wrong(case: Any, graph: Graph) -> Iterator[str]:
    for name, want in zip(graph.outputs, case.data_sets[0][1], strict=True):
        if not isinstance(want, np.ndarray):
            continue
        type_ = graph.types[name]
        dtype = want.dtype.name if want.dtype.kind not in "OUS" else "str"
        sizes = [size(d) for d in type_.shape]
        fits = len(sizes) == want.ndim and all(d in (None, n) for d, n in zip(sizes, want.shape, strict=True))
        if type_.dtype != dtype or not fits:
            yield f"{case.name}: {name} is {type_}, but should be {dtype}{list(want.shape)}"


@pytest.mark.parametrize(("form", "least"), [("static", 1795), ("symbolic", 1525)])
def test_types(tmp_path: Path, form: str, least: int) -> None:
    mistakes: list[str] = []
    imported = 0
    path = tmp_path / "model.onnx"
    for case in cases():
        model = symbolic(case) if form == "symbolic" else case.model
        path.write_bytes(model.SerializeToString())
        try:
            graph = import_model(path)
        except LlmcError:
            continue
        imported += 1
        mistakes += wrong(case, graph)
    assert not mistakes, "\n".join(mistakes)
    assert imported >= least
