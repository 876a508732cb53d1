"""Operators that put elements back where a window took them from: MaxUnpool and Col2Im."""

from __future__ import annotations

from functools import reduce
from typing import Any

from llmc.graph import Dim
from llmc.ops.context import Context, Rule
from llmc.ops.tensor import compute, index_of, loops, product, reshape, simplify
from llmc.tvm_shim import Expr, T, te, tirx


def _max_unpool(ctx: Context) -> Expr:
    """X at the flat places that MaxPool's second output told, zeros elsewhere. An `output_shape` that is larger than
    the window says has more zeros behind."""
    shape, size = ctx.shape(), [int(k) for k in ctx.attr("kernel_shape")]
    rank = len(size)
    strides = [int(s) for s in ctx.attr("strides") or [1] * rank]
    pads = [int(p) for p in ctx.attr("pads") or [0] * (2 * rank)]
    inner: list[Dim] = [
        simplify((d - 1) * s - pads[k] - pads[k + rank] + size[k])
        for k, (d, s) in enumerate(zip(shape[2:], strides, strict=True))
    ]
    inner = [*shape[:2], *inner]
    total, count, dtype = product(inner), product(shape), ctx.dtype()

    def nest(x: Any, places: Any, y: Any, count: Any, total: Any) -> None:
        with T.serial(0, total) as i:
            y[i] = te.const(0, dtype)
        with T.serial(0, count) as i:
            y[index_of(places[i], total)] = x[i]

    (flat,) = loops(ctx, "max_unpool", nest, [ctx.x(0), ctx.x(1)], [([total], dtype)], [count, total])
    y = reshape(ctx, flat, inner)
    if not ctx.has(2):
        return y

    def body(t: Any, out: list[Any], sizes: list[Any]) -> Any:
        def element(*i: Any) -> Any:
            inside = tirx.all(*(a < d for a, d in zip(i, sizes, strict=True)))
            return te.if_then_else(inside, t(*i), te.const(0, dtype))

        return te.compute(out, element, name="larger")

    return compute(ctx, "larger", body, y, ctx.extents(2), list(inner))


def _col2im(ctx: Context) -> Expr:
    """[N, C * taps, blocks] to [N, C, image...]: the sum of all blocks at the places that they were taken from."""
    image, size = ctx.extents(1), ctx.extents(2)
    rank, (n, rows, columns) = len(size), ctx.shape()
    strides = [int(s) for s in ctx.attr("strides") or [1] * rank]
    dilations = [int(d) for d in ctx.attr("dilations") or [1] * rank]
    pads = [int(p) for p in ctx.attr("pads") or [0] * (2 * rank)]
    taps = product(size)
    blocks = [
        simplify((d + pads[k] + pads[k + rank] - (size[k] - 1) * dilations[k] - 1) // strides[k] + 1)
        for k, d in enumerate(image)
    ]
    if ctx.value(1) is not None and ctx.value(2) is not None:
        ctx.unify(columns, product(blocks))
    dtype = ctx.dtype()

    def body(x: Any, out: list[Any], blocks: list[Any], size: list[Any]) -> Any:
        r = [te.reduce_axis((0, k), f"r{i}") for i, k in enumerate(size)]
        tap = reduce(lambda flat, k: flat * size[k] + r[k], range(rank), te.const(0, "int64"))

        def element(b: Any, c: Any, *i: Any) -> Any:
            reach = [i[k] + pads[k] - r[k] * dilations[k] for k in range(rank)]
            at = [te.floordiv(a, s) for a, s in zip(reach, strides, strict=True)]
            tests = [te.floormod(a, s) == 0 for a, s in zip(reach, strides, strict=True) if s > 1]
            tests += [t for a, d in zip(at, blocks, strict=True) for t in (a >= 0, a < d)]
            block = reduce(lambda flat, k: flat * blocks[k] + at[k], range(rank), te.const(0, "int64"))
            block = te.min(block, x.shape[2] - 1)  # data may ask for more blocks than there are
            value = te.if_then_else(tirx.all(*tests), x(b, c * product(size) + tap, block), te.const(0, dtype))
            return te.sum(value, axis=r)

        return te.compute(out, element, name="col2im")

    channels = rows // taps if isinstance(taps, int) else te.floordiv(rows, te.max(taps, 1))
    return compute(ctx, "col2im", body, ctx.x(), [n, simplify(channels), *image], blocks, size)


RULES: dict[str, Rule] = {"MaxUnpool": _max_unpool, "Col2Im": _col2im}
