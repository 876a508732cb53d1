"""Tensors of zeros that are made when the model runs.

Constants are folded while a model is compiled, and a tensor of zeros is one: it would be stored in the artifact, where
TVM can write none without elements. What a function makes of a shape that it is given is not folded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmc.tvm_shim import Expr, relax, tirx


def zeros(bb: Any, shape: Sequence[Any], dtype: str) -> Expr:
    """Emit a tensor of zeros by way of a function of its shape; `bb` is a relax.BlockBuilder."""
    dims = [tirx.Var(f"d{axis}", "int64") for axis in range(len(shape))]
    given = relax.Var("shape", relax.ShapeType(dims))
    with bb.function("zeros", [given], private=True):
        with bb.dataflow():
            made = bb.emit_output(relax.op.zeros(dims, dtype))
        name = bb.emit_func_output(made)
    tensor = bb.emit(name(relax.ShapeExpr(list(shape))))
    return bb.match_cast(tensor, relax.TensorType(list(shape), dtype))
