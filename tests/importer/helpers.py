"""Small ONNX models for the importer's tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL

Edge = tuple[str, int, Sequence[int | str | None] | None]  # name, element type, shape


def model(
    nodes: Sequence[NodeProto],
    inputs: Sequence[Edge],
    outputs: Sequence[Edge | str],
    constants: Mapping[str, Any] | None = None,
    *,
    opset: int = 17,
    domains: Mapping[str, int] | None = None,
    functions: Sequence[FunctionProto] = (),
) -> ModelProto:
    """A model; outputs given by name alone have no declared type."""
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info(*i) for i in inputs],
        [onnx.ValueInfoProto(name=o) if isinstance(o, str) else helper.make_tensor_value_info(*o) for o in outputs],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in (constants or {}).items()],
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, v) for d, v in (domains or {}).items())]
    return helper.make_model(graph, opset_imports=opsets, functions=list(functions), ir_version=10)


def saved(folder: Path, proto: ModelProto, **options: Any) -> Path:
    """The model as a file in `folder`."""
    path = folder / "model.onnx"
    onnx.save_model(proto, path, **options)
    return path


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> NodeProto:
    """A node with blank-separated input and output names ("_" for an absent one), named after its first output."""
    names = ["" if i == "_" else i for i in inputs.split()]
    outs = ["" if o == "_" else o for o in outputs.split()]
    return helper.make_node(op, names, outs, name=f"/{outs[0]}", **attributes)
