"""Resize: every axis is interpolated on its own, by a table of taps and weights.

A small kernel makes the table, in float64, so that extents may be symbols and scales or sizes data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from operator import add
from typing import Any

import numpy as np

from llmc.graph import Dim
from llmc.ops.context import Context, Rule
from llmc.ops.scalar import select
from llmc.ops.shape_data import i64, tabled
from llmc.ops.tensor import cast, compute, dtype_of, shape_of, simplify, take_slice
from llmc.tvm_shim import Expr, relax, te, tirx


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _f64(value: float | Any) -> Any:
    """A number, or an integer expression, in float64."""
    return te.const(float(value), "float64") if isinstance(value, (int, float)) else value.astype("float64")


@dataclass(frozen=True)
class _Mode:
    """The attributes that say where taps lie and what they weigh."""

    kind: str  # nearest, linear or cubic
    place: str
    rounding: str
    cubic: float
    antialias: bool
    exclude_outside: bool

    @property
    def crops(self) -> bool:
        return self.place == "tf_crop_and_resize"

    @property
    def support(self) -> int:
        return 1 if self.kind == "linear" else 2


def _mode(ctx: Context) -> _Mode:
    old = ctx.node.version < 11
    return _Mode(
        _text(ctx.attr("mode", "nearest")),
        _text(ctx.attr("coordinate_transformation_mode", "asymmetric" if old else "half_pixel")),
        _text(ctx.attr("nearest_mode", "floor" if old else "round_prefer_floor")),
        float(ctx.attr("cubic_coeff_a", -0.75)),
        bool(ctx.attr("antialias", 0)),
        bool(ctx.attr("exclude_outside", 0)),
    )


# -- where the taps of an output place lie ------------------------------------------------------------------------
def _coordinate(mode: str, i: Any, n: Any, length: Any, scale: Any, roi: tuple[Any, Any]) -> Any:
    """Where in the input, whose extent is n, the i-th of `length` output places lies; all in float64."""
    half, one, zero = _f64(0.5), _f64(1.0), _f64(0.0)
    width = scale * n  # as wide as scales say, the fraction included
    match mode:
        case "half_pixel":
            return (i + half) / scale - half
        case "half_pixel_symmetric":
            return n * half * (one - length / width) + (i + half) / scale - half
        case "pytorch_half_pixel":
            return select(length > one, (i + half) / scale - half, zero)
        case "align_corners":
            return select(width != one, i * (n - one) / (width - one), zero)
        case "tf_crop_and_resize":
            first, last = roi[0] * (n - one), roi[1] * (n - one)
            return select(width != one, first + i * (last - first) / (width - one), (first + last) * half)
        case _:  # asymmetric
            return i / scale


def _nearest(mode: str, x: Any) -> Any:
    match mode:
        case "floor":
            return te.floor(x)
        case "ceil":
            return te.ceil(x)
        case "round_prefer_ceil":
            return te.floor(x + _f64(0.5))
        case _:  # round_prefer_floor
            return te.ceil(x - _f64(0.5))


def _kernel(mode: _Mode, distance: Any) -> Any:
    """Weight of a tap at that distance: a triangle, or Keys' cubic convolution."""
    d, a = te.abs(distance), mode.cubic
    if mode.kind == "linear":
        return te.max(_f64(1.0) - d, _f64(0.0))
    near = (_f64(a + 2) * d - _f64(a + 3)) * d * d + _f64(1.0)
    far = ((_f64(a) * d - _f64(5 * a)) * d + _f64(8 * a)) * d - _f64(4 * a)
    return select(d <= _f64(1.0), near, select(d < _f64(2.0), far, _f64(0.0)))


def _taps(
    ctx: Context, mode: _Mode, k: int, n: Dim, length: Dim, reach: Dim, scales: Expr, roi: list[Expr]
) -> list[Expr]:
    """Tables of the k-th resized axis: places [length, taps], weights of the same shape unless the nearest is taken,
    and for a crop int8 [length], which says where the extrapolation value stands."""
    nearest = mode.kind == "nearest"

    def body(scales: Any, roi: list[Any], n: Any, length: Any, reach: Any) -> Any:
        scale, high, zero = scales(i64(k)), _f64(n) - _f64(1.0), _f64(0.0)
        window = (roi[0](i64(k)), roi[1](i64(k))) if roi else (zero, zero)
        shrink = te.min(scale, _f64(1.0)) if mode.antialias else _f64(1.0)
        shape = (length, 1 if nearest else reach * 2)

        def at(i: Any) -> Any:
            return _coordinate(mode.place, _f64(i), _f64(n), _f64(length), scale, window)

        def tap(i: Any, t: Any) -> Any:
            return _nearest(mode.rounding, at(i)) if nearest else te.floor(at(i)) + _f64(t + 1 - reach)

        def place(i: Any, t: Any) -> Any:
            return te.max(te.max(te.min(tap(i, t), high), zero).astype("int64"), i64(0))

        def weight(i: Any, t: Any) -> Any:
            value, inside = _kernel(mode, (tap(i, t) - at(i)) * shrink), (tap(i, t) >= zero, tap(i, t) <= high)
            return select(tirx.all(*inside), value, zero) if mode.exclude_outside else value

        def outside(i: Any) -> Any:
            return select(tirx.any(at(i) < zero, at(i) > high), te.const(1, "int8"), te.const(0, "int8"))

        tables = [te.compute(shape, place, name="places")]
        if not nearest:
            raw, r = te.compute(shape, weight, name="raw"), te.reduce_axis((0, shape[1]), "r")
            total = te.compute((length,), lambda i: te.sum(raw(i, r), axis=r), name="total")
            tables.append(te.compute(shape, lambda i, t: raw(i, t) / total(i), name="weights"))
        if mode.crops:
            tables.append(te.compute((length,), outside, name="outside"))
        return tables if len(tables) > 1 else tables[0]

    made, count = compute(ctx, "taps", body, scales, roi, n, length, reach), 1 + (not nearest) + mode.crops
    return [ctx.emit(relax.TupleGetItem(made, i)) for i in range(count)] if count > 1 else [made]


# -- scales and extents -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Scales:
    """One scale for each resized axis: a float64 tensor, and the numbers where these are known."""

    tensor: Expr
    known: list[float] | None

    @classmethod
    def of(cls, ctx: Context, values: np.ndarray) -> _Scales:
        return cls(ctx.literal(values, "float64"), [float(v) for v in values.reshape(-1)])


def _scales_and_lengths(ctx: Context, axes: list[int], old: bool) -> tuple[_Scales, list[Dim]]:
    """Scales and output extents of the resized axes, from sizes or scales, whichever there are."""
    dims, at = [ctx.shape()[a] for a in axes], 1 if old else 2
    if ctx.has(3):
        ctx.unify(ctx.shape(3)[0], len(axes))
        sizes, policy = ctx.extents(3), _text(ctx.attr("keep_aspect_ratio_policy", "stretch"))
        scales = _ratios(ctx, sizes, dims, policy)
        return scales, sizes if policy == "stretch" else _lengths(ctx, dims, scales, 0.5)
    if ctx.attr("scales"):
        scales = _Scales.of(ctx, np.asarray(ctx.attr("scales")))
    elif not ctx.has(at) or ctx.shape(at) == (0,):
        ctx.fail("it has neither scales nor sizes")
    else:
        ctx.unify(ctx.shape(at)[0], len(axes))
        given = ctx.const(at)
        scales = _Scales(cast(ctx, ctx.x(at), "float64"), None) if given is None else _Scales.of(ctx, given)
    return scales, _lengths(ctx, dims, scales, 0.0)


def _ratios(ctx: Context, sizes: list[Dim], dims: list[Dim], policy: str) -> _Scales:
    """sizes / dims; the smallest or largest of these for all axes, where the aspect ratio is to be kept."""
    pick = {"not_larger": min, "not_smaller": max}.get(policy)
    pairs = list(zip(sizes, dims, strict=True))
    if all(isinstance(d, int) for d in (*sizes, *dims)):
        known = [int(s) / int(d) for s, d in pairs]
        return _Scales.of(ctx, np.array(known if pick is None else [pick(known)] * len(known)))

    def body(sizes: list[Any], dims: list[Any]) -> Any:
        ratios = [_f64(s) / _f64(d) for s, d in zip(sizes, dims, strict=True)]
        if pick is not None:
            ratios = [reduce(te.min if policy == "not_larger" else te.max, ratios)] * len(ratios)
        return tabled("ratios", ratios)

    return _Scales(compute(ctx, "ratios", body, sizes, dims), None)


def _lengths(ctx: Context, dims: list[Dim], scales: _Scales, rounding: float) -> list[Dim]:
    """dims * scales + rounding, the fraction dropped."""
    if scales.known is not None and (not rounding or all(isinstance(d, int) for d in dims)):
        return [_scaled(d, s, rounding) for d, s in zip(dims, scales.known, strict=True)]

    def body(scales: Any, dims: list[Any]) -> Any:
        wide = [_f64(d) * scales(i64(k)) + _f64(rounding) for k, d in enumerate(dims)]
        return tabled("lengths", [te.max(te.min(te.floor(w), _f64(2.0**31)), _f64(0.0)).astype("int64") for w in wide])

    return ctx.bounded(compute(ctx, "lengths", body, scales.tensor, dims), len(dims))


def _scaled(dim: Dim, scale: float, rounding: float) -> Dim:
    if isinstance(dim, int):
        return math.floor(dim * scale + rounding)
    exact = Fraction(scale)  # a symbol times a float is no dimension, but times a ratio of integers
    return simplify(dim * exact.numerator // exact.denominator)


def _reach(ctx: Context, mode: _Mode, scales: _Scales, k: int) -> Dim:
    """How many taps there are on each side of a place: more where antialiasing makes the kernel wider."""
    if mode.kind == "nearest":
        return 0
    if not mode.antialias:
        return mode.support
    if scales.known is not None:
        return math.ceil(mode.support / min(scales.known[k], 1.0))

    def body(scales: Any) -> Any:
        least = te.max(te.min(scales(i64(k)), _f64(1.0)), _f64(2.0**-20))
        return tabled("reach", [te.ceil(_f64(mode.support) / least).astype("int64")])

    return ctx.measured(compute(ctx, "reach", body, scales.tensor), 1)[0]


# -- the operator -------------------------------------------------------------------------------------------------
def _resize(ctx: Context) -> Expr:
    """Inputs X, roi, scales, sizes; before opset 11 X, scales; before 9 X alone, and scales are an attribute."""
    x, rank, mode, old = ctx.x(), ctx.rank(), _mode(ctx), ctx.node.version < 11
    axes = [ctx.axis(int(a), rank) for a in ctx.attr("axes") or range(rank)]
    scales, lengths = _scales_and_lengths(ctx, axes, old)
    roi: list[Expr] = []
    if mode.crops and not old:
        window = cast(ctx, ctx.x(1), "float64")
        roi = [take_slice(ctx, window, 0, first, len(axes)) for first in (0, len(axes))]
    for k, (axis, length) in enumerate(zip(axes, lengths, strict=True)):
        if scales.known is None or scales.known[k] != 1 or roi:
            tables = _taps(ctx, mode, k, ctx.shape()[axis], length, _reach(ctx, mode, scales, k), scales.tensor, roi)
            x = _interpolate(ctx, mode, x, axis, length, tables)
    return x


def _interpolate(ctx: Context, mode: _Mode, x: Expr, axis: int, length: Dim, tables: list[Expr]) -> Expr:
    """The weighted sum of the taps along one axis, whose extent becomes `length`."""
    dtype = dtype_of(x)
    work = dtype if dtype in ("float32", "float64") else "float32"
    count = shape_of(tables[0])[1]
    weights = [cast(ctx, tables[1], work)] if mode.kind != "nearest" else []
    beyond = te.const(float(ctx.attr("extrapolation_value", 0.0)), dtype)

    def body(t: Any, places: Any, weights: list[Any], masks: list[Any], out: list[Any], count: Any) -> Any:
        def tap(i: Any, k: Any) -> Any:
            value = t(*i[:axis], places(i[axis], k), *i[axis + 1 :])
            return value.astype(work) * weights[0](i[axis], k) if weights else value

        def finish(i: Any, value: Any) -> Any:
            value = value.astype(dtype)
            return select(masks[0](i[axis]) != te.const(0, "int8"), beyond, value) if masks else value

        if isinstance(count, (int, tirx.IntImm)):
            return te.compute(
                out, lambda *i: finish(i, reduce(add, (tap(i, i64(k)) for k in range(int(count))))), name="resize"
            )
        r = te.reduce_axis((0, count), "r")
        total = te.compute(out, lambda *i: te.sum(tap(i, r), axis=r), name="taps")
        return te.compute(out, lambda *i: finish(i, total(*i)), name="resize")

    shape = [*shape_of(x)]
    shape[axis] = length
    masks = tables[-1:] if mode.crops else []
    return compute(ctx, "resize", body, x, tables[0], weights, masks, shape, count)


RULES: dict[str, Rule] = {"Resize": _resize, "Upsample": _resize}
