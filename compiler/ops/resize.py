"""Resize: every axis is interpolated on its own, from a table of taps and weights made at compile time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from llmc.ops.context import Context, Rule
from llmc.ops.scalar import select
from llmc.ops.tensor import compute, shape_of
from llmc.tvm_shim import Expr, te


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _coordinates(mode: str, n: int, length: int, scale: float, roi: tuple[float, float]) -> np.ndarray:
    """Where in the input, whose extent is n, each of `length` output places lies."""
    out, width = np.arange(length, dtype=np.float64), scale * n  # as wide as scales say, the fraction included
    match mode:
        case "half_pixel":
            return (out + 0.5) / scale - 0.5
        case "half_pixel_symmetric":
            adjusted = length / (scale * n)
            return n / 2 * (1 - adjusted) + (out + 0.5) / scale - 0.5
        case "pytorch_half_pixel":
            return (out + 0.5) / scale - 0.5 if length > 1 else np.zeros(length)
        case "align_corners":
            return out * (n - 1) / (width - 1) if width != 1 else np.zeros(length)
        case "tf_crop_and_resize":
            first, span = roi[0] * (n - 1), (roi[1] - roi[0]) * (n - 1)
            return first + out * span / (width - 1) if width != 1 else np.full(length, np.mean(roi) * (n - 1))
        case _:  # asymmetric
            return out / scale


def _nearest(mode: str, x: np.ndarray) -> np.ndarray:
    match mode:
        case "floor":
            return np.floor(x)
        case "ceil":
            return np.ceil(x)
        case "round_prefer_ceil":
            return np.floor(x + 0.5)
        case _:  # round_prefer_floor
            return np.ceil(x - 0.5)


def _kernel(mode: str, a: float, distance: np.ndarray) -> np.ndarray:
    """Weight of a tap at that distance: a triangle, or Keys' cubic convolution."""
    d = np.abs(distance)
    if mode == "linear":
        return np.maximum(1 - d, 0)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0))


def taps(
    ctx: Context, n: int, length: int, scale: float, roi: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(places, weights), both [length, taps], and [length]: out[i] = sum of weights[i, t] * x[places[i, t]], or the
    extrapolation value where the last is true."""
    mode, old = _text(ctx.attr("mode", "nearest")), ctx.node.version < 11
    where = _text(ctx.attr("coordinate_transformation_mode", "asymmetric" if old else "half_pixel"))
    x = _coordinates(where, n, length, scale, roi)
    beyond = ((x < 0) | (x > n - 1)) & (where == "tf_crop_and_resize")
    if mode == "nearest":
        places = _nearest(_text(ctx.attr("nearest_mode", "floor" if old else "round_prefer_floor")), x)[:, None]
        return np.clip(places, 0, n - 1).astype(np.int64), np.ones((length, 1)), beyond
    shrink = min(scale, 1.0) if ctx.attr("antialias", 0) else 1.0
    reach = math.ceil((1 if mode == "linear" else 2) / shrink)
    places = np.floor(x)[:, None] + np.arange(1 - reach, reach + 1)
    weights = _kernel(mode, float(ctx.attr("cubic_coeff_a", -0.75)), (places - x[:, None]) * shrink)
    inside = (places >= 0) & (places <= n - 1)
    if ctx.attr("exclude_outside", 0):
        weights = np.where(inside, weights, 0)
    weights = weights / weights.sum(1, keepdims=True)
    return np.clip(places, 0, n - 1).astype(np.int64), weights, beyond


def _resize(ctx: Context) -> Expr:
    """Inputs X, roi, scales, sizes; before opset 11 X, scales; before 9 X alone, and scales are an attribute."""
    x, rank = ctx.x(), ctx.rank()
    axes = [ctx.axis(int(a), rank) for a in ctx.attr("axes") or range(rank)]
    at = 1 if ctx.node.version < 11 else 2
    scales = np.asarray(ctx.attr("scales")) if ctx.attr("scales") else ctx.const(at) if ctx.has(at) else None
    sizes = ctx.ints(3) if ctx.has(3) else None
    if sizes is None and (scales is None or not scales.size):
        ctx.fail("scales or sizes must be constant")
    roi = ctx.const(1) if at == 2 and ctx.has(1) else None
    for k, axis in enumerate(axes):
        n = shape_of(x)[axis]
        if sizes is None and scales is not None and float(scales[k]) == 1 and not (roi is not None and roi.size):
            continue
        if not isinstance(n, int):
            ctx.fail(f"axis {axis} of symbolic extent is resized")
        factor, length = _factor(ctx, axes, k, scales, sizes)
        window = (float(roi[k]), float(roi[k + len(axes)])) if roi is not None and roi.size else (0.0, 1.0)
        x = _interpolate(ctx, x, axis, *taps(ctx, n, length, factor, window))
    return x


def _factor(ctx: Context, axes: list[int], k: int, scales: Any, sizes: list[int] | None) -> tuple[float, int]:
    """(scale, output extent) of the k-th resized axis."""
    if sizes is None:
        return float(scales[k]), math.floor(int(ctx.shape()[axes[k]]) * float(scales[k]))
    dims = [int(ctx.shape()[a]) for a in axes]
    policy = _text(ctx.attr("keep_aspect_ratio_policy", "stretch"))
    if policy == "stretch":
        return sizes[k] / dims[k], sizes[k]
    ratios = [s / d for s, d in zip(sizes, dims, strict=True)]
    ratio = min(ratios) if policy == "not_larger" else max(ratios)
    return ratio, math.floor(dims[k] * ratio + 0.5)


def _interpolate(ctx: Context, x: Expr, axis: int, places: np.ndarray, weights: np.ndarray, beyond: np.ndarray) -> Expr:
    dtype = str(x.ty.dtype)
    work = dtype if dtype in ("float32", "float64") else "float32"
    count = places.shape[1]

    outside = te.const(float(ctx.attr("extrapolation_value", 0.0)), dtype)

    def body(t: Any, p: Any, w: Any, masks: list[Any], out: list[Any]) -> Any:
        def element(*i: Any) -> Any:
            value = inside(*i)
            return select(masks[0](i[axis]) != te.const(0, "int8"), outside, value) if masks else value

        def inside(*i: Any) -> Any:
            def tap(k: Any) -> Any:
                return t(*i[:axis], p(i[axis], k), *i[axis + 1 :])

            if count == 1:
                return tap(0)
            total = te.const(0, work)
            for k in range(count):
                total = total + tap(k).astype(work) * w(i[axis], k)
            return total.astype(dtype)

        return te.compute(out, element, name="resize")

    shape = [*shape_of(x)]
    shape[axis] = places.shape[0]
    masks = [ctx.literal(beyond.astype(np.int8), "int8")] if beyond.any() else []
    return compute(ctx, "resize", body, x, ctx.literal(places, "int64"), ctx.literal(weights, work), masks, shape)


RULES: dict[str, Rule] = {"Resize": _resize, "Upsample": _resize}
