"""Our own legalisations, where TVM's do not survive its later passes."""

from __future__ import annotations

from typing import Any

from llmc.tvm_shim import Expr, te, tirx

_OPAQUE = 8  # TVM's operator pattern kind that is never fused


def _shape_to_tensor(bb: Any, call: Any) -> Expr:
    """Dimensions as an int64 tensor. Symbols reach this kernel as scalar arguments, which FuseTIR cannot carry into a
    fused function: so it stays alone."""
    dims = list(call.args[0].values)
    symbols = [d for d in dims if not isinstance(d, tirx.IntImm)]

    def compute(*scalars: Any) -> Any:
        rest = iter(scalars)
        values = [d if isinstance(d, tirx.IntImm) else next(rest) for d in dims]

        def element(i: Any) -> Any:
            result = values[-1]
            for k in range(len(values) - 2, -1, -1):
                result = tirx.Select(i == k, values[k], result)
            return result

        return te.compute((len(values),), element, "shape_to_tensor")

    return bb.call_te(
        compute, *symbols, primfunc_name_hint="shape_to_tensor", primfunc_attrs={"op_pattern": _OPAQUE}
    )


LEGALIZE = {"relax.shape_to_tensor": _shape_to_tensor}
