"""Control flow, opened at import: If, and Loop and Scan whose number of iterations is known.

An If whose condition is known is its branch; of any other both branches are computed, and what the true one gives is
taken element by element, so the two must give equal shapes. A loop is its body, as often as it runs.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from onnx import GraphProto, NodeProto, helper

from llmc.graph import Node
from llmc.importer.functions import open_body
from llmc.importer.structure import sorted_nodes
from llmc.importer.tensors import ExternalData, load_tensor
from llmc.ops.context import Emitter

MAX_ITERATIONS = 1024


class Tracer(Protocol):
    """What opening asks of the walk: it visits nodes, and knows what became of them."""

    emitter: Emitter
    lost: set[str]
    external: ExternalData

    def visit(self, proto: NodeProto) -> None: ...

    def constant(self, name: str, array: np.ndarray) -> None: ...


class Refused(Exception):
    """The reason why a node cannot be opened."""


def open_control(tracer: Tracer, node: Node) -> None:
    """Visit the nodes that an If, a Loop or a Scan stands for; its outputs are then made, or lost. Raises Refused."""
    CONTROL[node.op](tracer, node)


def _prefix(node: Node, *parts: object) -> str:
    """Of names that are new: no model's name has parts in angle brackets."""
    return "/".join([next(filter(None, node.outputs), node.name), *map(str, parts), ""])


def _initialisers(tracer: Tracer, graph: GraphProto, prefix: str) -> dict[str, str]:
    """A subgraph's constants by their names there, made once however often it runs."""
    names = {tensor.name: prefix + tensor.name for tensor in graph.initializer}
    for tensor in graph.initializer:
        tracer.constant(names[tensor.name], load_tensor(tensor, tracer.external))
    return names


def _body(tracer: Tracer, graph: GraphProto, given: dict[str, str], prefix: str, *, guarded: bool = False) -> list[str]:
    """Visit a subgraph's nodes, where `given` are the values from outside; returns the names of its outputs.

    `guarded` nodes run although a condition was to keep them from it. Raises Refused for one that must not.
    """
    names = dict(given)
    known = ChainMap[str, Any](given, tracer.emitter.graph_types, dict.fromkeys(tracer.lost))
    for opened in open_body(sorted_nodes(graph.node, known), names, {}, prefix):
        if guarded and _may_trap(tracer, opened):
            raise Refused("both of its branches are computed, but one divides integers by what may be zero")
        tracer.visit(opened)
    return [names.get(o.name, o.name) for o in graph.output]


def _may_trap(tracer: Tracer, node: NodeProto) -> bool:
    """Does it divide integers by data? Zero would end the process."""
    if node.domain or node.op_type not in ("Div", "Mod") or len(node.input) < 2:
        return False
    divisor = tracer.emitter.graph_types.get(node.input[1])
    is_integer = divisor is not None and divisor.dtype.startswith(("int", "uint"))
    return is_integer and tracer.emitter.value(node.input[1]) is None


def _branch(tracer: Tracer, node: Node, name: str, *, guarded: bool = False) -> list[str]:
    graph, prefix = _graph(node, f"{name}_branch", 0, len(node.outputs)), _prefix(node, name)
    return _body(tracer, graph, _initialisers(tracer, graph, prefix), prefix, guarded=guarded)


def _graph(node: Node, name: str, inputs: int, outputs: int, *, more: bool = False) -> GraphProto:
    """A subgraph that takes and gives as many values as it should, or gives more. Raises Refused."""
    graph = node.attrs[name]
    if not isinstance(graph, GraphProto):
        raise Refused(f"{name} is no graph")
    given, made = len(graph.input), len(graph.output)
    if given != inputs or made < outputs or (made > outputs and not more):
        raise Refused(f"{name} takes {given} and gives {made} values, where {inputs} and {outputs} are needed")
    return graph


def _visit(tracer: Tracer, op: str, inputs: Sequence[str], output: str, **attrs: Any) -> str:
    tracer.visit(helper.make_node(op, inputs, [output], **attrs))
    return output


def _scalar(tracer: Tracer, name: str) -> int | bool | None:
    """The value of one number or flag where it is known. Raises Refused where it is not one."""
    value = tracer.emitter.value(name)
    if value is None:
        return None
    if value.size != 1:
        raise Refused(f"'{name}' has {value.size} elements, where one is needed")
    element = value.reshape(-1)[0]
    return element if isinstance(element, (int, bool)) else element.item() if isinstance(element, np.generic) else None


def _is_lost(tracer: Tracer, node: Node, names: Sequence[str]) -> bool:
    """Did one of the body's results get lost? The node's outputs are, then."""
    if not tracer.lost.intersection(names):
        return False
    tracer.lost.update(filter(None, node.outputs))
    return True


# -- If ---------------------------------------------------------------------------------------------------------
def _if(tracer: Tracer, node: Node) -> None:
    condition = _scalar(tracer, node.inputs[0])
    if condition is not None:
        taken = _branch(tracer, node, "then" if condition else "else")
        for name, output in zip(taken, node.outputs, strict=True):
            _visit(tracer, "Identity", [name], output)
        return
    prefix = _prefix(node)
    yes, no = (_branch(tracer, node, name, guarded=True) for name in ("then", "else"))
    if _is_lost(tracer, node, [*yes, *no]):
        return
    for a, b in zip(yes, no, strict=True):
        one, other = (tracer.emitter.graph_types[name] for name in (a, b))
        equal = len(one.shape) == len(other.shape) and one.dtype == other.dtype
        if not equal or not all(map(tracer.emitter.same, one.shape, other.shape)):
            raise Refused(f"its condition is known at run time only, and its branches give {one} and {other}")
    tracer.constant(f"{prefix}<shape>", np.zeros(0, np.int64))
    flag = _visit(tracer, "Reshape", [node.inputs[0], f"{prefix}<shape>"], f"{prefix}<condition>")
    for a, b, output in zip(yes, no, node.outputs, strict=True):
        if output:
            _visit(tracer, "Where", [flag, a, b], output)


# -- Loop -------------------------------------------------------------------------------------------------------
def _loop(tracer: Tracer, node: Node) -> None:
    states = list(node.inputs[2:])
    body = _graph(node, "body", 2 + len(states), 1 + len(states), more=True)
    constants = _initialisers(tracer, body, _prefix(node))
    limit, alive = _number(tracer, node, 0, "number of iterations"), _number(tracer, node, 1, "condition")
    scans: list[list[str]] = [[] for _ in body.output[1 + len(states) :]]
    count, going = 0, alive is None or bool(alive)
    while going and (limit is None or count < limit):
        _check_count(count + 1)
        prefix = _prefix(node, count)
        tracer.constant(f"{prefix}<iteration>", np.array(count))
        tracer.constant(f"{prefix}<condition>", np.array(True))
        given = [f"{prefix}<iteration>", f"{prefix}<condition>", *states]
        condition, *results = _body(tracer, body, {**constants, **_named(body, given)}, prefix)
        if _is_lost(tracer, node, [condition, *results]):
            return
        further = _scalar(tracer, condition)
        if further is None:
            raise Refused("whether it goes on is known at run time only")
        going = bool(further)
        states, made = results[: len(states)], results[len(states) :]
        for scan, name in zip(scans, made, strict=True):
            scan.append(name)
        count += 1
    for state, output in zip(states, node.outputs, strict=False):
        if output:
            _visit(tracer, "Identity", [state], output)
    _stack(tracer, node, scans, node.outputs[len(states) :], lambda _: (0, False))


def _number(tracer: Tracer, node: Node, i: int, what: str) -> int | None:
    """Input `i` where there is one. Raises Refused where it is not known."""
    if not node.input(i):
        return None
    value = _scalar(tracer, node.input(i))
    if value is None:
        raise Refused(f"its {what} is known at run time only")
    return int(value)


def _check_count(count: int) -> None:
    if count > MAX_ITERATIONS:
        raise Refused(f"it runs more than {MAX_ITERATIONS} times")


def _named(body: GraphProto, given: Sequence[str]) -> dict[str, str]:
    return {formal.name: name for formal, name in zip(body.input, given, strict=True)}


def _stack(
    tracer: Tracer,
    node: Node,
    scans: Sequence[Sequence[str]],
    outputs: Sequence[str],
    place: Callable[[int], tuple[int, bool]],
) -> None:
    """Join what the iterations gave along a new axis; `place` says for each output which, and whether backwards."""
    for n, (parts, output) in enumerate(zip(scans, outputs, strict=False)):
        if not output:
            continue
        if not parts:
            raise Refused("it never runs, and gives an output of no elements")
        axis, backwards = place(n)
        axes = f"{_prefix(node, n)}<axes>"
        tracer.constant(axes, np.array([axis]))
        wide = []
        for i, part in enumerate(parts):
            name = f"{_prefix(node, n, i)}<wide>"
            if node.version < 13:
                wide.append(_visit(tracer, "Unsqueeze", [part], name, axes=[axis]))
            else:
                wide.append(_visit(tracer, "Unsqueeze", [part, axes], name))
        _visit(tracer, "Concat", wide[::-1] if backwards else wide, output, axis=axis)


# -- Scan -------------------------------------------------------------------------------------------------------
def _scan(tracer: Tracer, node: Node) -> None:
    if node.version < 9:
        raise Refused("Scan of opset 8, with lengths of its own for each batch")
    scanned = int(node.attrs["num_scan_inputs"])
    split = len(node.inputs) - scanned
    if scanned < 1 or split < 0:
        raise Refused(f"num_scan_inputs = {scanned} of {len(node.inputs)} inputs")
    body = _graph(node, "body", len(node.inputs), split, more=True)
    constants = _initialisers(tracer, body, _prefix(node))
    states, inputs = list(node.inputs[:split]), node.inputs[split:]
    axes = _axes(node, "scan_input_axes", scanned)
    backwards = _axes(node, "scan_input_directions", scanned)
    for x, axis in zip(inputs, axes, strict=True):
        rank = len(tracer.emitter.graph_types[x].shape)
        if not -rank <= axis < rank:
            raise Refused(f"scan_input_axes has {axis} for a tensor of rank {rank}")
    lengths = [tracer.emitter.graph_types[x].shape[a] for x, a in zip(inputs, axes, strict=True)]
    length = lengths[0]
    if not isinstance(length, int):
        raise Refused(f"its number of iterations, {length}, is a dimension that differs from run to run")
    if any(other != length for other in lengths):
        raise Refused(f"its inputs have different lengths: {', '.join(map(str, lengths))}")
    _check_count(length)
    scans: list[list[str]] = [[] for _ in body.output[split:]]
    for count in range(length):
        prefix = _prefix(node, count)
        elements = []
        for n, (x, axis, back) in enumerate(zip(inputs, axes, backwards, strict=True)):
            tracer.constant(f"{prefix}{n}/<place>", np.array(length - 1 - count if back else count))
            elements.append(_visit(tracer, "Gather", [x, f"{prefix}{n}/<place>"], f"{prefix}{n}/<element>", axis=axis))
        results = _body(tracer, body, {**constants, **_named(body, [*states, *elements])}, prefix)
        if _is_lost(tracer, node, results):
            return
        states = results[:split]
        for scan, name in zip(scans, results[split:], strict=True):
            scan.append(name)
    for state, output in zip(states, node.outputs, strict=False):
        if output:
            _visit(tracer, "Identity", [state], output)
    out_axes = _axes(node, "scan_output_axes", len(scans))
    out_backwards = _axes(node, "scan_output_directions", len(scans))
    _stack(tracer, node, scans, node.outputs[split:], lambda n: (out_axes[n], bool(out_backwards[n])))


def _axes(node: Node, name: str, count: int) -> list[int]:
    """An attribute with a number for each input or output, 0 where it is absent. Raises Refused."""
    values = [int(a) for a in node.attrs.get(name) or [0] * count]
    if len(values) != count:
        raise Refused(f"{name} has {len(values)} numbers for {count} values")
    return values


CONTROL: dict[str, Callable[[Tracer, Node], None]] = {"If": _if, "Loop": _loop, "Scan": _scan}
