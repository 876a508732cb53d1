"""Operators that read an image between its pixels, or say where: GridSample, AffineGrid,
RoiAlign, MaxRoiPool, DeformConv.

Places are floating-point numbers that the data decides; whatever they are, only pixels of the image are read.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

from llmc.graph import Dim
from llmc.ops.context import Context, Rule
from llmc.ops.conv import add_channels, window
from llmc.ops.scalar import const, select
from llmc.ops.tensor import cast, compute, loops, simplify
from llmc.tvm_shim import Expr, T, te, tirx

_CUBIC = -0.75  # Keys' parameter, as GridSample fixes it
Pixel = Callable[[Sequence[Any]], Any]


def f32(value: float) -> Any:
    return te.const(value, "float32")


def _float(size: Any) -> Any:
    return f32(size) if isinstance(size, int) else size.astype("float32")


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


# -- interpolation ----------------------------------------------------------------------------------------------
def interpolate(pixel: Pixel, at: Sequence[Any], mode: str) -> Any:
    """The value of an image at a place, from the pixels around it; `pixel` is asked at integer places."""
    if mode == "nearest":
        return pixel([te.nearbyint(x).astype("int64") for x in at])
    around = (0, 1) if mode == "linear" else (-1, 0, 1, 2)
    below = [te.floor(x) for x in at]
    axes = [
        [(low.astype("int64") + k, _weight(mode, x - low - f32(k))) for k in around]
        for x, low in zip(at, below, strict=True)
    ]
    terms = []
    for taps in itertools.product(*axes):
        weight = reduce(lambda a, b: a * b, [w for _, w in taps])
        terms.append(pixel([place for place, _ in taps]) * weight)
    return reduce(lambda a, b: a + b, terms)


def _weight(mode: str, distance: Any) -> Any:
    d = te.abs(distance)
    if mode == "linear":
        return f32(1) - d
    near = ((f32(_CUBIC + 2) * d - f32(_CUBIC + 3)) * d) * d + f32(1)
    far = ((f32(_CUBIC) * d - f32(5 * _CUBIC)) * d + f32(8 * _CUBIC)) * d - f32(4 * _CUBIC)
    return select(d <= f32(1), near, far)


def zero_outside(read: Pixel, sizes: Sequence[Any]) -> Pixel:
    """`read`, with zeros around the image."""

    def pixel(at: Sequence[Any]) -> Any:
        inside = tirx.all(*(t for a, d in zip(at, sizes, strict=True) for t in (a >= 0, a < d)))
        return te.if_then_else(inside, read([_clamp(a, d) for a, d in zip(at, sizes, strict=True)]), f32(0))

    return pixel


def _clamp(place: Any, size: Any) -> Any:
    return te.max(te.min(place, size - 1), te.const(0, "int64"))


def _reflect(x: Any, low: Any, high: Any) -> Any:
    """A place thrown back at both borders as often as it takes."""
    span = te.max(high - low, f32(1e-6))
    distance = te.abs(x - low)
    times = te.floor(distance / span)
    rest = distance - times * span
    odd = (times.astype("int64") & te.const(1, "int64")) == 1
    return select(odd, high - rest, low + rest)


# -- GridSample -------------------------------------------------------------------------------------------------
def _grid_sample(ctx: Context) -> Expr:
    """X [N, C, ...] read at grid [N, out..., D], whose last axis holds places from -1 to 1, the last dimension's
    first."""
    mode = {"bilinear": "linear", "bicubic": "cubic"}.get(
        name := _text(ctx.attr("mode", "linear")), name
    )  # opset 16 has the names of two dimensions
    padding, corners = _text(ctx.attr("padding_mode", "zeros")), bool(ctx.attr("align_corners", 0))
    (n, c, *sizes), dtype = ctx.shape(0), ctx.dtype()
    rank = len(sizes)

    def body(x: Any, grid: Any, out: list[Any], sizes: list[Any]) -> Any:
        extents = [_float(d) for d in sizes]
        low = [f32(0.0 if corners else -0.5)] * rank
        high = [e - f32(1.0 if corners else 0.5) for e in extents]

        def place(b: Any, o: Sequence[Any], d: int) -> Any:
            at = grid(b, *o, te.const(rank - 1 - d, "int64")).astype("float32") + f32(1)
            at = at * f32(0.5) * (extents[d] - f32(1)) if corners else (at * extents[d] - f32(1)) * f32(0.5)
            at = te.nearbyint(at) if mode == "nearest" else at
            if padding == "border" and mode != "cubic":  # which uses the pixels around, clamped one by one
                at = te.max(te.min(at, extents[d] - f32(1)), f32(0))
            elif padding == "reflection":
                at = _reflect(at, low[d], high[d])
            return te.max(te.min(at, f32(2.0**31)), f32(-(2.0**31)))  # so that it has an integer

        def element(b: Any, k: Any, *o: Any) -> Any:
            def read(at: Sequence[Any]) -> Any:
                return x(b, k, *at).astype("float32")

            def bent(at: Sequence[Any]) -> Any:
                if padding == "reflection":
                    at = [
                        _reflect(a.astype("float32"), lo, hi).astype("int64")
                        for a, lo, hi in zip(at, low, high, strict=True)
                    ]
                return read([_clamp(a, d) for a, d in zip(at, sizes, strict=True)])

            pixel = zero_outside(read, sizes) if padding == "zeros" else bent
            return interpolate(pixel, [place(b, o, d) for d in range(rank)], mode).astype(dtype)

        return te.compute(out, element, name="grid_sample")

    return compute(ctx, "grid_sample", body, ctx.x(0), ctx.x(1), [n, c, *ctx.shape(1)[1:-1]], list(sizes))


def _affine_grid(ctx: Context) -> Expr:
    """theta [N, D, D + 1] and size [N, C, out...] to the places [N, out..., D] that GridSample reads: each output place
    moved by theta."""
    sizes, corners, dtype = ctx.extents(1)[2:], bool(ctx.attr("align_corners", 0)), ctx.dtype()
    rank = len(sizes)

    def body(theta: Any, out: list[Any]) -> Any:
        def place(d: int, i: Any) -> Any:
            """From -1 to 1 along the d-th of the output's dimensions, between its corners or its pixels' edges."""
            at, extent = i.astype("float32"), _float(out[1 + d])
            if corners:
                return at * f32(2) / te.max(extent - f32(1), f32(1)) - f32(1)
            return (at * f32(2) + f32(1)) / extent - f32(1)

        def element(b: Any, *i: Any) -> Any:
            row = [theta(b, i[-1], te.const(c, "int64")).astype("float32") for c in range(rank + 1)]
            moved = [row[c] * place(rank - 1 - c, i[rank - 1 - c]) for c in range(rank)]
            return reduce(lambda a, b: a + b, moved, row[rank]).astype(dtype)

        return te.compute(out, element, name="affine_grid")

    return compute(ctx, "affine_grid", body, ctx.x(0), [ctx.shape()[0], *sizes, rank])


# -- DeformConv -------------------------------------------------------------------------------------------------
def _deform_conv(ctx: Context) -> Expr:
    """X [N, C, ...], W [M, C / groups, kernel...], offsets [N, G * taps * D, out...], bias, mask [N, G * taps, out...]:
    a convolution whose taps are moved by the offsets and scaled by the mask."""
    (n, _, *sizes), (m, channels, *size) = ctx.shape(0), ctx.shape(1)
    rank, groups, parts = len(size), int(ctx.attr("group", 1)), int(ctx.attr("offset_group", 1))
    win, dtype = window(ctx, [int(k) for k in size], sizes), ctx.dtype()
    each, shared = simplify(m // groups), simplify(channels * groups // parts)
    masks = [ctx.x(4)] if ctx.has(4) else []

    def body(x: Any, w: Any, offset: Any, masks: list[Any], out: list[Any], sizes: list[Any]) -> Any:
        r = [te.reduce_axis((0, d), f"r{k}") for k, d in enumerate([channels, *size])]
        tap = reduce(lambda flat, k: flat * size[k] + r[k + 1], range(rank), te.const(0, "int64"))
        taps = reduce(lambda a, b: a * b, size)

        def element(b: Any, o: Any, *i: Any) -> Any:
            channel = te.floordiv(o, each) * channels + r[0]
            row = te.floordiv(channel, shared) * taps + tap
            whole = win.places(i, r[1:])
            at = [whole[d].astype("float32") + offset(b, row * rank + d, *i).astype("float32") for d in range(rank)]
            pixel = zero_outside(lambda place: x(b, channel, *place).astype("float32"), sizes)
            value = interpolate(pixel, at, "linear") * w(o, *r).astype("float32")
            return te.sum(value * masks[0](b, row, *i).astype("float32") if masks else value, axis=r)

        return te.compute(out, element, name="deform_conv")

    y = compute(ctx, "deform_conv", body, ctx.x(0), ctx.x(1), ctx.x(2), masks, [n, m, *ctx.shape(2)[2:]], list(sizes))
    return add_channels(ctx, cast(ctx, y, dtype), 3)


# -- regions of interest ----------------------------------------------------------------------------------------
def _roi_align(ctx: Context) -> Expr:
    """X [N, C, H, W], rois [R, 4] as x1, y1, x2, y2, batch [R]: the mean or maximum of samples in each bin of a
    region. Without a sampling ratio there are as many as a bin has pixels, which the data decides."""
    (_, c, h, w), (regions, _) = ctx.shape(0), ctx.shape(1)
    high, wide = int(ctx.attr("output_height", 1)), int(ctx.attr("output_width", 1))
    ratio, scale = int(ctx.attr("sampling_ratio", 0)), float(ctx.attr("spatial_scale", 1.0))
    default = "half_pixel" if ctx.node.version >= 16 else "output_half_pixel"
    half = _text(ctx.attr("coordinate_transformation_mode", default)) == "half_pixel"
    average = _text(ctx.attr("mode", "avg")) == "avg"

    def nest(x: Any, rois: Any, batch: Any, y: Any, c: Any, h: Any, w: Any, regions: Any) -> None:
        def span(roi: Any, first: int, bins: int) -> tuple[Any, Any, Any]:
            """(start, size of a bin, samples in one)."""
            shift = f32(0.5 if half else 0.0)
            start, end = (rois[roi * 4 + k] * f32(scale) - shift for k in (first, first + 2))
            size = end - start if half else te.max(end - start, f32(1))
            step = size / f32(bins)
            return start, step, te.const(ratio, "int64") if ratio > 0 else te.ceil(step).astype("int64")

        def sample(start: Any, step: Any, count: Any, b: Any, i: Any, size: Any) -> tuple[Any, Any, Any, Any]:
            """(is it inside, pixel below, pixel above, weight of that)."""
            at = start + b.astype("float32") * step + (i.astype("float32") + f32(0.5)) * step / count.astype("float32")
            extent = size.astype("float32")
            inside = tirx.all(at >= f32(-1), at <= extent)
            at = te.max(te.min(at, extent - f32(1)), f32(0))
            low = at.astype("int64")
            return inside, low, te.min(low + 1, size - 1), at - low.astype("float32")

        h, w = (te.const(d, "int64") if isinstance(d, int) else d for d in (h, w))
        with T.parallel(0, regions * c) as rc:
            roi, channel = te.floordiv(rc, c), te.floormod(rc, c)
            x0, xs, nx = span(roi, 0, wide)
            y0, ys, ny = span(roi, 1, high)
            base = (batch[roi] * c + channel) * h
            with T.serial(0, T.int64(high)) as p, T.serial(0, T.int64(wide)) as q:
                at = (rc * high + p) * wide + q
                y[at] = f32(0)
                with T.serial(0, ny) as i, T.serial(0, nx) as j:
                    inside_y, y_low, y_high, wy = sample(y0, ys, ny, p, i, h)
                    inside_x, x_low, x_high, wx = sample(x0, xs, nx, q, j, w)
                    terms = [
                        x[(base + row) * w + column] * a * b
                        for row, a in ((y_low, f32(1) - wy), (y_high, wy))
                        for column, b in ((x_low, f32(1) - wx), (x_high, wx))
                    ]
                    found = reduce((lambda a, b: a + b) if average else te.max, terms)
                    found = select(tirx.all(inside_y, inside_x), found, f32(0))
                    is_first = tirx.all(i == 0, j == 0)
                    y[at] = y[at] + found if average else select(is_first, found, te.max(y[at], found))
                if average:
                    y[at] = y[at] / te.max(ny * nx, te.const(1, "int64")).astype("float32")

    x, rois, batch = cast(ctx, ctx.x(0), "float32"), cast(ctx, ctx.x(1), "float32"), cast(ctx, ctx.x(2), "int64")
    out = ([regions, c, high, wide], "float32")
    return cast(ctx, loops(ctx, "roi_align", nest, [x, rois, batch], [out], [c, h, w, regions])[0], ctx.dtype())


def _rounded(x: Any) -> Any:
    """The nearest whole number, halves away from 0."""
    return select(x < f32(0), te.ceil(x - f32(0.5)), te.floor(x + f32(0.5)))


def _max_roi_pool(ctx: Context) -> Expr:
    """X [N, C, H, W], rois [R, 5] as batch, x1, y1, x2, y2: the maximum of the pixels in each bin, 0 of none."""
    (_, c, h, w), (regions, _) = ctx.shape(0), ctx.shape(1)
    high, wide = (int(k) for k in ctx.attr("pooled_shape"))
    scale, dtype = float(ctx.attr("spatial_scale", 1.0)), ctx.dtype()

    def body(x: Any, rois: Any, out: list[Any], h: Any, w: Any) -> Any:
        r = [te.reduce_axis((0, d), f"r{k}") for k, d in enumerate((h, w))]

        def inside(roi: Any, first: int, bins: int, b: Any, at: Any) -> Any:
            start, end = (
                _rounded(rois(roi, te.const(k, "int64")).astype("float32") * f32(scale)) for k in (first, first + 2)
            )
            step = te.max(end - start + f32(1), f32(1)) / f32(bins)
            place, number = at.astype("float32") - start, b.astype("float32")
            return tirx.all(place >= te.floor(number * step), place < te.ceil((number + f32(1)) * step))

        def element(roi: Any, channel: Any, p: Any, q: Any) -> Any:
            batch = rois(roi, te.const(0, "int64")).astype("int64")
            counted = tirx.all(inside(roi, 2, high, p, r[0]), inside(roi, 1, wide, q, r[1]))
            return te.max(select(counted, x(batch, channel, *r), te.min_value(dtype)), axis=r)

        top = te.compute(out, element, name="top")
        none = te.min_value(dtype)
        return te.compute(out, lambda *i: select(top(*i) == none, const(top(*i), 0), top(*i)), name="max_roi_pool")

    shape: list[Dim] = [regions, c, high, wide]
    return compute(ctx, "max_roi_pool", body, ctx.x(0), ctx.x(1), shape, h, w)


RULES: dict[str, Rule] = {
    "GridSample": _grid_sample,
    "AffineGrid": _affine_grid,
    "DeformConv": _deform_conv,
    "RoiAlign": _roi_align,
    "MaxRoiPool": _max_roi_pool,
}
