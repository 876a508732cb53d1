"""Our own legalisations, where TVM's are slow or do not survive its later passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llmc.graph import Dim, as_dim, same_dim
from llmc.ops.scalar import exp
from llmc.ops.tensor import reduce_rows
from llmc.tir_pipeline import OPAQUE
from llmc.tvm_shim import Expr, te, tirx

Group = tuple[range, range]  # dimensions of the source, and those of the result that hold the same elements


def groups(source: Sequence[Dim], result: Sequence[Dim]) -> list[Group]:
    """The finest split of two shapes of equal size into runs of dimensions with equal products."""
    found: list[Group] = []
    i = j = 0
    left: Dim = 1
    for end, dim in enumerate(source, 1):
        left = left * dim
        right: Dim = 1
        for stop in range(j, len(result) + 1):
            right = right * result[stop - 1] if stop > j else right
            if same_dim(left, right):
                found.append((range(i, end), range(j, stop)))
                i, j, left = end, stop, 1
                break
    if i < len(source) or j < len(result):
        found.append((range(i, len(source)), range(j, len(result))))
    return found


def _unravel(flat: Any, dims: Sequence[Any]) -> list[Any]:
    """The index, in `dims`, of the element at a flat place."""
    index: list[Any] = []
    for n, d in reversed(list(enumerate(dims))):
        index.insert(0, te.floormod(flat, d) if n else flat)
        flat = te.floordiv(flat, d)
    return index


def _reshape(bb: Any, call: Any) -> Expr:
    """Dimensions are matched first, so that an index is divided only by those that were really split or merged.

    TVM's lowering divides one flat index by sums and products of symbols: slow code, and seconds of compile time.
    """
    x = call.args[0]
    source = [as_dim(d) for d in x.ty.shape.values]
    result = [as_dim(d) for d in call.ty.shape.values]
    split = groups(source, result)

    def reshape(x: Any, old: list[Any], new: list[Any]) -> Any:
        def element(*i: Any) -> Any:
            place: list[Any] = []
            for take, give in split:
                flat: Any = te.const(0, "int64")
                for k in give:
                    flat = flat * new[k] + i[k]
                place += _unravel(flat, [old[k] for k in take])
            return x(*place)

        return te.compute(new, element, name="reshape")

    return bb.call_te(reshape, x, source, result, primfunc_name_hint="reshape")


def _softmax(bb: Any, call: Any) -> Expr:
    """Softmax along one axis, with an exponential that vectorises."""
    axis = int(call.attrs.axis)

    def softmax(x: Any) -> Any:
        at = axis % len(x.shape)
        rows = [d for n, d in enumerate(x.shape) if n != at]

        def along(f: Any, reducer: Any, name: str) -> Any:
            if at == len(rows):
                return reduce_rows(reducer, rows, f, x.shape[at], name)
            r = te.reduce_axis((0, x.shape[at]), "r")
            return te.compute(rows, lambda *i: reducer(f(*i[:at], r, *i[at:]), axis=r), name=name)

        def row(stage: Any, i: Any) -> Any:
            return stage(*i[:at], *i[at + 1 :])

        top = along(x, te.max, "top")
        e = te.compute(x.shape, lambda *i: exp(x(*i) - row(top, i)), name="exp")
        total = along(e, te.sum, "total")
        return te.compute(x.shape, lambda *i: e(*i) / row(total, i), name="softmax")

    return bb.call_te(softmax, call.args[0], primfunc_name_hint="softmax")


def _extreme(largest: bool) -> Any:
    """te.max or te.min, but of nothing they are infinite, where TVM has the least or largest finite number."""

    def of_none(dtype: Any) -> Any:
        end = te.min_value(dtype) if largest else te.max_value(dtype)
        return end * te.const(2, dtype) if str(dtype).startswith(("float", "bfloat")) else end

    if largest:
        return te.comm_reducer(lambda a, b: tirx.max(a, b), of_none, "max")
    return te.comm_reducer(lambda a, b: tirx.min(a, b), of_none, "min")


def _reduction(reducer: Any, name: str, lanes: bool = True) -> Callable[[Any, Any], Expr]:
    """Over the last axis by `lanes` (of a CPU's vectors), over others one after another."""

    def legalize(bb: Any, call: Any) -> Expr:
        x, keep = call.args[0], bool(call.attrs.keepdims)
        rank = len(x.ty.shape.values)
        axes = [int(a) % rank for a in call.attrs.axis or range(rank)]

        def by_lanes(x: Any) -> Any:
            rows = [*x.shape[:-1], *([1] if keep else [])]
            return reduce_rows(reducer, rows, lambda *i: x(*i[: rank - 1], i[-1]), x.shape[-1], name)

        def by_axes(x: Any) -> Any:
            reduced = {a: te.reduce_axis((0, x.shape[a]), f"k{a}") for a in axes}
            rows = [1 if a in reduced else d for a, d in enumerate(x.shape) if keep or a not in reduced]

            def element(*i: Any) -> Any:
                kept = iter(i) if not keep else iter([v for a, v in enumerate(i) if a not in reduced])
                place = [reduced[a] if a in reduced else next(kept) for a in range(rank)]
                return reducer(x(*place), axis=list(reduced.values()))

            return te.compute(rows, element, name=name)

        chosen = by_lanes if lanes and axes == [rank - 1] else by_axes
        return bb.call_te(chosen, x, primfunc_name_hint=name)

    return legalize


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

    return bb.call_te(compute, *symbols, primfunc_name_hint="shape_to_tensor", primfunc_attrs={"op_pattern": OPAQUE})


LEGALIZE: dict[str, Callable[[Any, Any], Expr]] = {
    "relax.max": _reduction(_extreme(True), "max"),
    "relax.min": _reduction(_extreme(False), "min"),
    "relax.nn.softmax": _softmax,
    "relax.reshape": _reshape,
    "relax.shape_to_tensor": _shape_to_tensor,
    "relax.sum": _reduction(te.sum, "sum"),
}
LEGALIZE_GPU: dict[str, Callable[[Any, Any], Expr]] = {
    "relax.max": _reduction(_extreme(True), "max", lanes=False),
    "relax.min": _reduction(_extreme(False), "min", lanes=False),
    "relax.reshape": _reshape,
    "relax.shape_to_tensor": _shape_to_tensor,
}
