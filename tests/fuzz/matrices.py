"""Steps that multiply and sum: matrix products, convolutions, pooling."""

from __future__ import annotations

import numpy as np

from tests.fuzz.program import MS, Dim, Value
from tests.fuzz.sketch import ULPS, UNIT, Sketch, errors, size_of

HALF_SUM = 16  # products that half precision may sum


def product_error(a: Value, b: Value, count: int) -> np.ndarray:
    """Of a sum of `count` products, in any order."""
    carried = count * (errors(a) * size_of(b) + errors(b) * size_of(a))
    return carried + count * count * UNIT[a.dtype] * size_of(a) * size_of(b)


def product(s: Sketch, op: str, a: Value, b: Value, shape: list[Dim], count: int, **attrs: object) -> Value:
    most = count * size_of(a) * size_of(b)
    return s.smooth(op, [a, b], shape, -most, most, product_error(a, b, count), **attrs)


def weight(s: Sketch, dtype: str, shape: list[int], count: int) -> Value:
    """An initializer, smaller the more of it are summed."""
    return s.constant(dtype, shape, -1 / count**0.5, 1 / count**0.5)


def matmul(s: Sketch) -> None:
    """With a weight, which makes it a linear layer; with another value, perhaps of other rank; of a vector."""
    x = s.bounded(s.pick(rank=1), 8)
    k = x.shape[-1]
    count = s.most([k])
    if x.dtype == "float16" and count > HALF_SUM:
        return
    how = s.choice(["weight", "weight", "weight", "batch", "vector", "left"])
    if how == "weight" and isinstance(k, int):
        n = s.choice([1, 2, 5, 8, 16, 33])
        y = product(s, "MatMul", x, weight(s, x.dtype, [k, n], count), [*x.shape[:-1], n], count)
        if s.chance(50):
            bias = s.constant(x.dtype, (n,), -1, 1)
            pair = [y, bias] if s.chance(70) else [bias, y]
            s.smooth("Add", pair, y.shape, y.low - 1, y.high + 1, errors(y))
    elif how == "batch" and len(x.shape) >= 2:
        n = s.choice([1, 3, 8])
        batch = [1 if s.chance(20) else d for d in x.shape[:-2]]
        other = s.operand(x.dtype, [*batch[s.integer(0, len(batch)) :], k, n], -1, 1)
        product(s, "MatMul", x, other, [*x.shape[:-1], n], count)
    elif how == "left" and len(x.shape) >= 2:
        inner = x.shape[-2]
        if x.dtype == "float16" and s.most([inner]) > HALF_SUM:
            return
        m = s.choice([1, 3, 4])
        other = s.operand(x.dtype, [m, inner], -1, 1)
        product(s, "MatMul", other, x, [*x.shape[:-2], m, k], s.most([inner]))
    elif how == "vector":
        product(s, "MatMul", x, s.operand(x.dtype, [k], -1, 1), list(x.shape[:-1]), count)


def gemm(s: Sketch) -> None:
    x = s.bounded(s.pick(("float32",), 2, lambda v: len(v.shape) == 2), 8)
    if len(x.shape) != 2:
        return
    trans_a, trans_b = int(s.chance(25)), s.integer(0, 1)
    m, k = x.shape[::-1] if trans_a else x.shape
    n, count = s.choice([1, 4, 8, 17]), s.most([k])
    w = s.operand("float32", [n, k] if trans_b else [k, n], -1 / count**0.5, 1 / count**0.5)
    attrs = {"transA": trans_a, "transB": trans_b}
    alpha = s.choice([1.0, 1.0, 0.5])
    beta = s.choice([1.0, 1.0, 0.5])
    bias = [s.operand("float32", s.choice([[n], [1, n], [m, n], [1], [m, 1]]), -1, 1)] if s.chance(60) else []
    most = count * size_of(x) * size_of(w) + 1
    error = product_error(x, w, count)
    s.smooth("Gemm", [x, w, *bias], [m, n], -most, most, error, alpha=alpha, beta=beta, **attrs)


def fused_matmul(s: Sketch) -> None:
    x = s.bounded(s.pick(("float32",), 2), 8)
    count = s.most([x.shape[-1]])
    other = s.operand("float32", [s.choice([2, 5]), x.shape[-1]], -1, 1)
    shape = [*x.shape[:-1], other.shape[0]]
    most = count * size_of(x)
    error = product_error(x, other, count)
    s.smooth("FusedMatMul", [x, other], shape, -most, most, error, domain=MS, transB=1, alpha=0.5)


def image(s: Sketch) -> Value:
    """Something [N, C, places...]."""

    def fits(v: Value) -> bool:
        return len(v.shape) in (3, 4) and all(isinstance(d, int) for d in v.shape[1:])

    x = s.pick(("float32",), 3, fits)
    return s.bounded(x, 8)


def conv(s: Sketch) -> None:
    x = image(s)
    channels, places = x.shape[1], [d for d in x.shape[2:] if isinstance(d, int)]
    assert isinstance(channels, int)
    group = s.choice([g for g in (1, 1, 2, 4, channels) if channels % g == 0])
    out = group * s.choice([1, 2, 3])
    kernel = [s.integer(1, min(3, d)) for d in places]
    if s.chance(25):
        _conv_transpose(s, x, channels, places, kernel)
        return
    stride = [s.choice([1, 1, 2]) for _ in places]
    dilation = [s.choice([1, 1, 2]) for _ in places]
    attrs = {"kernel_shape": kernel, "strides": stride, "dilations": dilation, "group": group}
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    if s.chance(20):
        attrs["auto_pad"] = s.choice(["SAME_UPPER", "SAME_LOWER"])
        sizes = [-(-d // t) for d, t in zip(places, stride, strict=True)]
        if max(dilation) > 1:  # the references differ in what such padding is
            attrs["dilations"] = [1] * len(places)
    else:
        pads = [s.integer(0, 2) for _ in range(2 * len(places))]
        ends = zip(pads[: len(places)], pads[len(places) :], strict=True)
        sizes = [(d + a + b - r) // t + 1 for d, (a, b), r, t in zip(places, ends, reach, stride, strict=True)]
        attrs["pads"] = pads
        if min(sizes) < 1 or any(d + sum(pads) < r for d, r in zip(places, reach, strict=True)):
            return
    count = channels // group * int(np.prod(kernel))
    w = weight(s, "float32", [out, channels // group, *kernel], count)
    bias = [s.constant("float32", (out,), -1, 1)] if s.chance(60) else []
    most = count * size_of(x) * size_of(w) + 1
    s.smooth("Conv", [x, w, *bias], [x.shape[0], out, *sizes], -most, most, product_error(x, w, count), **attrs)


def _conv_transpose(s: Sketch, x: Value, channels: int, places: list[int], kernel: list[int]) -> None:
    stride = [s.choice([1, 2]) for _ in places]
    out = s.choice([1, 2, 3])
    w = weight(s, "float32", [channels, out, *kernel], channels)
    sizes = [(d - 1) * t + k for d, t, k in zip(places, stride, kernel, strict=True)]
    count = channels * int(np.prod(kernel))
    most = count * size_of(x) * size_of(w)
    error = product_error(x, w, count)
    s.smooth(
        "ConvTranspose", [x, w], [x.shape[0], out, *sizes], -most, most, error, kernel_shape=kernel, strides=stride
    )


def pool(s: Sketch) -> None:
    x = image(s)
    places = [d for d in x.shape[2:] if isinstance(d, int)]
    op = s.choice(["MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"])
    ones: list[Dim] = [1] * len(places)
    if op.startswith("Global"):
        count = int(np.prod(places))
        own = ULPS * UNIT["float32"] * size_of(x) + UNIT["float32"] * count * size_of(x) if op[6] == "A" else 0.0
        s.node(op, [x], x.dtype, [*x.shape[:2], *ones], x.low, x.high, errors(x) + own)
        return
    kernel = [s.integer(1, min(3, d)) for d in places]
    stride = [s.choice([1, 2]) for _ in places]
    pads = [s.integer(0, k - 1) for k in kernel * 2]
    rooms = [d + pads[i] + pads[len(places) + i] - kernel[i] for i, d in enumerate(places)]
    sizes = [room // t + 1 for room, t in zip(rooms, stride, strict=True)]
    wider = [-(-room // t) + 1 for room, t in zip(rooms, stride, strict=True)]
    # A window that would begin in the padding at the end is left out; not all of onnxruntime knows that.
    inside = all((w - 1) * t < d + p for w, t, d, p in zip(wider, stride, places, pads, strict=False))
    ceil = int(inside and s.chance(50))
    sizes = wider if ceil else sizes
    attrs = {"kernel_shape": kernel, "strides": stride, "pads": pads, "ceil_mode": ceil}
    if op == "AveragePool":
        attrs["count_include_pad"] = s.integer(0, 1)
    low, high = (min(x.low, 0), max(x.high, 0)) if op == "AveragePool" else (x.low, x.high)
    own = 0.0 if op == "MaxPool" else 2 * ULPS * UNIT["float32"] * size_of(x)
    s.node(op, [x], x.dtype, [*x.shape[:2], *sizes], low, high, errors(x) + own, **attrs)


def einsum(s: Sketch) -> None:
    x = s.bounded(s.pick(("float32",), 2, lambda v: len(v.shape) == 3), 8)
    if len(x.shape) != 3:
        return
    b, m, k = x.shape
    other = s.operand("float32", [b, s.choice([2, 5]), k], -1, 1)
    count = s.most([k])
    equation, shape = s.choice([("bmk,bnk->bmn", [b, m, other.shape[1]]), ("bmk,bnk->bnm", [b, other.shape[1], m])])
    product(s, "Einsum", x, other, shape, count, equation=equation)


STEPS = [matmul, matmul, matmul, gemm, gemm, fused_matmul, conv, conv, pool, pool, einsum]
