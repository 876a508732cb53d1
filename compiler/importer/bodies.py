"""Bodies that run in the artifact: a subgraph becomes a graph of its own, an attribute of a node in domain llmc.

A body reads what is around it by further inputs. A loop's body may mention the symbols around it; a state whose size
the loop changes has sizes of its own in the body, which are found whenever it runs. An If is in `branches`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmc.graph import LLMC, Dim, Graph, Node, TensorType, prune
from llmc.importer.opening import Refused, Tracer, is_lost, prefix_of, scalar
from llmc.importer.own_sizes import SAME, SameSizes
from llmc.importer.types import UNCOMPILED
from llmc.ops.context import MEASURED, SHAPE_VALUE, bind, symbols
from llmc.ops.functions import Size
from llmc.tvm_shim import tirx


@dataclass(frozen=True)
class Iteration:
    """What a loop's body gives: names of a flag, whether to go on, of states, and of elements of what is collected."""

    going: str
    states: list[str]
    elements: list[str]

    @property
    def names(self) -> list[str]:
        return [self.going, *self.states, *self.elements]


Visit = Callable[[str, Sequence[str], str], Iteration]  # a body, by the iteration's number, states, and a prefix
Branch = Callable[
    [str, str, Callable[[str], str]], list[str]
]  # by name, with a prefix, and what values are called in it
SIDES = ("then", "else")


@dataclass(frozen=True)
class Body:
    graph: Graph
    own: frozenset[Any]  # symbols that are found in it
    sizes: tuple[Size, ...]  # what it is told of the others that it mentions


# -- Loop -------------------------------------------------------------------------------------------------------
def run_loop(
    tracer: Tracer, node: Node, limit: str, condition: str, states: Sequence[str], visit: Visit
) -> tuple[list[str], list[str]] | None:
    """Add a Loop of as many iterations as it turns out to have; returns the names of its last states and of what it
    collected, along a new first axis. None where something in its body failed. Raises Refused."""
    check_one(tracer, limit, "int64")
    check_one(tracer, condition, "bool")
    check_tensors(tracer, states)
    prefix = prefix_of(node, "<loop>")
    types, own, turn = [tracer.emitter.graph_types[s] for s in states], 0, 0
    while True:  # ends: every round more sizes are the body's own
        mark = tracer.mark()
        iteration, *formals = [f"{prefix}{turn}/<{n}>" for n in ("iteration", *range(len(states)))]
        tracer.variable(iteration, TensorType((), "int64"))
        for formal, type_ in zip(formals, types, strict=True):
            tracer.variable(formal, type_)
            tracer.emitter.measured.update((d, formal) for d in type_.shape if _is_own(d, prefix))
        with tracer.recorded() as nodes:
            made = visit(iteration, formals, f"{prefix}{turn}/")
        if is_lost(tracer, node, made.names):
            return None
        check_tensors(tracer, made.names)
        types = [
            _widened(tracer, f"{prefix}<{n}>", type_, tracer.emitter.graph_types[result], prefix)
            for n, (type_, result) in enumerate(zip(types, made.states, strict=True))
        ]
        before, own = own, sum(_is_own(d, prefix) for t in types for d in t.shape)
        if own == before:
            break
        tracer.back_to(mark)
        turn += 1
    body = body_of(tracer, f"{prefix}body", [iteration, *formals], nodes, made.names)
    outputs = [
        f"{prefix}<{kind} {n}>"
        for kind, names in (("state", states), ("collected", made.elements))
        for n in range(len(names))
    ]
    results = [
        outside(tracer, name, tracer.emitter.graph_types[state], type_, [body], outputs)
        for name, state, type_ in zip(outputs, states, types, strict=False)
    ]
    attrs: dict[str, Any] = {"body": body.graph, "types": tuple(results), "sizes": (body.sizes,)}
    if made.elements:
        count = _count(tracer, limit, condition, made.going)
        attrs["count"] = count
        if count is None:
            count = _measured(tracer, f"{prefix}<count>", outputs)
            attrs[MEASURED] = (count,)
        elements = [
            outside(tracer, name, body.graph.types[e], body.graph.types[e], [body], outputs)
            for name, e in zip(outputs[len(states) :], made.elements, strict=True)
        ]
        attrs["elements"] = tuple(elements)
        results += [TensorType((count, *e.shape), e.dtype) for e in elements]
    inputs = (limit, condition, *states, *body.graph.inputs[1 + len(states) :])
    add(tracer, Node("Loop", inputs, tuple(outputs), attrs, LLMC, node.name, 1), results)
    return outputs[: len(states)], outputs[len(states) :]


def _is_own(dim: Dim, prefix: str) -> bool:
    """Is it a size that a loop's body finds, of which the names begin with `prefix`?"""
    return isinstance(dim, tirx.Var) and dim.name.startswith(prefix)


def _widened(tracer: Tracer, name: str, type_: TensorType, result: TensorType, prefix: str) -> TensorType:
    """The type of a state in the body, where an iteration that begins with `type_` gives `result`. Raises Refused."""
    says = f"a state is {type_} before an iteration, and {result} behind it"
    if type_.dtype != result.dtype or len(type_.shape) != len(result.shape):
        raise Refused(says)
    shape: list[Dim] = []
    for axis, (a, b) in enumerate(zip(type_.shape, result.shape, strict=True)):
        keeps = _is_own(a, prefix) or tracer.emitter.same(a, b)
        shape.append(a if keeps else _measured(tracer, f"{name}.{axis}", [name]))
        if not keeps and not _is_own(shape[-1], prefix):
            raise Refused(f"{says}, but its size has to stay {shape[-1]}")
    return TensorType(tuple(shape), type_.dtype)


def _count(tracer: Tracer, limit: str, condition: str, going: str) -> Dim | None:
    """How often a loop runs, where that does not depend on data."""
    flags = [scalar(tracer, name) for name in (condition, going) if name]
    count = scalar(tracer, limit) if limit else None
    if count is None or any(flag is None or not flag for flag in flags):
        return None
    if isinstance(count, int):
        return max(count, 0)
    return count if tracer.emitter.analyzer.can_prove(count >= 0) else None


# -- graphs and types -------------------------------------------------------------------------------------------
def body_of(
    tracer: Tracer,
    name: str,
    formals: Sequence[str],
    nodes: Sequence[Node],
    outputs: Sequence[str],
    sizes: SameSizes = SAME,
) -> Body:
    """The recorded nodes as a graph; its inputs are `formals`, and then what it reads of what is around it."""
    emitter = tracer.emitter
    made = {*formals, *(o for n in nodes for o in n.outputs)}
    around = [v for v in dict.fromkeys([*(i for n in nodes for i in n.inputs if i), *outputs]) if v not in made]
    # What is known of a shape is known here as it is there.
    known = [_shape_value(tracer, v) for v in around if v in emitter.values]
    names = {*made, *around, *(i for n in known for i in n.inputs)} & emitter.graph_types.keys()
    graph = prune(
        Graph(
            name,
            tuple(formals),
            tuple(outputs),
            (*nodes, *known),
            {n: emitter.graph_types[n] for n in names},
            {n: emitter.constants[n] for n in names if n in emitter.constants},
        )
    )
    found = {*formals, *graph.constants, *(o for n in graph.nodes for o in n.outputs)}
    read = dict.fromkeys(i for i in (*(i for n in graph.nodes for i in n.inputs if i), *outputs) if i not in found)
    graph = replace(graph, inputs=(*formals, *read))
    own = frozenset(s for s, maker in emitter.measured.items() if maker in found)
    graph, told = sizes.entered(graph, [s for s in _mentioned(graph) if s not in own])
    return Body(graph, own, told)


def _shape_value(tracer: Tracer, name: str) -> Node:
    """A node that makes a shape value once more."""
    value, measured = tracer.emitter.values[name], tracer.emitter.measured
    makers = dict.fromkeys(measured[s] for v in value.flat for s in symbols(v) if s in measured)
    return Node(SHAPE_VALUE, tuple(makers), (name,), {"value": value}, LLMC, name)


def _mentioned(graph: Graph) -> list[Any]:
    """All symbols in a graph: of its types, and of what its nodes know."""
    dims: list[Dim] = [d for t in graph.types.values() for d in t.shape]
    for node in graph.nodes:
        dims += node.attrs.get(MEASURED, ())
        dims += [size.around for told in node.attrs.get("sizes", ()) if node.domain == LLMC for size in told]
        dims += node.attrs["value"].flat if node.op == SHAPE_VALUE else []
        dims += [d for t in node.attrs.get("types", ()) for d in t.shape]
    return list(dict.fromkeys(s for d in dims if not isinstance(d, int) for s in symbols(d)))


def _measured(tracer: Tracer, name: str, makers: Sequence[str]) -> Dim:
    """A size that is found when the model runs, by whoever makes the first of `makers`."""
    emitter = tracer.emitter
    dim = emitter.extents.setdefault(name, tirx.Var(name, "int64"))
    if isinstance(dim, tirx.Var) and not emitter.analyzer.can_prove(dim >= 0):
        bind(emitter.analyzer, dim, (0, None))
        emitter.measured[dim] = next(filter(None, makers))
    return dim


def outside(
    tracer: Tracer, name: str, one: TensorType, other: TensorType, bodies: Sequence[Body], makers: Sequence[str]
) -> TensorType:
    """The type of what is `one` or `other`, depending on data, in terms of what is known around the bodies."""
    shape = []
    for axis, (a, b) in enumerate(zip(one.shape, other.shape, strict=True)):
        inside = any(s in body.own for body in bodies for s in (*symbols(a), *symbols(b)))
        known = not inside and tracer.emitter.same(a, b)
        shape.append(a if known else _measured(tracer, f"{name}.{axis}", makers))
    return TensorType(tuple(shape), one.dtype)


def add(tracer: Tracer, node: Node, types: Sequence[TensorType]) -> None:
    for output, type_ in zip(node.outputs, types, strict=True):
        if output:
            tracer.variable(output, type_)
    tracer.add(node)


def check_one(tracer: Tracer, name: str, dtype: str) -> None:
    """Raises Refused for a number or flag that is none."""
    type_ = tracer.emitter.graph_types.get(name) if name else None
    if name and (type_ is None or type_.dtype != dtype or any(d != 1 for d in type_.shape if isinstance(d, int))):
        raise Refused(f"'{name}' is {type_ or 'no tensor'}, where one {dtype} is needed")


def check_tensors(tracer: Tracer, names: Sequence[str]) -> None:
    """Raises Refused for what only exists at import."""
    for name in names:
        if name in tracer.groups:
            raise Refused(f"'{name}' is a sequence or an optional, whose content is to be known at import")
        if (dtype := tracer.emitter.graph_types[name].dtype) in UNCOMPILED:
            raise Refused(f"it works on {UNCOMPILED[dtype]}")
