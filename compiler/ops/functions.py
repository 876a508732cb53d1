"""Bodies of control flow as functions of the module, and the few statements that functions around them consist of.

Functions have no symbols in common: one is told the sizes that its body mentions, and matches what it is given with its
own types.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from llmc.graph import Dim, Graph, TensorType
from llmc.ops.context import Context, Emitter, bind, symbols
from llmc.tvm_shim import Expr, relax, tirx

FLAG, COUNT = relax.TensorType((), "bool"), relax.TensorType((), "int64")


class Size(NamedTuple):
    """What a body is told: a symbol around it, and what that is in the body, which is checked when the body is entered.

    `inside` is a symbol, of the body's own or the same, or computed from symbols that were told before.
    """

    around: Any
    inside: Dim


class Function(NamedTuple):
    """A graph as a function of its inputs, of the sizes that it is told, and of weights."""

    name: Any
    inputs: list[Any]  # types
    more: list[Expr]  # what is passed behind the graph's inputs


def loose_type(type_: TensorType) -> Any:
    """A tensor's type between functions, which have no symbols in common: where there are some, only its rank."""
    if all(isinstance(d, int) for d in type_.shape):
        return relax.TensorType(type_.shape, type_.carrier)
    return relax.TensorType(dtype=type_.carrier, ndim=len(type_.shape))


def exact_type(type_: TensorType) -> Any:
    return relax.TensorType(type_.shape, type_.carrier)


def variables(types: Sequence[Any]) -> list[Any]:
    return [relax.Var(f"x{i}", type_) for i, type_ in enumerate(types)]


def function_of(
    ctx: Context,
    graph: Graph,
    name: str,
    told: Sequence[Size],
    before: Sequence[Any] = (),
    finish: Callable[[list[Expr], list[Expr]], list[Expr]] = lambda values, inputs: values,
) -> Function:
    """Emit a function of `before` and the graph's inputs, which returns what `finish` makes of outputs and inputs."""
    bb = ctx.bb
    inputs = variables([loose_type(graph.types[i]) for i in graph.inputs])
    sizes = variables([relax.ShapeType(ndim=len(told))] if told else [])
    for symbol in [s.inside for s in told if isinstance(s.inside, tirx.Var)]:
        if not ctx.emitter.analyzer.can_prove(symbol >= 0):
            bind(ctx.emitter.analyzer, symbol, graph.symbols.get(symbol.name, (0, None)))
    with bb.function(name, private=True):
        with bb.dataflow():
            for given in sizes:
                bb.match_cast(given, relax.ShapeType([s.inside for s in told]))
            exact = [bb.match_cast(v, exact_type(graph.types[i])) for i, v in zip(graph.inputs, inputs, strict=True)]
            exprs = dict(zip(graph.inputs, exact, strict=True))
            emit = ctx.emitter.nested or partial(_by_rules, ctx.emitter)
            values, weights = emit(graph, exprs)
            result = bb.emit_output(relax.Tuple(finish(values, exact)))
        own = [variable for variable, _ in weights]
        gv = bb.emit_func_output(result, params=[*before, *inputs, *sizes, *own])
    bb.update_func(gv, relax.utils.copy_with_new_vars(bb.get()[gv]))
    more = [relax.ShapeExpr([s.around for s in told])] if told else []
    return Function(gv, [v.ty for v in (*inputs, *sizes, *own)], [*more, *(given for _, given in weights)])


def _by_rules(emitter: Emitter, graph: Graph, exprs: Mapping[str, Expr]) -> tuple[list[Expr], list[tuple[Any, Expr]]]:
    """Emit a body's nodes where its inputs are `exprs`: its outputs, and no weights beside its inputs."""
    inner = Emitter.bind_graph(graph, exprs, emitter.rules, emitter.bb)
    inner.analyzer, inner.measured = emitter.analyzer, emitter.measured
    for node in graph.nodes:
        inner.run(node)
    return [inner.expr(o) for o in graph.outputs], []


class Steps:
    """Statements of a function that has no tensor program of its own."""

    def __init__(self) -> None:
        self.bindings: list[Any] = []

    def let(self, value: Expr, type_: Any) -> Any:
        self.bindings.append(relax.VarBinding(relax.Var("v", type_), value))
        return self.bindings[-1].var

    def end(self, value: Expr) -> Any:
        return relax.SeqExpr([relax.BindingBlock(self.bindings)] if self.bindings else [], value)


def calling(name: Any, arguments: Sequence[Expr], type_: Any) -> Any:
    """A branch that calls a function."""
    steps = Steps()
    return steps.end(steps.let(name(*arguments), type_))


def items_of(value: Expr, count: int) -> list[Expr]:
    return [relax.TupleGetItem(value, i) for i in range(count)]


def results_of(ctx: Context, values: Sequence[Expr], types: Sequence[TensorType]) -> list[Expr]:
    """What a function returned, with its types in the caller's symbols; those that are new are measured here."""
    for symbol in dict.fromkeys(s for t in types for d in t.shape for s in symbols(d)):
        if not ctx.emitter.analyzer.can_prove(symbol >= 0):
            bind(ctx.emitter.analyzer, symbol, (0, None))
            ctx.emitter.measured[symbol] = next(filter(None, ctx.node.outputs))
    return [ctx.bb.match_cast(ctx.emit(v), exact_type(t)) for v, t in zip(values, types, strict=True)]
