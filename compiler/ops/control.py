"""If and Loop that data decides, in the domain llmc: their bodies are graphs, which become functions of the module.

The virtual machine has branches and calls, and no way back: a loop of n steps is a recursion. So that it needs little
stack whatever n is, the recursion is balanced: `run(level)` is `run(level - 1)` twice, and `run(0)` is four steps;
`drive` runs 4, 8, 16 … steps for as long as the loop goes on. What the steps collect is written in place, into buffers
that double before each of these, so that to collect n elements costs about as much as to copy them twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from llmc.graph import Dim, Graph, TensorType
from llmc.ops.context import Context, Rule, symbols
from llmc.ops.functions import (
    COUNT,
    FLAG,
    Function,
    Steps,
    calling,
    exact_type,
    function_of,
    items_of,
    loose_type,
    results_of,
    variables,
)
from llmc.ops.tensor import compute, full, reshape, take_slice
from llmc.ops.zeros import zeros
from llmc.tvm_shim import Expr, IRBuilder, T, relax, te, tirx

_OPAQUE = 8  # TVM's kind of operator that is never fused
_LEAF = 4  # iterations at a time: each keeps a version of the states until the last is done


# -- If ---------------------------------------------------------------------------------------------------------
def _if(ctx: Context) -> tuple[Expr, ...]:
    """Inputs: a flag of one element, what each branch reads, and what makes the sizes that they are told. Only the
    branch taken is computed."""
    sides = zip(("then", "else"), ctx.attr("sizes"), strict=True)
    yes, no = (function_of(ctx, ctx.attr(name), name, told) for name, told in sides)
    split = len(yes.inputs)
    type_ = relax.TupleType([loose_type(t) for t in ctx.attr("types")])
    flag, *given = variables([FLAG, *yes.inputs, *no.inputs])
    steps = Steps()
    taken = relax.If(
        flag,
        calling(yes.name, given[:split], type_),
        calling(no.name, given[split:], type_),
    )
    choose = relax.Function([flag, *given], steps.end(steps.let(taken, type_)), type_)
    gv = ctx.bb.add_func(ctx.bb.normalize(choose), "choose")
    places = iter(range(1, len(ctx)))
    one, other = ([ctx.x(next(places)) for _ in ctx.attr(name).inputs] for name in ("then", "else"))
    made = ctx.emit(gv(reshape(ctx, ctx.x(), []), *one, *yes.more, *other, *no.more))
    return tuple(results_of(ctx, items_of(made, len(ctx.attr("types"))), ctx.attr("types")))


# -- Loop -------------------------------------------------------------------------------------------------------
def _loop(ctx: Context) -> tuple[Expr, ...]:
    """Inputs: the number of iterations and whether to begin, of one element each or absent; states; what else the body
    reads. The body takes an iteration's number, states and the rest; it gives a flag, whether to go on, states, and
    elements of what is collected. Outputs: states, and what was collected along a new first axis."""
    body: Graph = ctx.attr("body")
    states = len(ctx.attr("types"))
    elements = [body.types[o] for o in body.outputs[1 + states :]]
    limit = [reshape(ctx, ctx.x(0), [])] if ctx.has(0) else []
    step = _step(ctx, body, states, elements, len(limit))
    carried = [FLAG, *step.inputs[: 1 + states], *map(_buffer, elements)]
    captured = [*([COUNT] if limit else []), *step.inputs[1 + states :]]
    drive = _drive(ctx, carried, captured, _run(ctx, carried, captured, step, len(elements)), len(elements))

    begins = [reshape(ctx, ctx.x(1), [])] if ctx.has(1) else []
    begins += [ctx.emit(relax.op.less(ctx.literal(0, "int64"), n)) for n in limit]
    alive = ctx.emit(relax.op.logical_and(*begins)) if len(begins) == 2 else (begins or [ctx.literal(True, "bool")])[0]
    given = [ctx.x(i) for i in range(2, len(ctx))]
    buffers = [zeros(ctx.bb, [_LEAF, *(0 if _is_found(ctx, d) else d for d in e.shape)], e.carrier) for e in elements]
    end = ctx.emit(
        drive(
            ctx.literal(0, "int64"),
            *(alive, ctx.literal(0, "int64"), *given[:states], *buffers),
            *(*limit, *given[states:], *step.more),
        )
    )
    _, count, *values = items_of(end, len(carried))
    results = results_of(ctx, values[:states], ctx.attr("types"))
    if not elements:
        return tuple(results)
    n: Dim = ctx.attr("count")
    if n is None:
        (n,) = ctx.measured(reshape(ctx, ctx.emit(count), [1]), 1)
    types = [TensorType((tirx.Var("capacity", "int64"), *e.shape), e.dtype) for e in ctx.attr("elements")]
    return (*results, *(take_slice(ctx, b, 0, 0, n) for b in results_of(ctx, values[states:], types)))


def _is_found(ctx: Context, dim: Dim) -> bool:
    """Does a body find a dimension, which is not known around it?"""
    (told,) = ctx.attr("sizes")
    return any(s not in [size.inside for size in told] for s in symbols(dim))


def _buffer(element: TensorType) -> Any:
    return relax.TensorType(dtype=element.carrier, ndim=1 + len(element.shape))


def _step(ctx: Context, body: Graph, states: int, elements: Sequence[TensorType], limits: int) -> Function:
    """One iteration: takes the limit, if there is one, buffers, and the body's inputs; gives all that is carried."""
    before = variables([*[COUNT] * limits, *map(_buffer, elements)])

    def finish(values: list[Expr], inputs: list[Expr]) -> list[Expr]:
        following = ctx.emit(relax.op.add(inputs[0], ctx.literal(1, "int64")))
        alive = reshape(ctx, values[0], [])
        if limits:
            alive = ctx.emit(relax.op.logical_and(alive, ctx.emit(relax.op.less(following, before[0]))))
        made = zip(before[limits:], values[1 + states :], elements, strict=True)
        buffers = []
        for buffer, value, element in made:
            if any(_is_found(ctx, d) for d in element.shape):
                buffer = ctx.emit(_fit(ctx, element)(buffer, inputs[0], value))
            buffers.append(_put(ctx, buffer, inputs[0], value, element))
        return [alive, following, *values[1 : 1 + states], *buffers]

    (told,) = ctx.attr("sizes")
    return function_of(ctx, body, "step", told, before, finish)


def _recursive(
    ctx: Context, name: str, carried: Sequence[Any], captured: Sequence[Any], make: Callable[..., Any]
) -> Any:
    """Emit a function of a level and of what a loop carries and reads, that may call itself, and returns what is
    carried: `make(itself, level, carried, captured)` is its body."""
    level, *given = variables([COUNT, *carried, *captured])
    type_, kept = relax.TupleType(list(carried)), given[: len(carried)]
    stub = relax.Function([level, *given], relax.SeqExpr([], relax.Tuple(kept)), type_)
    gv = ctx.bb.add_func(stub, name)
    body = make(gv, level, kept, given[len(carried) :])
    ctx.bb.update_func(gv, ctx.bb.normalize(relax.Function([level, *given], body, type_)))
    return gv


def _run(ctx: Context, carried: Sequence[Any], captured: Sequence[Any], step: Function, buffers: int) -> Any:
    """_LEAF * 2^level iterations, or fewer where the loop ends in them; it begins them."""
    type_, split = relax.TupleType(list(carried)), len(carried) - buffers
    limits = len(captured) - (len(step.inputs) - (split - 1))

    def leaf(values: list[Any], given: list[Any], count: int) -> Any:
        arguments = [*given[:limits], *values[split:], *values[1:split], *given[limits:]]
        if count == 1:
            return calling(step.name, arguments, type_)
        steps = Steps()
        made = steps.let(step.name(*arguments), type_)
        alive = steps.let(relax.TupleGetItem(made, 0), FLAG)
        following = Steps()
        items = [following.let(item, t) for item, t in zip(items_of(made, len(values)), carried, strict=True)]
        rest = leaf(items, given, count - 1)
        on = relax.SeqExpr([relax.BindingBlock(following.bindings), *rest.blocks], rest.body)
        return steps.end(steps.let(relax.If(alive, on, relax.SeqExpr([], made)), type_))

    def body(run: Any, level: Any, values: list[Any], given: list[Any]) -> Any:
        steps, twice = Steps(), Steps()
        below = twice.let(relax.op.subtract(level, relax.const(1, "int64")), COUNT)
        half = twice.let(run(below, *values, *given), type_)
        alive = twice.let(relax.TupleGetItem(half, 0), FLAG)
        again = calling(run, [below, *items_of(half, len(values)), *given], type_)
        rest = twice.let(relax.If(alive, again, relax.SeqExpr([], half)), type_)
        lowest = steps.let(relax.op.equal(level, relax.const(0, "int64")), FLAG)
        return steps.end(steps.let(relax.If(lowest, leaf(values, given, _LEAF), twice.end(rest)), type_))

    return _recursive(ctx, "run", carried, captured, body)


def _drive(ctx: Context, carried: Sequence[Any], captured: Sequence[Any], run: Any, buffers: int) -> Any:
    """As many iterations as the loop has, _LEAF * 2^level of them first."""
    type_ = relax.TupleType(list(carried))
    split = len(carried) - buffers
    grow = _grow(ctx, carried[split:]) if buffers else None

    def body(drive: Any, level: Any, values: list[Any], given: list[Any]) -> Any:
        on, all_ = Steps(), Steps()
        kept = list(values)
        if grow is not None:
            larger = on.let(grow(*values[split:]), relax.TupleType(list(carried[split:])))
            kept[split:] = items_of(larger, buffers)
        here = on.let(run(level, *kept, *given), type_)
        above = on.let(relax.op.add(level, relax.const(1, "int64")), COUNT)
        end = on.let(drive(above, *items_of(here, len(values)), *given), type_)
        stop = Steps()
        ended = stop.end(stop.let(relax.Tuple(values), type_))
        return all_.end(all_.let(relax.If(values[0], on.end(end), ended), type_))

    return _recursive(ctx, "drive", carried, captured, body)


def _grow(ctx: Context, types: Sequence[Any]) -> Any:
    """A function that gives copies of buffers with room for twice as many elements."""

    def body(t: Any, out: list[Any]) -> Any:
        half = t.shape[0]
        zero = te.const(0, t.dtype)
        return te.compute(out, lambda i, *j: te.if_then_else(i < half, t(te.min(i, half - 1), *j), zero), name="grow")

    bb, given = ctx.bb, variables(types)
    with bb.function("grow", private=True):
        with bb.dataflow():
            larger = []
            for buffer in given:
                shape = [tirx.Var(f"d{axis}", "int64") for axis in range(buffer.ty.ndim)]
                exact = bb.match_cast(buffer, relax.TensorType(shape, buffer.ty.dtype))
                larger.append(compute(ctx, "grow", body, exact, [shape[0] * 2, *shape[1:]]))
            result = bb.emit_output(relax.Tuple(larger))
        return bb.emit_func_output(result, params=given)


def _fit(ctx: Context, element: TensorType) -> Any:
    """A function of a buffer, a place and an element: for the first element a buffer for more of its size, else the
    same. One of another size does not fit then, and the call fails."""
    rank = len(element.shape)
    loose = relax.TensorType(dtype=element.carrier, ndim=rank)
    capacity, sizes = tirx.Var("capacity", "int64"), [tirx.Var(f"d{axis}", "int64") for axis in range(rank)]
    old = [tirx.Var(f"o{axis}", "int64") for axis in range(rank)]
    bb, (buffer, value) = ctx.bb, variables([_buffer(element), loose])
    with bb.function("sized", private=True):
        with bb.dataflow():
            bb.match_cast(buffer, relax.TensorType([capacity, *old], element.carrier))
            bb.match_cast(value, relax.TensorType(sizes, element.carrier))
            result = bb.emit_output(full(ctx, [capacity, *sizes], 0, element.carrier))
        sized = bb.emit_func_output(result, params=[buffer, value])

    params = variables([_buffer(element), COUNT, loose])
    steps = Steps()
    begins = steps.let(relax.op.equal(params[1], relax.const(0, "int64")), FLAG)
    fresh = calling(sized, [params[0], params[2]], _buffer(element))
    fitting = steps.let(relax.If(begins, fresh, relax.SeqExpr([], params[0])), _buffer(element))
    return bb.add_func(bb.normalize(relax.Function(params, steps.end(fitting), _buffer(element))), "fit")


def _put(ctx: Context, buffer: Expr, place: Expr, value: Expr, element: TensorType) -> Expr:
    """The buffer with an element written at a place, which is the same memory: nobody else holds it."""
    rank = len(element.shape)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("put")
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": _OPAQUE})
        handles = [T.arg(name, T.handle()) for name in ("buffer", "place", "value")]
        capacity, sizes = T.int64(), [T.int64() for _ in range(rank)]
        shapes = [((capacity, *sizes), element.carrier), ((), "int64"), (sizes, element.carrier)]
        buffers = [T.match_buffer(handle, *shape) for handle, shape in zip(handles, shapes, strict=True)]
        to, at, source = map(T.buffer_proxy, buffers)
        with T.sblock("root"), ExitStack() as nest:
            index = [nest.enter_context(T.serial(0, size)) for size in sizes]
            to[(at[()], *index)] = source[tuple(index)]
    func = ctx.bb.add_func(builder.get().without_attr("global_symbol"), "put")
    type_ = TensorType((tirx.Var("capacity", "int64"), *element.shape), element.dtype)
    exact = ctx.bb.match_cast(buffer, exact_type(type_))
    return ctx.emit(relax.op.call_tir_inplace(func, [exact, place, value], [0], exact_type(type_)))


RULES: dict[tuple[str, str], Rule] = {("llmc", "If"): _if, ("llmc", "Loop"): _loop}
