"""Constant folding: a node whose inputs are all small constants is evaluated by ONNX's reference implementation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from onnx import NodeProto, ValueInfoProto, defs, helper
from onnx.reference import ReferenceEvaluator

from llmc.graph import TensorType

MAX_BYTES = 2**20

# Their output is no larger than their input, though its shape depends on data.
_BOUNDED = {"NonZero", "Compress", "Unique"}

# A weight that arrives quantised must stay so: what reads it is decided later.
_KEPT = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}


def may_fold(node: NodeProto, inputs: Sequence[np.ndarray | None], types: Sequence[TensorType] | None) -> bool:
    """Are constants `inputs` and outputs of `types` small enough? None stands for types that are not known."""
    if node.op_type in _KEPT or sum(x.nbytes for x in inputs if x is not None) > MAX_BYTES:
        return False
    dims = [d for t in types or () for d in t.shape]
    if types is None or not all(isinstance(d, int) for d in dims):
        return node.op_type in _BOUNDED
    return all(math.prod(t.shape) * 8 <= MAX_BYTES for t in types)


def fold(node: NodeProto, version: int, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray] | None:
    """The outputs that a node of ai.onnx names, as constants; None where the reference cannot say.

    `inputs` are all known constants, None where an optional one is absent.
    """
    try:
        schema = defs.get_schema(node.op_type, version, "")
    except defs.SchemaError:
        return None
    if schema.node_determinism == defs.OpSchema.NodeDeterminism.NonDeterministic:
        return None
    anything = [ValueInfoProto(name=name) for name in dict.fromkeys(filter(None, node.input))]
    outputs = [ValueInfoProto(name=name) for name in node.output if name]
    graph = helper.make_graph([node], "fold", anything, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)])
    try:
        with np.errstate(all="ignore"):
            results = ReferenceEvaluator(model).run(
                None, {name: x for name, x in zip(node.input, inputs, strict=True) if x is not None}
            )
    except Exception:  # whatever the reference cannot do is left to the operator's rule
        return None
    arrays = [np.asarray(r) for r in results]
    return None if any(a.dtype.kind == "O" for a in arrays) else arrays
