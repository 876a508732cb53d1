"""Discrete Fourier transforms, and the mel filters: sums over a table of sines, in float64."""

from __future__ import annotations

import math
from typing import Any

from llmc.graph import Dim
from llmc.ops.axes_data import around, with_extent
from llmc.ops.context import Context, Rule
from llmc.ops.elementwise import onnx_dtype
from llmc.ops.scalar import select
from llmc.ops.tensor import cast, compute, reshape, shape_of, simplify
from llmc.tvm_shim import Expr, te, tirx


def _turns(n: Any) -> tuple[Any, Any]:
    """Tables [n] of the cosine and the sine of i / n turns."""

    def angle(i: Any) -> Any:
        return i.astype("float64") * te.const(2 * math.pi, "float64") / _wide(n)

    cosine = te.compute((n,), lambda i: te.cos(angle(i)), name="cosine")
    return cosine, te.compute((n,), lambda i: te.sin(angle(i)), name="sine")


def _wide(n: Any) -> Any:
    return te.const(n, "float64") if isinstance(n, int) else n.astype("float64")


def _dft(ctx: Context) -> Expr:
    """[..., L, ..., 1 or 2] to [..., n, ..., 2], or ..., 1] where real numbers come back; the last axis holds real and
    imaginary parts. The axis is an attribute before opset 20, then an input."""
    shape, parts = list(ctx.shape()), int(ctx.shape()[-1])
    if not ctx.has(2) or ctx.const(2) is not None:
        given = ctx.ints(2)[0] if ctx.has(2) else int(ctx.attr("axis", 1 if ctx.node.version < 20 else -2))
        return _transform(ctx, ctx.x(), ctx.axis(given, ctx.rank()))
    before, have, behind = around(ctx, ctx.x(2), shape)
    x = reshape(ctx, ctx.x(), [before, have, simplify(behind // parts), parts])
    y = _transform(ctx, x, 1)
    return reshape(ctx, y, [*with_extent(ctx, ctx.x(2), shape, shape_of(y)[1])[:-1], shape_of(y)[-1]])


def _transform(ctx: Context, x: Expr, axis: int) -> Expr:
    """The node's transform along an axis of x."""
    inverse, onesided = bool(ctx.attr("inverse", 0)), bool(ctx.attr("onesided", 0))
    have, parts = shape_of(x)[axis], int(shape_of(x)[-1])
    n = ctx.extents(1)[0] if ctx.has(1) else simplify(2 * (have - 1)) if inverse and onesided else have
    bins = simplify(n // 2 + 1)
    real = inverse and onesided  # the input's other half is the conjugate of the one that is there
    used = min_dim(have, bins if real else n)
    shape = list(shape_of(x))
    shape[axis], shape[-1] = (bins if onesided and not inverse else n), (1 if real else 2)
    dtype = ctx.dtype()

    def body(x: Any, out: list[Any], n: Any, used: Any, bins: Any) -> Any:
        cosine, sine = _turns(n)
        r = te.reduce_axis((0, used), "r")

        def element(*i: Any) -> Any:
            def part(c: int) -> Any:
                return x(*i[:axis], r, *i[axis + 1 : -1], te.const(c, "int64")).astype("float64")

            turn = te.floormod(i[axis] * r, n)
            a, b = part(0), part(1) if parts == 2 else te.const(0, "float64")
            c, s = cosine(turn), sine(turn) if inverse else -sine(turn)
            value = a * c - b * s if real else select(i[-1] == 0, a * c - b * s, a * s + b * c)
            if real:
                alone = tirx.any(r == 0, r * 2 == n)
                value = select(alone, value, value * te.const(2, "float64"))
            return te.sum(value, axis=r)

        total = te.compute(out, element, name="dft")
        scale = _wide(n) if inverse else te.const(1, "float64")
        return te.compute(out, lambda *i: (total(*i) / scale).astype(dtype), name="scaled")

    return compute(ctx, "dft", body, x, shape, n, used, bins)


def min_dim(a: Dim, b: Dim) -> Dim:
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else simplify(te.min(a, b))


def _stft(ctx: Context) -> Expr:
    """signal [B, L, 1 or 2], step, window, frame length: [B, frames, bins, 2]."""
    batch, length, parts = ctx.shape()
    (step,) = ctx.extents(1)
    frame = ctx.extents(3)[0] if ctx.has(3) else ctx.shape(2)[0] if ctx.has(2) else length
    onesided, dtype = bool(ctx.attr("onesided", 1)), ctx.dtype()
    frames = (length - frame) // (step if isinstance(step, int) else te.max(step, 1)) + 1  # no division by 0 of data
    if not isinstance(frames, int):
        frames = te.max(frames, 0)
    shape = [batch, simplify(frames), simplify(frame // 2 + 1) if onesided else frame, 2]
    windows = [ctx.x(2)] if ctx.has(2) else []

    def body(x: Any, windows: list[Any], out: list[Any], n: Any, step: Any) -> Any:
        cosine, sine = _turns(n)
        r = te.reduce_axis((0, n), "r")

        def element(b: Any, f: Any, k: Any, part: Any) -> Any:
            def read(c: int) -> Any:
                value = x(b, f * step + r, te.const(c, "int64")).astype("float64")
                if not windows:
                    return value
                return value * windows[0](te.min(r, windows[0].shape[0] - 1)).astype("float64")

            turn = te.floormod(k * r, n)
            c, s, real = cosine(turn), -sine(turn), read(0)
            imaginary = read(1) if int(parts) == 2 else te.const(0, "float64")
            return te.sum(select(part == 0, real * c - imaginary * s, real * s + imaginary * c), axis=r)

        total = te.compute(out, element, name="stft")
        return te.compute(out, lambda *i: total(*i).astype(dtype), name="rounded")

    return compute(ctx, "stft", body, ctx.x(), windows, shape, frame, step)


def _mel_weight_matrix(ctx: Context) -> Expr:
    """[dft_length / 2 + 1, bins]: triangles that are equally wide on the mel scale."""
    (bins,), (length,) = ctx.extents(0), ctx.extents(1)
    dtype = onnx_dtype(ctx.attr("output_datatype", 1))

    def f64(value: float) -> Any:
        return te.const(value, "float64")

    def body(rate: Any, low: Any, high: Any, bins: Any, length: Any) -> Any:
        def mel(hertz: Any) -> Any:
            return f64(2595.0) * te.log10(f64(1.0) + hertz() / f64(700.0))

        def edge(i: Any) -> Any:
            step = (mel(high) - mel(low)) / (_wide(bins) + f64(2.0))
            hertz = f64(700.0) * (te.power(f64(10.0), (_wide(i) * step + mel(low)) / f64(2595.0)) - f64(1.0))
            return te.floor((_wide(length) + f64(1.0)) * hertz / rate())

        edges = te.compute((bins + 2,), edge, name="edges")

        def weight(j: Any, i: Any) -> Any:
            at, left, centre, right = _wide(j), edges(i), edges(i + 1), edges(i + 2)
            rising = select(centre > left, (at - left) / (centre - left), f64(1.0))
            falling = (right - at) / (right - centre)
            value = select(tirx.all(at >= centre, at < right), falling, rising)
            inside = tirx.all(at >= left, tirx.any(at <= centre, at < right))
            return select(inside, value, f64(0.0)).astype(dtype)

        return te.compute((te.floordiv(length, 2) + 1, bins), weight, name="mel")

    hertz = [cast(ctx, reshape(ctx, ctx.x(i), ()), "float64") for i in (2, 3, 4)]
    return compute(ctx, "mel", body, *hertz, bins, length)


RULES: dict[str, Rule] = {"DFT": _dft, "STFT": _stft, "MelWeightMatrix": _mel_weight_matrix}
