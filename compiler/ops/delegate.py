"""Standard operators inside of other operators' rules: their rules run on expressions that are already there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmc.graph import Node, TensorType
from llmc.ops.context import Context, Emitter
from llmc.ops.tensor import dtype_of, shape_of
from llmc.tvm_shim import Expr, tvm

OPSET = 21  # the version of the standard that delegated operators obey


def standard(
    ctx: Context, op: str, inputs: Sequence[Expr | None], *, outputs: int = 1, opset: int = OPSET, **attrs: Any
) -> list[Expr]:
    """The outputs of the standard's `op` on expressions; None is an absent input.

    Raises UnsupportedError where that operator's rule declines.
    """
    inner = Emitter(ctx.emitter.rules, ctx.bb, ctx.emitter.analyzer)
    inner.outer, inner.measured = ctx, ctx.emitter.measured
    names = tuple(f"x{i}" if x is not None else "" for i, x in enumerate(inputs))
    for name, x in zip(names, inputs, strict=True):
        if x is None:
            continue
        inner.exprs[name] = x
        inner.graph_types[name] = TensorType(shape_of(x), dtype_of(x))
        if isinstance(x, tvm.ir.GenericConst):
            inner.constants[name] = x.value.numpy()
    made = tuple(f"y{i}" for i in range(outputs))
    inner.run(Node(op, names, made, attrs, "", ctx.node.name, opset))
    return [inner.exprs[name] for name in made]
