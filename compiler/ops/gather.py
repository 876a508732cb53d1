"""Operators that read or write elements at places given by an index tensor.

Negative indices count from the end. An index outside of the tensor, which the standard forbids, reads the nearest
element and writes none: whatever the data, no memory outside of the buffers is touched.
"""

from __future__ import annotations

from typing import Any

from llmc.ops.context import Context, Rule
from llmc.ops.tensor import compute, index_of
from llmc.tvm_shim import Expr, te


def _gather(ctx: Context) -> Expr:
    axis, at = ctx.axis(int(ctx.attr("axis", 0)), ctx.rank()), ctx.rank(1)
    data, index = ctx.shape(0), ctx.shape(1)

    def body(x: Any, indices: Any, out: list[Any], size: Any) -> Any:
        def element(*i: Any) -> Any:
            place = indices(*i[axis : axis + at]).astype("int64")
            return x(*i[:axis], index_of(place, size), *i[axis + at :])

        return te.compute(out, element, name="gather")

    return compute(ctx, "gather", body, ctx.x(0), ctx.x(1), [*data[:axis], *index, *data[axis + 1 :]], data[axis])


RULES: dict[str, Rule] = {"Gather": _gather}
