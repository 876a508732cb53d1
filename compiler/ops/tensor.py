"""The few helpers that all families of rules share: tensor expressions with broadcasting, and shape changes.

What Relax's own operators mean exactly as ONNX does is said with them; the rest is a *tensor expression*: a Python
function of scalars or indices, which becomes one PrimFunc and fuses like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from llmc.graph import Dim, as_dim, same_dim
from llmc.ops.context import Context
from llmc.ops.scalar import select
from llmc.tvm_shim import Analyzer, Expr, IRBuilder, T, relax, te, tirx, tvm, tvm_ffi


def shape_of(x: Expr) -> tuple[Dim, ...]:
    """The shape of an emitted expression."""
    return tuple(as_dim(d) for d in x.ty.shape.values)


def dtype_of(x: Expr) -> str:
    return str(x.ty.dtype)


def is_float(dtype: str) -> bool:
    return dtype.startswith(("float", "bfloat"))


def simplify(dim: Dim) -> Dim:
    return as_dim(dim if isinstance(dim, int) else Analyzer().simplify(dim))


def product(dims: Iterable[Dim]) -> Dim:
    total: Dim = 1
    for d in dims:
        total = total * d
    return simplify(total)


# -- tensor expressions -----------------------------------------------------------------------------------------
def compute(ctx: Context, name: str, f: Callable[..., Any], *args: Any) -> Expr:
    """Emit the tensor expression `f(*args)`.

    `args` are Relax tensors (`f` sees TE tensors), dimensions, or lists of them. Every symbol that `f` uses must come
    in through `args`: a PrimFunc has symbols of its own.
    """
    return ctx.emit(ctx.bb.call_te(f, *args, primfunc_name_hint=name))


def broadcast_shape(ctx: Context, *shapes: Sequence[Dim]) -> tuple[Dim, ...]:
    """The shape of numpy broadcasting; two dimensions that are not the number 1 must be equal."""
    rank = max(map(len, shapes))
    out: list[Dim] = [1] * rank
    for shape in shapes:
        for i, d in enumerate(shape, rank - len(shape)):
            if isinstance(d, int) and d == 1:
                continue
            if isinstance(out[i], int) and out[i] == 1:
                out[i] = d
            else:
                ctx.unify(out[i], d)
    return tuple(out)


def element(x: Any, index: Sequence[Any]) -> Any:
    """The element of TE tensor `x` that broadcasting puts at `index` of the result."""
    own = index[len(index) - len(x.shape) :]
    return x(*(0 if isinstance(d, tirx.IntImm) and int(d) == 1 else i for d, i in zip(x.shape, own, strict=True)))


def elementwise(ctx: Context, name: str, f: Callable[..., Any], *xs: Expr) -> Expr:
    """Emit `f` of the scalars of `xs`, with numpy broadcasting. Constants of one element become immediates."""
    shape = broadcast_shape(ctx, *map(shape_of, xs))
    tensors = [x for x in xs if immediate(x) is None]

    def body(out: list[Any], *args: Any) -> Any:
        rest = iter(args)
        operands = [immediate(x) if immediate(x) is not None else next(rest) for x in xs]
        return te.compute(
            out, lambda *i: f(*(element(o, i) if isinstance(o, te.Tensor) else o for o in operands)), name=name
        )

    return compute(ctx, name, body, list(shape), *tensors)


def immediate(x: Expr) -> Any:
    """The TE constant of a Relax constant of one element, else None."""
    if not isinstance(x, tvm.ir.GenericConst):
        return None
    value = x.value.numpy()
    return te.const(value.reshape(-1)[0].item(), str(value.dtype)) if value.size == 1 else None


LANES = 32  # partial results of a reduction: two or four vector registers, so that additions need not wait


def reduce_rows(reducer: Any, rows: Sequence[Any], f: Callable[..., Any], n: Any, name: str) -> Any:
    """A TE tensor of shape `rows`: `reducer` (te.sum, te.max, te.min) of f(*row, k) over k < n.

    Floating-point sums may not be reordered by LLVM, so the order that vectorises is written down: LANES partial
    results side by side, then these and the tail.
    """
    if isinstance(n, (int, tirx.IntImm)) and int(n) < 2 * LANES:
        k = te.reduce_axis((0, n), "k")
        return te.compute(rows, lambda *i: reducer(f(*i, k), axis=k), name=name)
    whole = te.floordiv(n, LANES)
    k = te.reduce_axis((0, whole), "k")
    partial = te.compute(
        (*rows, LANES), lambda *i: reducer(f(*i[:-1], k * LANES + i[-1]), axis=k), name=f"{name}_lanes"
    )
    j = te.reduce_axis((0, te.floormod(n, LANES) + LANES), "j")

    def rest(*i: Any) -> Any:
        lane = partial(*i, te.min(j, LANES - 1))
        return reducer(te.if_then_else(j < LANES, lane, f(*i, whole * LANES + j - LANES)), axis=j)

    return te.compute(rows, rest, name=name)


# -- changes of shape, type and layout --------------------------------------------------------------------------
def same_shape(a: Sequence[Dim], b: Sequence[Dim]) -> bool:
    return len(a) == len(b) and all(same_dim(x, y) for x, y in zip(a, b, strict=True))


def reshape(ctx: Context, x: Expr, shape: Sequence[Dim]) -> Expr:
    if any(isinstance(d, int) and d == 0 for d in (*shape, *shape_of(x))):  # Relax would read 0 as "keep this one"
        return full(ctx, shape, 0, dtype_of(x))
    return x if same_shape(shape_of(x), shape) else ctx.emit(relax.op.reshape(x, list(shape)))


def permute(ctx: Context, x: Expr, perm: Sequence[int]) -> Expr:
    return x if list(perm) == list(range(len(perm))) else ctx.emit(relax.op.permute_dims(x, list(perm)))


def broadcast_to(ctx: Context, x: Expr, shape: Sequence[Dim]) -> Expr:
    return x if same_shape(shape_of(x), shape) else ctx.emit(relax.op.broadcast_to(x, list(shape)))


def cast(ctx: Context, x: Expr, dtype: str) -> Expr:
    return x if dtype_of(x) == dtype else ctx.emit(relax.op.astype(x, dtype))


def concat(ctx: Context, xs: Sequence[Expr], axis: int) -> Expr:
    """Join along `axis`; the other dimensions must be equal."""
    first = shape_of(xs[0])
    for x in xs[1:]:
        for i, (a, b) in enumerate(zip(first, shape_of(x), strict=True)):
            if i != axis:
                ctx.unify(a, b)
    # Dimensions may be equal for what the model's symbols can be, which Relax knows nothing of.
    xs = [xs[0], *(reshape(ctx, x, [*first[:axis], shape_of(x)[axis], *first[axis + 1 :]]) for x in xs[1:])]
    some = [x for x in xs if not (isinstance(shape_of(x)[axis], int) and shape_of(x)[axis] == 0)]
    xs = some or xs[:1]  # TVM cannot store a constant without elements, which an empty past is
    if len(xs) == 1:
        return xs[0]
    y = ctx.emit(relax.op.concat(list(xs), axis))
    # Relax says "1 + seq" where everything else says "seq + 1", and its fusion takes the two for different buffers.
    length = shape_of(y)[axis]
    if isinstance(length, int) or tvm_ffi.structural_equal(length, simplify(length)):
        return y
    return ctx.emit(relax.op.reshape(y, [simplify(d) for d in shape_of(y)]))


def full(ctx: Context, shape: Sequence[Dim], value: float | int | bool, dtype: str) -> Expr:
    if not np.isfinite(value):  # TVM writes no constant of these
        one = ctx.literal(np.full([1] * len(shape), value, dtype), dtype)
        return broadcast_to(ctx, one, shape)
    return ctx.emit(relax.op.full(list(shape), relax.const(np.asarray(value, dtype), dtype), dtype))


def take_slice(ctx: Context, x: Expr, axis: int, start: Dim, size: Dim, step: int = 1) -> Expr:
    """x[start], x[start + step], … along `axis`, `size` of them, all inside the tensor."""

    def body(t: Any, out: list[Any], begin: Any) -> Any:
        return te.compute(out, lambda *i: t(*i[:axis], begin + i[axis] * step, *i[axis + 1 :]), name="slice")

    shape = list(shape_of(x))
    shape[axis] = size
    return compute(ctx, "slice", body, x, shape, start)


def index_of(position: Any, size: Any) -> Any:
    """An ONNX index as a place in 0..size-1: negative ones count from the end, and none is outside of the tensor."""
    wrapped = select(position < 0, position + size, position)
    return te.max(te.min(wrapped, size - 1), te.const(0, "int64"))


def loops(
    ctx: Context,
    name: str,
    nest: Callable[..., Any],
    inputs: Sequence[Expr],
    outputs: Sequence[tuple[Sequence[Dim], str]],
    dims: Sequence[Dim] = (),
) -> list[Expr]:
    """Emit a loop nest written with the IR builder, for what no formula of an element's place says.

    `nest(*buffers, *dims)` gets inputs and outputs as buffers of one dimension each, in C order, and the dimensions; a
    buffer that it only works in is an output, too.
    """

    def body(xs: list[Any], shapes: list[list[Any]], sizes: list[Any]) -> Any:
        def fill(ins: Sequence[Any], outs: Sequence[Any]) -> Any:
            with IRBuilder() as builder:
                with T.attr(0, "sequence", 0):  # several loops in a row need a frame around them
                    nest(*map(T.buffer_proxy, (*ins, *outs)), *(T.int64(d) if isinstance(d, int) else d for d in sizes))
                return builder.get()

        return te.extern(shapes, xs, fill, dtype=[dtype for _, dtype in outputs], name=name)

    made = compute(ctx, name, body, list(inputs), [list(shape) for shape, _ in outputs], list(dims))
    if len(outputs) == 1:
        return [made]
    return [ctx.emit(relax.TupleGetItem(made, i)) for i in range(len(outputs))]
