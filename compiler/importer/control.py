"""Control flow at import: an If whose condition is known is its branch, a short loop is its body as often as it runs.

What data decides, and what runs too often to be written out, becomes a node with bodies of its own (`bodies`,
`branches`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from onnx import GraphProto

from llmc.graph import Dim, Node
from llmc.importer.bodies import Iteration, Visit, run_loop
from llmc.importer.branches import run_if
from llmc.importer.lists import run_with_lists
from llmc.importer.opening import (
    Refused,
    Tracer,
    captured,
    constant,
    formals,
    initialisers,
    is_lost,
    move_first,
    number,
    prefix_of,
    scalar,
    stack,
    subgraph,
    visit_body,
    visit_node,
)
from llmc.ops.context import Unify
from llmc.tvm_shim import tirx

MAX_ITERATIONS = 1024  # of a loop that is written out
MAX_UNROLLED = 4096  # nodes that it may be written out as, counted as they stand in its body
MAX_VISITED = 2 * MAX_UNROLLED  # the same with all that they unfold into
_ENDLESS = 2**63 - 1  # what exporters write for "as long as the condition holds"


def open_control(tracer: Tracer, node: Node) -> None:
    """Visit the nodes that an If, a Loop or a Scan stands for; its outputs are then made, or lost. Raises Refused."""
    CONTROL[node.op](tracer, node)


def _bind(tracer: Tracer, names: Sequence[str], outputs: Sequence[str]) -> None:
    for name, output in zip(names, outputs, strict=False):
        if output:
            visit_node(tracer, "Identity", [name], output)


# -- If ---------------------------------------------------------------------------------------------------------
def _if(tracer: Tracer, node: Node) -> None:
    condition = number(tracer, node.inputs[0])
    if condition is None:
        run_if(tracer, node, partial(_branch, tracer, node))
    else:
        name = "then" if condition else "else"
        _bind(tracer, _branch(tracer, node, name, prefix_of(node, name), lambda outer: outer), node.outputs)


def _branch(tracer: Tracer, node: Node, name: str, prefix: str, read: Callable[[str], str]) -> list[str]:
    """Visit a branch, in which what is around it has the name that `read` gives; returns the names of its outputs."""
    graph = subgraph(node, f"{name}_branch", 0, len(node.outputs))
    around = {outer: read(outer) for outer in captured(graph)}
    return visit_body(tracer, graph, {**around, **initialisers(tracer, graph, prefix_of(node, name))}, prefix)


# -- loops that are written out ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Unrolled:
    """What all iterations gave: the last states, and the elements of each thing that is collected, by their names."""

    states: Sequence[str]
    elements: list[list[str]]
    failed: bool = False


def _unrolled(
    tracer: Tracer, node: Node, body: GraphProto, times: int | None, states: Sequence[str], visit: Visit
) -> _Unrolled | None:
    """Visit the body `times`, or as often as it says. None where it runs too often, or data decides how often."""
    most = min(MAX_ITERATIONS, MAX_UNROLLED // max(1, len(body.node)))
    if times is not None and times > most:
        return None
    steps: list[Iteration] = []
    going, mark, before = True, tracer.mark(), tracer.visited()
    while going and len(steps) != times:
        prefix = prefix_of(node, len(steps))
        step = visit(constant(tracer, f"{prefix}<iteration>", len(steps)), states, prefix)
        if is_lost(tracer, node, step.names):
            return _Unrolled(states, [], failed=True)
        steps.append(step)
        further = number(tracer, step.going)
        more = bool(further) and len(steps) != times
        long = len(steps) == most or tracer.visited() - before > MAX_VISITED  # with other loops inside of it
        if further is None or (more and long):
            tracer.back_to(mark)
            return None
        going, states = bool(further), step.states
    return _Unrolled(states, [list(names) for names in zip(*(step.elements for step in steps), strict=True)])


# -- Loop -------------------------------------------------------------------------------------------------------
def _loop(tracer: Tracer, node: Node) -> None:
    states = node.inputs[2:]
    body = subgraph(node, "body", 2 + len(states), 1 + len(states), more=True)
    constants = initialisers(tracer, body, prefix_of(node))

    def visit(iteration: str, states: Sequence[str], prefix: str) -> Iteration:
        given = formals(body, [iteration, constant(tracer, f"{prefix}<condition>", True), *states])
        going, *made = visit_body(tracer, body, {**constants, **given}, prefix)
        return Iteration(going, made[: len(states)], made[len(states) :])

    limit, begins = node.input(0), node.input(1)
    limit = "" if limit and scalar(tracer, limit) == _ENDLESS else limit
    times, first = (number(tracer, name) if name else None for name in (limit, begins))
    if begins and first is not None and not first:
        times = 0
    known = times is not None or not limit
    if known and (first is not None or not begins) and not (times is not None and times <= 0 and _collects(node)):
        unrolled = _unrolled(tracer, node, body, times if times is None else max(times, 0), states, visit)
        if unrolled is not None:
            if not unrolled.failed:
                _bind(tracer, unrolled.states, node.outputs)
                for n, (elements, output) in enumerate(
                    zip(unrolled.elements, node.outputs[len(states) :], strict=False)
                ):
                    if output:
                        stack(tracer, node.version, elements, 0, output, prefix_of(node, f"<collected {n}>"))
            return
    made = run_with_lists(tracer, node, limit, begins, states, visit)
    if made is not None:
        _bind(tracer, [*made[0], *made[1]], node.outputs)


def _collects(node: Node) -> bool:
    """Has a Loop outputs besides its states? If it never runs, the body has to say their types."""
    return any(node.outputs[len(node.inputs) - 2 :])


# -- Scan -------------------------------------------------------------------------------------------------------
def _scan(tracer: Tracer, node: Node) -> None:
    if node.version < 9:
        raise Refused("Scan of opset 8, with lengths of its own for each batch")
    scanned = int(node.attrs["num_scan_inputs"])
    split = len(node.inputs) - scanned
    if scanned < 1 or split < 0:
        raise Refused(f"num_scan_inputs = {scanned} of {len(node.inputs)} inputs")
    body = subgraph(node, "body", len(node.inputs), split, more=True)
    constants = initialisers(tracer, body, prefix_of(node))
    inputs = node.inputs[split:]
    axes = _axes(node, "scan_input_axes", scanned)
    backwards = _axes(node, "scan_input_directions", scanned)
    places = list(
        zip(
            _axes(node, "scan_output_axes", len(body.output) - split),
            _axes(node, "scan_output_directions", len(body.output) - split),
            strict=True,
        )
    )
    length = _length(tracer, inputs, axes)
    always = constant(tracer, f"{prefix_of(node)}<always>", True)
    limit, last = f"{prefix_of(node)}<length>", f"{prefix_of(node)}<last>"
    shape = visit_node(tracer, "Shape", [inputs[0]], f"{prefix_of(node)}<shape>")
    visit_node(tracer, "Gather", [shape, constant(tracer, f"{shape}<axis>", axes[0])], limit)
    visit_node(tracer, "Sub", [limit, constant(tracer, f"{limit}<one>", 1)], last)

    def visit(iteration: str, states: Sequence[str], prefix: str) -> Iteration:
        elements = []
        for n, (x, axis, back) in enumerate(zip(inputs, axes, backwards, strict=True)):
            place = visit_node(tracer, "Sub", [last, iteration], f"{prefix}{n}/<place>") if back else iteration
            elements.append(visit_node(tracer, "Gather", [x, place], f"{prefix}{n}/<element>", axis=axis))
        made = visit_body(tracer, body, {**constants, **formals(body, [*states, *elements])}, prefix)
        return Iteration(always, made[:split], made[split:])

    unrolled = None
    if isinstance(length, int) and (length or not any(node.outputs[split:])):
        unrolled = _unrolled(tracer, node, body, length, node.inputs[:split], visit)
    if unrolled is None:
        made = run_loop(tracer, node, limit, "", node.inputs[:split], visit)
        if made is not None:
            _bind(tracer, made[0], node.outputs)
            for name, output, (axis, back) in zip(made[1], node.outputs[split:], places, strict=False):
                if output:
                    _place(tracer, node, name, axis, bool(back), output)
    elif not unrolled.failed:
        _bind(tracer, unrolled.states, node.outputs)
        for n, (elements, output) in enumerate(zip(unrolled.elements, node.outputs[split:], strict=False)):
            axis, back = places[n]
            if output:
                stack(
                    tracer,
                    node.version,
                    elements[:: -1 if back else 1],
                    axis,
                    output,
                    prefix_of(node, f"<collected {n}>"),
                )


def _axes(node: Node, name: str, count: int) -> list[int]:
    """An attribute with a number for each input or output, 0 where it is absent. Raises Refused."""
    values = [int(a) for a in node.attrs.get(name) or [0] * count]
    if len(values) != count:
        raise Refused(f"{name} has {len(values)} numbers for {count} values")
    return values


def _length(tracer: Tracer, inputs: Sequence[str], axes: Sequence[int]) -> Dim:
    """The extent that all inputs have along their axes. Raises Refused, and Unify where symbols have to be equal."""
    for x, axis in zip(inputs, axes, strict=True):
        rank = len(tracer.emitter.graph_types[x].shape)
        if not -rank <= axis < rank:
            raise Refused(f"scan_input_axes has {axis} for a tensor of rank {rank}")
    lengths = [tracer.emitter.graph_types[x].shape[a] for x, a in zip(inputs, axes, strict=True)]
    for other in lengths[1:]:
        if tracer.emitter.same(lengths[0], other):
            continue
        for one, two in ((lengths[0], other), (other, lengths[0])):
            if isinstance(one, tirx.Var):
                raise Unify(one, two)
        raise Refused(f"its inputs have different lengths: {', '.join(map(str, lengths))}")
    return lengths[0]


def _place(tracer: Tracer, node: Node, name: str, axis: int, backwards: bool, output: str) -> None:
    """What was collected along the first axis, in the order and along the axis that a Scan asks for."""
    if backwards:
        if node.version < 10:
            raise Refused("an output that is scanned backwards, in opset 9, which has no way to turn it")
        bounds = [
            constant(tracer, f"{output}<{k}>", [v])
            for k, v in (("from", -1), ("to", -_ENDLESS), ("axis", 0), ("by", -1))
        ]
        name = visit_node(tracer, "Slice", [name, *bounds], f"{output}<turned>")
    move_first(tracer, name, axis, output)


CONTROL: dict[str, Callable[[Tracer, Node], None]] = {"If": _if, "Loop": _loop, "Scan": _scan}
