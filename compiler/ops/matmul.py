"""Matrix products of all ranks and types, and Einstein sums."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

from llmc.graph import Dim
from llmc.ops.context import Context, Rule
from llmc.ops.scalar import select
from llmc.ops.tensor import (
    broadcast_shape,
    cast,
    compute,
    dtype_of,
    loops,
    permute,
    product,
    reshape,
    shape_of,
    simplify,
)
from llmc.tvm_shim import Expr, T, relax, te

op = relax.op
HALF = ("float16", "bfloat16")


def matmul(ctx: Context, a: Expr, b: Expr, out_dtype: str | None = None) -> Expr:
    """numpy's matmul: [..., M, K] x [..., K, N] -> [..., M, N]; vectors are rows on the left, columns on the right.
    Products of half precision are summed in float32."""
    sa, sb = shape_of(a), shape_of(b)
    if not sa or not sb:
        ctx.fail("a matrix product needs tensors of rank 1 or more")
    ctx.unify(sa[-1], sb[-2] if len(sb) > 1 else sb[0])
    broadcast_shape(ctx, sa[:-2], sb[:-2])
    dtype = dtype_of(a)
    if out_dtype is None and dtype in HALF:
        return cast(ctx, ctx.emit(op.matmul(a, b, "float32")), dtype)
    return ctx.emit(op.matmul(a, b, out_dtype))


def transpose_last(ctx: Context, x: Expr) -> Expr:
    rank = len(shape_of(x))
    return permute(ctx, x, [*range(rank - 2), rank - 1, rank - 2])


def scale(ctx: Context, x: Expr, factor: float) -> Expr:
    return x if factor == 1 else ctx.emit(op.multiply(x, ctx.literal(factor, dtype_of(x))))


def add_bias(ctx: Context, y: Expr, i: int) -> Expr:
    """y + input `i` where there is one."""
    if not ctx.has(i):
        return y
    broadcast_shape(ctx, shape_of(y), ctx.shape(i))
    return ctx.emit(op.add(y, ctx.x(i)))


def _gemm(ctx: Context) -> Expr:
    a, b = (permute(ctx, ctx.x(i), [1, 0]) if ctx.attr(t, 0) else ctx.x(i) for i, t in ((0, "transA"), (1, "transB")))
    y = matmul(ctx, a, b)
    if ctx.dtype().startswith(("int", "uint")):  # the factors of integers are the integers 1
        return add_bias(ctx, y, 2)
    y = scale(ctx, y, ctx.attr("alpha", 1.0))
    if not ctx.has(2):
        return y
    c = scale(ctx, ctx.x(2), ctx.attr("beta", 1.0))
    broadcast_shape(ctx, shape_of(y), shape_of(c))
    return op.add(y, c)


def _det(ctx: Context) -> Expr:
    """Determinants of [..., N, N]: the product of the pivots of an elimination, with a sign for each exchange."""
    n, dtype = ctx.shape()[-1], ctx.dtype()
    ctx.unify(ctx.shape()[-2], n)
    count, zero = product(ctx.shape()[:-2]), te.const(0, dtype)

    def nest(x: Any, y: Any, work: Any, pivot: Any, count: Any, n: Any) -> None:
        with T.serial(0, count) as b:
            base = b * n * n
            y[b] = te.const(1, dtype)
            with T.serial(0, n * n) as i:
                work[i] = x[base + i]
            with T.serial(0, n) as c:
                pivot[0] = c
                with T.serial(0, n - c - 1) as k:
                    row = c + 1 + k
                    with T.If(te.abs(work[row * n + c]) > te.abs(work[pivot[0] * n + c])):
                        with T.Then():
                            pivot[0] = row
                y[b] = y[b] * work[pivot[0] * n + c] * select(pivot[0] == c, te.const(1, dtype), te.const(-1, dtype))
                with T.If(work[pivot[0] * n + c] != zero):
                    with T.Then():
                        with T.serial(0, n) as k:  # the pivot's row goes up; what it leaves is eliminated below
                            work[n * n + k] = work[pivot[0] * n + k]
                            work[pivot[0] * n + k] = work[c * n + k]
                        with T.serial(0, n - c - 1) as k:
                            row = c + 1 + k
                            work[n * n + n] = work[row * n + c] / work[n * n + c]
                            with T.serial(0, n) as j:
                                work[row * n + j] = work[row * n + j] - work[n * n + n] * work[n * n + j]

    outputs = [([count], dtype), ([simplify(n * n + n + 1)], dtype), ([1], "int64")]
    y = loops(ctx, "det", nest, [ctx.x()], outputs, [count, n])[0]
    return reshape(ctx, y, ctx.shape()[:-2])


# -- integers ---------------------------------------------------------------------------------------------------
def centred(ctx: Context, x: Expr, zero: Expr | None, column: bool) -> Expr:
    """int32 x - zero; a vector of zero points is one for each row, or for each `column`."""
    x = cast(ctx, x, "int32")
    if zero is None:
        return x
    if len(shape_of(zero)) == 1 and not column and shape_of(zero)[0] != 1:
        zero = reshape(ctx, zero, [*shape_of(zero), 1])
    broadcast_shape(ctx, shape_of(x), shape_of(zero))
    return ctx.emit(op.subtract(x, cast(ctx, zero, "int32")))


def integer_product(ctx: Context, a: int, b: int, zero_a: int, zero_b: int) -> Expr:
    """int32 (A - zero_a) x (B - zero_b); the arguments are input positions."""
    za, zb = (ctx.x(i) if ctx.has(i) else None for i in (zero_a, zero_b))
    return matmul(ctx, centred(ctx, ctx.x(a), za, False), centred(ctx, ctx.x(b), zb, True), "int32")


# -- Einstein sums ----------------------------------------------------------------------------------------------
def _einsum(ctx: Context) -> Expr:
    """An equation with explicit or implicit output, and an ellipsis for leading dimensions that broadcast."""
    terms, output = parse_equation(ctx.attr("equation"), [ctx.rank(i) for i in range(len(ctx))])
    sizes: dict[str, Dim] = {}
    for i, term in enumerate(terms):
        for label, d in zip(term, ctx.shape(i), strict=True):
            known = sizes.setdefault(label, d)
            if isinstance(known, int) and known == 1:
                sizes[label] = d
            elif not (isinstance(d, int) and d == 1):
                ctx.unify(known, d)
    summed = [label for label in sizes if label not in output]
    shapes = [ctx.shape(i) for i in range(len(ctx))]

    def body(xs: list[Any], out: list[Any], extents: list[Any]) -> Any:
        axes = {label: te.reduce_axis((0, d), label) for label, d in zip(summed, extents, strict=True)}

        def element(*i: Any) -> Any:
            at = {**dict(zip(output, i, strict=True)), **axes}
            factors = [
                x(*(0 if isinstance(d, int) and d == 1 else at[label] for label, d in zip(term, shape, strict=True)))
                for x, term, shape in zip(xs, terms, shapes, strict=True)
            ]
            value = reduce(lambda a, b: a * b, factors)
            return te.sum(value, axis=list(axes.values())) if axes else value

        return te.compute(out, element, name="einsum")

    xs = [ctx.x(i) for i in range(len(ctx))]
    return compute(ctx, "einsum", body, xs, [sizes[label] for label in output], [sizes[label] for label in summed])


def parse_equation(equation: str | bytes, ranks: Sequence[int]) -> tuple[list[str], str]:
    """The labels of each operand and of the output; dimensions under an ellipsis get the labels 0, 1, …, right-aligned.

    Without an arrow, the output holds the labels that occur once, in alphabetical order.
    """
    text = (equation.decode() if isinstance(equation, bytes) else equation).replace(" ", "")
    left, arrow, right = text.partition("->")
    operands = left.split(",")
    widths = [rank - len(t.replace("...", "")) for t, rank in zip(operands, ranks, strict=True)]
    widest = max([w for t, w in zip(operands, widths, strict=True) if "..." in t], default=0)
    lead = "".join(map(str, range(widest)))
    terms = [t.replace("...", lead[widest - w :] if "..." in t else "") for t, w in zip(operands, widths, strict=True)]
    if arrow:
        return terms, right.replace("...", lead)
    joined = "".join(terms)
    once = sorted(c for c in set(joined) if joined.count(c) == 1 and not c.isdigit())
    return terms, lead + "".join(once)


RULES: dict[str, Rule] = {
    "MatMul": lambda ctx: matmul(ctx, ctx.x(0), ctx.x(1)),
    "Gemm": _gemm,
    "MatMulInteger": lambda ctx: integer_product(ctx, 0, 1, 2, 3),
    "Einsum": _einsum,
    "Det": _det,
}
