"""Convolutions and pooling over any number of spatial dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from llmc.graph import Dim
from llmc.ops.context import Context, Rule
from llmc.ops.matmul import HALF, centred
from llmc.ops.quant import requantize
from llmc.ops.scalar import select
from llmc.ops.tensor import cast, compute, elementwise, product, reshape, shape_of, simplify
from llmc.tvm_shim import Expr, relax, te, tirx

op = relax.op


@dataclass(frozen=True)
class Window:
    """Where a kernel of `size` looks at: one entry for each spatial dimension."""

    size: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[Dim, ...]
    after: tuple[Dim, ...]

    @property
    def spans(self) -> tuple[int, ...]:
        """Input elements from a kernel's first tap to its last."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.size, self.dilations, strict=True))

    def out(self, dims: Sequence[Dim], ceil: bool = False) -> list[Dim]:
        """Output extents; with `ceil` a last window may hang over the end, if it starts inside."""
        result: list[Dim] = []
        for d, k, s, b, a in zip(dims, self.spans, self.strides, self.before, self.after, strict=True):
            room = d + b + a - k
            if not ceil:
                result.append(simplify(room // s + 1))
                continue
            count, inside = (room + s - 1) // s + 1, (d + b - 1) // s + 1
            if isinstance(a, int) and a + s <= k:  # no window can start in the padding behind
                result.append(simplify(count))
            elif isinstance(count, int) and isinstance(inside, int):
                result.append(min(count, inside))
            else:
                result.append(simplify(tirx.min(count, inside)))
        return result

    def places(self, i: Sequence[Any], taps: Sequence[Any]) -> list[Any]:
        """The input index that each output index and tap meet at; outside of the input where that is padding."""
        parts = zip(i, self.strides, taps, self.dilations, self.before, strict=True)
        return [o * s + t * d - b for o, s, t, d, b in parts]


def window(ctx: Context, size: Sequence[int], dims: Sequence[Dim]) -> Window:
    """A node's strides, dilations and padding; auto_pad SAME_* pads so that out = ceil(in / stride)."""
    n = len(size)
    strides = tuple(int(s) for s in ctx.attr("strides") or [1] * n)
    dilations = tuple(int(d) for d in ctx.attr("dilations") or [1] * n)
    mode = ctx.attr("auto_pad", "NOTSET")
    mode = mode.decode() if isinstance(mode, bytes) else mode
    if mode.startswith("SAME"):
        before, after = [], []
        for d, k, s, step in zip(dims, size, strides, dilations, strict=True):
            need: Dim = simplify(((d + s - 1) // s - 1) * s + (k - 1) * step + 1 - d)
            need = max(need, 0) if isinstance(need, int) else need
            less = simplify(need // 2)
            more = simplify(need - less)
            before.append(less if mode == "SAME_UPPER" else more)
            after.append(more if mode == "SAME_UPPER" else less)
        return Window(tuple(size), strides, dilations, tuple(before), tuple(after))
    pads = [0] * (2 * n) if mode == "VALID" else [int(p) for p in ctx.attr("pads") or [0] * (2 * n)]
    return Window(tuple(size), strides, dilations, tuple(pads[:n]), tuple(pads[n:]))


def _inside(at: Sequence[Any], dims: Sequence[Any], pads: Sequence[Dim]) -> Any:
    """Is a place inside of the input? Dimensions without padding need no test."""
    tests = [c for a, d, p in zip(at, dims, pads, strict=True) if p is not None for c in (a >= 0, a < d)]
    return tirx.all(*tests) if len(tests) > 1 else tests[0]


# -- convolution ------------------------------------------------------------------------------------------------
def convolve(ctx: Context, x: Expr, w: Expr, groups: int, dtype: str) -> Expr:
    """x [N, C, ...] with w [M, C / groups, kernel...] -> [N, M, ...], summed in `dtype`."""
    shape, (m, channels, *size) = shape_of(x), shape_of(w)
    ctx.unify(shape[1], simplify(channels * groups))
    win = window(ctx, [int(k) for k in size], shape[2:])
    each = simplify(m // groups)

    def body(x: Any, w: Any, padded: list[Any], out: list[Any], dims: list[Any], before: list[Any]) -> Any:
        zero = te.const(0, x.dtype)

        def pad(n: Any, c: Any, *i: Any) -> Any:
            at = [a - b for a, b in zip(i, before, strict=True)]
            return te.if_then_else(_inside(at, dims, before), x(n, c, *at), zero)

        source = te.compute(padded, pad, name="pad") if any(_nonzero(p) for p in (*win.before, *win.after)) else x
        r = [te.reduce_axis((0, d), f"r{k}") for k, d in enumerate([channels, *size])]

        def element(n: Any, o: Any, *i: Any) -> Any:
            c = te.floordiv(o, each) * channels + r[0] if groups > 1 else r[0]
            at = [a * s + t * d for a, s, t, d in zip(i, win.strides, r[1:], win.dilations, strict=True)]
            return te.sum(source(n, c, *at).astype(dtype) * w(o, r[0], *r[1:]).astype(dtype), axis=r)

        return te.compute(out, element, name="conv")

    padded = [simplify(d + b + a) for d, b, a in zip(shape[2:], win.before, win.after, strict=True)]
    out = [shape[0], m, *win.out(shape[2:])]
    return compute(ctx, "conv", body, x, w, [*shape[:2], *padded], out, list(shape[2:]), list(win.before))


def _nonzero(pad: Dim) -> bool:
    return not (isinstance(pad, int) and pad == 0)


def add_channels(ctx: Context, y: Expr, i: int) -> Expr:
    """y [N, M, ...] + input `i` [M], where there is one."""
    if not ctx.has(i):
        return y
    return ctx.emit(op.add(y, reshape(ctx, ctx.x(i), [*ctx.shape(i), *([1] * (len(shape_of(y)) - 2))])))


def _conv(ctx: Context) -> Expr:
    dtype = ctx.dtype()
    y = convolve(ctx, ctx.x(0), ctx.x(1), int(ctx.attr("group", 1)), "float32" if dtype in HALF else dtype)
    return add_channels(ctx, cast(ctx, y, dtype), 2)


def _zero_point(ctx: Context, i: int, rank: int) -> Expr | None:
    """Input `i`, a zero point: one number, or one for each output channel of the weights."""
    if not ctx.has(i):
        return None
    return reshape(
        ctx, ctx.x(i), () if ctx.rank(i) == 0 or ctx.shape(i)[0] == 1 else [*ctx.shape(i), *([1] * (rank - 1))]
    )


def _integer_conv(ctx: Context, x: int, w: int, zero_x: int, zero_w: int) -> Expr:
    """int32 convolution of x - zero_x, whose padding is therefore 0, with w - zero_w."""
    rank = ctx.rank(x)
    a = centred(ctx, ctx.x(x), _zero_point(ctx, zero_x, rank), True)
    b = centred(ctx, ctx.x(w), _zero_point(ctx, zero_w, rank), True)
    return convolve(ctx, a, b, int(ctx.attr("group", 1)), "int32")


def _qlinear_conv(ctx: Context) -> Expr:
    """x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero, int32 bias."""
    acc = add_channels(ctx, _integer_conv(ctx, 0, 3, 2, 5), 8)
    scales = reshape(ctx, ctx.x(4), () if product(ctx.shape(4)) == 1 else [*ctx.shape(4), *([1] * (ctx.rank() - 2))])
    one, out = reshape(ctx, ctx.x(1), ()), reshape(ctx, ctx.x(6), ())
    factor = elementwise(ctx, "factor", lambda a, b, y: a * b / y, scales, one, out)
    return requantize(ctx, acc, factor, reshape(ctx, ctx.x(7), ()), ctx.dtype(7))


def _conv_transpose(ctx: Context) -> Expr:
    """x [N, C, ...] with w [C, M / groups, kernel...]: each input element adds its kernel to the output."""
    (n, c, *dims), (_, each, *size) = ctx.shape(0), ctx.shape(1)
    groups, rank = int(ctx.attr("group", 1)), len(size)
    extra = [int(p) for p in ctx.attr("output_padding") or [0] * rank]
    strides = [int(s) for s in ctx.attr("strides") or [1] * rank]
    dilations = [int(d) for d in ctx.attr("dilations") or [1] * rank]
    pads: list[Dim] = [int(p) for p in ctx.attr("pads") or [0] * (2 * rank)]
    mode = ctx.attr("auto_pad", "NOTSET")
    mode = mode.decode() if isinstance(mode, bytes) else mode
    spread = [
        simplify((d - 1) * s + (int(k) - 1) * step + 1 + e)
        for d, s, k, step, e in zip(dims, strides, size, dilations, extra, strict=True)
    ]
    wanted = ctx.attr("output_shape")
    if wanted or mode.startswith("SAME"):
        target = [int(t) for t in wanted] if wanted else [d * s for d, s in zip(dims, strides, strict=True)]
        total = [simplify(a - t) for a, t in zip(spread, target, strict=True)]
        less = [simplify(t // 2) for t in total]
        more = [simplify(t - v) for t, v in zip(total, less, strict=True)]
        pads = [*less, *more] if mode == "SAME_UPPER" else [*more, *less]
    if mode == "VALID":
        pads = [0] * (2 * rank)
    out = [simplify(s - a - b) for s, a, b in zip(spread, pads[:rank], pads[rank:], strict=True)]
    inputs, m = simplify(c // groups), simplify(each * groups)
    dtype = ctx.dtype()

    def body(x: Any, w: Any, out: list[Any], dims: list[Any], before: list[Any]) -> Any:
        r = [te.reduce_axis((0, d), f"r{k}") for k, d in enumerate([inputs, *size])]

        def element(b: Any, o: Any, *i: Any) -> Any:
            first = te.floordiv(o, each) * inputs
            reach = [a + p - t * d for a, p, t, d in zip(i, before, r[1:], dilations, strict=True)]
            at = [te.floordiv(a, s) for a, s in zip(reach, strides, strict=True)]
            tests = [te.floormod(a, s) == 0 for a, s in zip(reach, strides, strict=True) if s > 1]
            tests += [t for a, d in zip(at, dims, strict=True) for t in (a >= 0, a < d)]
            value = te.if_then_else(tirx.all(*tests), x(b, first + r[0], *at), te.const(0, dtype))
            return te.sum(value * w(first + r[0], te.floormod(o, each), *r[1:]), axis=r)

        return te.compute(out, element, name="conv_transpose")

    y = compute(ctx, "conv_transpose", body, ctx.x(0), ctx.x(1), [n, m, *out], list(dims), pads[:rank])
    return add_channels(ctx, y, 2)


# -- pooling ----------------------------------------------------------------------------------------------------
def _pool(ctx: Context, name: str, reducer: Any, start: float, value: Any) -> tuple[Expr, Window]:
    """Reduce `value` of the elements in each window of [N, C, ...]; padding counts as `start`."""
    n, c, *dims = ctx.shape()
    win = window(ctx, [int(k) for k in ctx.attr("kernel_shape")], dims)
    dtype = ctx.dtype()

    def body(x: Any, out: list[Any], dims: list[Any]) -> Any:
        r = [te.reduce_axis((0, k), f"r{j}") for j, k in enumerate(win.size)]

        def element(n: Any, c: Any, *i: Any) -> Any:
            at = win.places(i, r)
            inside = _inside(at, dims, win.before)
            return reducer(te.if_then_else(inside, value(x(n, c, *at)), te.const(start, dtype)), axis=r)

        return te.compute(out, element, name=name)

    out = [n, c, *win.out(dims, bool(ctx.attr("ceil_mode", 0)))]
    return compute(ctx, name, body, ctx.x(), out, list(dims)), win


def _max_pool(ctx: Context) -> tuple[Expr | None, ...]:
    """The maximum of each window, and its flat place in the input, where that is asked for."""
    dtype = ctx.dtype()
    lowest = {"int8": -128, "uint8": 0}.get(dtype, -3.4e38 if dtype == "float32" else -6.5e4)
    y, win = _pool(ctx, "max_pool", te.max, lowest, lambda v: v)
    if len(ctx.node.outputs) < 2 or not ctx.node.outputs[1]:
        return y, None
    dims, by_column = ctx.shape()[2:], bool(ctx.attr("storage_order", 0))

    def body(x: Any, top: Any, out: list[Any], channels: Any, dims: list[Any]) -> Any:
        r = [te.reduce_axis((0, k), f"r{j}") for j, k in enumerate(win.size)]
        size = reduce(lambda a, b: a * b, dims)

        def element(n: Any, c: Any, *i: Any) -> Any:
            at = win.places(i, r)
            order = list(zip(at, dims, strict=True))
            flat = reduce(lambda f, ad: f * ad[1] + ad[0], order[::-1] if by_column else order, te.const(0, "int64"))
            hit = te.if_then_else(_inside(at, dims, win.before), x(n, c, *at) == top(n, c, *i), False)
            return te.min(select(hit, (n * channels + c) * size + flat, te.max_value("int64")), axis=r)

        return te.compute(out, element, name="max_place")

    return y, compute(ctx, "max_place", body, ctx.x(), y, list(shape_of(y)), ctx.shape()[1], list(dims))


def _average_pool(ctx: Context) -> Expr:
    """The mean of each window; padding counts as zeros, or not at all."""
    total, win = _pool(ctx, "sum_pool", te.sum, 0, lambda v: v)
    dims, dtype = ctx.shape()[2:], ctx.dtype()
    padded = bool(ctx.attr("count_include_pad", 0))

    def body(t: Any, out: list[Any], dims: list[Any]) -> Any:
        def count(o: Any, j: int) -> Any:
            """Taps of the window at output index `o` that lie inside (of the padded input)."""
            step, first = win.dilations[j], o * win.strides[j] - win.before[j]
            low, high = (-win.before[j], dims[j] + win.after[j]) if padded else (0, dims[j])
            skipped = te.max(te.floordiv(low - first + step - 1, step), te.const(0, "int64"))
            reached = te.min(te.floordiv(high - first + step - 1, step), te.const(win.size[j], "int64"))
            return reached - skipped

        def element(n: Any, c: Any, *i: Any) -> Any:
            taps = te.const(1, "int64")
            for j, o in enumerate(i):
                taps = taps * count(o, j)
            return t(n, c, *i) / taps.astype(dtype)

        return te.compute(out, element, name="average_pool")

    return compute(ctx, "average_pool", body, total, list(shape_of(total)), list(dims))


def _lp_pool(ctx: Context) -> Expr:
    p, dtype = float(ctx.attr("p", 2)), ctx.dtype()
    power = te.const(p, dtype)
    total, _ = _pool(ctx, "lp_pool", te.sum, 0, lambda v: te.power(te.abs(v), power))
    return elementwise(ctx, "lp_root", lambda v: te.power(v, te.const(1 / p, dtype)), total)


def _global(f: Any) -> Rule:
    return lambda ctx: f(ctx.x(), list(range(2, ctx.rank())), True)


def _global_lp(ctx: Context) -> Expr:
    p, dtype = float(ctx.attr("p", 2)), ctx.dtype()
    power = te.const(p, dtype)
    x = elementwise(ctx, "power", lambda v: te.power(te.abs(v), power), ctx.x())
    total = ctx.emit(op.sum(x, list(range(2, ctx.rank())), True))
    return elementwise(ctx, "lp_root", lambda v: te.power(v, te.const(1 / p, dtype)), total)


RULES: dict[str, Rule] = {
    "Conv": _conv,
    "ConvInteger": lambda ctx: _integer_conv(ctx, 0, 1, 2, 3),
    "QLinearConv": _qlinear_conv,
    "ConvTranspose": _conv_transpose,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "LpPool": _lp_pool,
    "GlobalAveragePool": _global(op.mean),
    "GlobalMaxPool": _global(op.max),
    "GlobalLpPool": _global_lp,
}
