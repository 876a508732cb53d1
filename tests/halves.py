"""Models in float16, as exporters make them for GPUs: weights, activations, past, present and logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import GraphProto, TensorProto, helper, numpy_helper

F16, F32 = TensorProto.FLOAT16, TensorProto.FLOAT


def half(value: np.ndarray) -> np.ndarray:
    """float16, with what is beyond it as its greatest value: masks are."""
    return np.clip(value, -65504, 65504).astype(np.float16)


def to_half(path: Path, out: Path, *, norms_in_float32: bool = False, data: str | None = None) -> Path:
    """The float32 model at `path`, all of it in float16, at `out`; large models with their weights in a file `data`.

    `norms_in_float32`: between Casts the primitive norms, from Pow to the last Mul but one, stay float32, as in
    torch.onnx's exports of models that were loaded in float16.
    """
    model = onnx.load(path)
    graph = model.graph
    kept = _norm_values(graph) if norms_in_float32 else set()
    for i, tensor in enumerate(graph.initializer):
        if tensor.data_type == F32 and tensor.name not in kept:
            graph.initializer[i].CopyFrom(numpy_helper.from_array(half(numpy_helper.to_array(tensor)), tensor.name))
    for info in (*graph.input, *graph.output):
        if info.type.tensor_type.elem_type == F32:
            info.type.tensor_type.elem_type = F16
    del graph.value_info[:]
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == F32:
                attribute.i = F16
            if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == F32:
                attribute.t.CopyFrom(numpy_helper.from_array(half(numpy_helper.to_array(attribute.t))))
    if kept:
        _cast_around(graph, kept)
    if data:
        onnx.save(model, out, save_as_external_data=True, location=data)
    else:
        onnx.save(model, out)
    return out


def _norm_values(graph: GraphProto) -> set[str]:
    """What primitive norms make and read beside x: from Pow to the product of x with the inverse root."""
    found: set[str] = set()
    for node in graph.node:
        starts = node.op_type == "Pow"
        goes_on = node.op_type in ("ReduceMean", "Add", "Sqrt", "Div", "Mul") and found & {*node.output, *node.input}
        last = any(n.op_type == "Mul" and {*n.output} & found for n in graph.node if {*n.output} & {*node.input})
        if starts or (goes_on and not last):
            found |= {*node.output, *(i for i in node.input if i in {t.name for t in graph.initializer})}
    return found


def _cast_around(graph: GraphProto, kept: set[str]) -> None:
    nodes, made = list(graph.node), 0
    del graph.node[:]
    for node in nodes:
        inside = bool({*node.output} & kept)
        for i, name in enumerate(node.input):
            if (name in kept) != inside and name:
                made += 1
                cast = f"{name}.cast{made}"
                graph.node.append(helper.make_node("Cast", [name], [cast], to=F32 if inside else F16))
                node.input[i] = cast
        graph.node.append(node)
