"""Discrete Fourier transforms, and the mel filters: sums over a table of sines, in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from llmc.graph import Dim
from llmc.ops.context import Context, Rule
from llmc.ops.elementwise import onnx_dtype
from llmc.ops.scalar import select
from llmc.ops.tensor import compute, simplify
from llmc.tvm_shim import Expr, te, tirx


def _turns(n: Any) -> tuple[Any, Any]:
    """Tables [n] of the cosine and the sine of i / n turns."""

    def angle(i: Any) -> Any:
        return i.astype("float64") * te.const(2 * math.pi, "float64") / _wide(n)

    cosine = te.compute((n,), lambda i: te.cos(angle(i)), name="cosine")
    return cosine, te.compute((n,), lambda i: te.sin(angle(i)), name="sine")


def _wide(n: Any) -> Any:
    return te.const(n, "float64") if isinstance(n, int) else n.astype("float64")


def _length(ctx: Context, i: int, default: Dim) -> Dim:
    return ctx.dims(i)[0] if ctx.has(i) else default


def _dft(ctx: Context) -> Expr:
    """[..., L, ..., 1 or 2] to [..., n, ..., 2], or ..., 1] where real numbers come back; the last axis holds real and
    imaginary parts. The axis is an attribute before opset 20, then an input."""
    rank = ctx.rank()
    given = ctx.ints(2)[0] if ctx.has(2) else int(ctx.attr("axis", 1 if ctx.node.version < 20 else -2))
    axis, parts = ctx.axis(given, rank), int(ctx.shape()[-1])
    inverse, onesided = bool(ctx.attr("inverse", 0)), bool(ctx.attr("onesided", 0))
    have = ctx.shape()[axis]
    n = _length(ctx, 1, simplify(2 * (have - 1)) if inverse and onesided else have)
    bins = simplify(n // 2 + 1)
    real = inverse and onesided  # the input's other half is the conjugate of the one that is there
    used = min_dim(have, bins if real else n)
    shape = list(ctx.shape())
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

    return compute(ctx, "dft", body, ctx.x(), shape, n, used, bins)


def min_dim(a: Dim, b: Dim) -> Dim:
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else simplify(te.min(a, b))


def _stft(ctx: Context) -> Expr:
    """signal [B, L, 1 or 2], step, window, frame length: [B, frames, bins, 2]."""
    batch, length, parts = ctx.shape()
    (step,) = ctx.ints(1)
    frame = _length(ctx, 3, ctx.shape(2)[0] if ctx.has(2) else length)
    onesided, dtype = bool(ctx.attr("onesided", 1)), ctx.dtype()
    shape = [batch, simplify((length - frame) // step + 1), simplify(frame // 2 + 1) if onesided else frame, 2]
    windows = [ctx.x(2)] if ctx.has(2) else []

    def body(x: Any, windows: list[Any], out: list[Any], n: Any) -> Any:
        cosine, sine = _turns(n)
        r = te.reduce_axis((0, n), "r")

        def element(b: Any, f: Any, k: Any, part: Any) -> Any:
            def read(c: int) -> Any:
                value = x(b, f * step + r, te.const(c, "int64")).astype("float64")
                return value * windows[0](r).astype("float64") if windows else value

            turn = te.floormod(k * r, n)
            c, s, real = cosine(turn), -sine(turn), read(0)
            imaginary = read(1) if int(parts) == 2 else te.const(0, "float64")
            return te.sum(select(part == 0, real * c - imaginary * s, real * s + imaginary * c), axis=r)

        total = te.compute(out, element, name="stft")
        return te.compute(out, lambda *i: total(*i).astype(dtype), name="rounded")

    return compute(ctx, "stft", body, ctx.x(), windows, shape, frame)


def _mel_weight_matrix(ctx: Context) -> Expr:
    """[dft_length / 2 + 1, bins]: triangles that are equally wide on the mel scale. All inputs are constants."""
    values = [ctx.const(i) for i in range(5)]
    if any(v is None for v in values):
        ctx.fail("its inputs must be constant")
    bins, length, rate, low, high = (v.reshape(-1)[0].item() for v in values if v is not None)
    first, last = (2595 * math.log10(1 + hertz / 700) for hertz in (low, high))
    mels = np.arange(bins + 2) * ((last - first) / (bins + 2)) + first
    edges = ((length + 1) * (700 * (10 ** (mels / 2595) - 1)) // rate).astype(np.int64)
    weights = np.zeros((length // 2 + 1, bins))
    for i in range(bins):
        left, centre, right = edges[i : i + 3]
        rising, falling = np.arange(left, centre + 1), np.arange(centre, right)
        weights[rising, i] = (rising - left) / (centre - left) if centre > left else 1
        if right > centre:
            weights[falling, i] = (right - falling) / (right - centre)
    dtype = onnx_dtype(ctx.attr("output_datatype", 1))
    return ctx.literal(weights.astype(dtype), dtype)


RULES: dict[str, Rule] = {"DFT": _dft, "STFT": _stft, "MelWeightMatrix": _mel_weight_matrix}
