"""Reductions. Axes are an attribute in old opsets and an input in new ones; no axes means all."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from llmc.ops.axes_data import count_of, halved_extents, squeezed_extents
from llmc.ops.context import Context, Rule
from llmc.ops.shape import axes_of
from llmc.ops.tensor import cast, compute, dtype_of, elementwise, full, is_float, product, reshape, shape_of
from llmc.tvm_shim import Expr, relax, te, topi

op = relax.op
Reducer = Callable[[Expr, list[int], bool], Expr]


def _reduction(reduce_: Callable[[Context, Expr, list[int], bool], Expr], of_none: float) -> Rule:
    """`of_none` is what nothing is reduced to; where that is infinite, integers have their least or greatest."""

    def rule(ctx: Context) -> Expr:
        rank = ctx.rank()
        if ctx.has(1) and ctx.const(1) is None and rank and ctx.shape(1) != (0,):
            return _over_axes_of_data(ctx, reduce_, of_none)
        axes = axes_of(ctx, 1, rank) if ctx.const(1) is not None or not ctx.has(1) else []
        if not axes:
            axes = [] if ctx.attr("noop_with_empty_axes", 0) else list(range(rank))
        keep, shape = bool(ctx.attr("keepdims", 1)), ctx.shape()
        if any(isinstance(shape[a], int) and shape[a] == 0 for a in axes):
            kept = [1 if i in axes else d for i, d in enumerate(shape) if keep or i not in axes]
            return full(ctx, kept, _of_none(of_none, ctx.dtype()), ctx.dtype())
        return reduce_(ctx, ctx.x(), axes, keep)

    return rule


def _over_axes_of_data(ctx: Context, reduce_: Callable[..., Expr], of_none: float) -> Expr:
    """Every axis becomes two, one of which has its extent while the other is 1: which one, the run knows. Over the
    second ones is reduced."""
    x, rank, keep = ctx.x(), ctx.rank(), bool(ctx.attr("keepdims", 1))
    kept, reduced = halved_extents(ctx, x, ctx.x(1), all_of_none=not ctx.attr("noop_with_empty_axes", 0))
    shape = kept if keep else squeezed_extents(ctx, x, ctx.x(1), rank - count_of(ctx, 1))
    if any(isinstance(d, int) and d == 0 for d in ctx.shape()):
        return full(ctx, shape, _of_none(of_none, ctx.dtype()), ctx.dtype())

    def body(x: Any, sizes: list[Any]) -> Any:
        return te.compute(sizes, lambda *i: x(*(i[n] + i[n + rank] for n in range(rank))), name="twice")

    twice = compute(ctx, "twice", body, x, [*kept, *reduced])
    return reshape(ctx, ctx.emit(reduce_(ctx, twice, list(range(rank, 2 * rank)), False)), shape)


def _of_none(value: float, dtype: str) -> float | int | bool:
    if is_float(dtype):
        return value
    if dtype == "bool":
        return value > 0
    limits = np.iinfo(dtype)
    if math.isnan(value):
        return 0
    return int(limits.max if value > limits.max else limits.min if value < limits.min else value)


def _plain(f: Reducer, of_none: float) -> Rule:
    def reduce_(ctx: Context, x: Expr, axes: list[int], keep: bool) -> Expr:
        if not axes:
            return x
        if dtype_of(x) == "bool":  # False is 0, True is 1
            return cast(ctx, ctx.emit(f(cast(ctx, x, "int8"), axes, keep)), "bool")
        return f(x, axes, keep)

    return _reduction(reduce_, of_none)


def mean(ctx: Context, x: Expr, axes: list[int], keep: bool) -> Expr:
    """The mean over `axes`; integers are truncated."""
    if not axes:
        return x
    total = ctx.emit(op.sum(x, axes, keep))
    divide = (lambda a, b: a / b) if is_float(dtype_of(x)) else te.truncdiv

    def body(t: Any, out: list[Any], n: Any) -> Any:
        return te.compute(out, lambda *i: divide(t(*i), te.const(1, t.dtype) * n), name="mean")

    return compute(ctx, "mean", body, total, list(shape_of(total)), product(shape_of(x)[a] for a in axes))


def _square_sum(ctx: Context, x: Expr, axes: list[int], keep: bool) -> Expr:
    return op.sum(ctx.emit(op.multiply(x, x)), axes, keep)


def _l1(ctx: Context, x: Expr, axes: list[int], keep: bool) -> Expr:
    return op.sum(elementwise(ctx, "abs", te.abs, x), axes, keep)


def _root(ctx: Context, x: Expr) -> Expr:
    dtype = str(x.ty.dtype)
    return cast(ctx, ctx.emit(op.sqrt(cast(ctx, x, dtype if is_float(dtype) else "float64"))), dtype)


def _log(ctx: Context, x: Expr) -> Expr:
    dtype = str(x.ty.dtype)
    return cast(ctx, ctx.emit(op.log(cast(ctx, x, dtype if is_float(dtype) else "float64"))), dtype)


def _log_sum_exp(ctx: Context, x: Expr, axes: list[int], keep: bool) -> Expr:
    """The maximum is taken out first, so that nothing overflows."""
    top = ctx.emit(op.max(x, axes, True))
    total = ctx.emit(op.sum(ctx.emit(op.exp(ctx.emit(op.subtract(x, top)))), axes, True))
    y = ctx.emit(op.add(ctx.emit(op.log(total)), top))
    return y if keep else op.squeeze(y, axes)


def _arg(f: Callable[..., object], largest: bool) -> Rule:
    def rule(ctx: Context) -> Expr:
        axis = ctx.axis(int(ctx.attr("axis", 0)), ctx.rank())
        keep, last = bool(ctx.attr("keepdims", 1)), bool(ctx.attr("select_last_index", 0))

        def body(x: te.Tensor) -> te.Tensor:
            index = f(x, axis=axis, keepdims=keep, select_last_index=last)
            return topi.cast(index, "int64")

        return compute(ctx, "argmax" if largest else "argmin", body, ctx.x())

    return rule


RULES: dict[str, Rule] = {
    "ReduceSum": _plain(op.sum, 0),
    "ReduceMax": _plain(op.max, -math.inf),
    "ReduceMin": _plain(op.min, math.inf),
    "ReduceProd": _plain(op.prod, 1),
    "ReduceMean": _reduction(mean, math.nan),
    "ReduceSumSquare": _reduction(_square_sum, 0),
    "ReduceL1": _reduction(_l1, 0),
    "ReduceL2": _reduction(lambda ctx, x, axes, keep: _root(ctx, ctx.emit(_square_sum(ctx, x, axes, keep))), 0),
    "ReduceLogSum": _reduction(lambda ctx, x, axes, keep: _log(ctx, ctx.emit(op.sum(x, axes, keep))), -math.inf),
    "ReduceLogSumExp": _reduction(_log_sum_exp, -math.inf),
    "ArgMax": _arg(topi.argmax, True),
    "ArgMin": _arg(topi.argmin, False),
}
