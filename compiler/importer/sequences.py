"""Sequences and optionals, resolved at import: each is a tuple of value names, and nothing of it is left in the graph.

That needs lengths and positions that are known at import. They pass through Identity, the branches of an If and the
states of a loop that is written out, as exporters write lists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from llmc.graph import Node
from llmc.importer.opening import (
    Group,
    Refused,
    Tracer,
    constant,
    formals,
    initialisers,
    is_lost,
    move_first,
    number,
    prefix_of,
    squeeze,
    stack,
    subgraph,
    visit_body,
    visit_node,
    visit_nodes,
)

MAX_PARTS = 4096  # that one tensor is split into


def open_group(tracer: Tracer, node: Node) -> bool:
    """Resolve an operator of sequences or optionals; False for any other. Raises Refused."""
    if not node.domain and node.op == "Identity" and node.inputs[0] in tracer.groups:
        tracer.groups[node.outputs[0]] = tracer.groups[node.inputs[0]]
        return True
    rule = GROUPS.get(node.op) if not node.domain else None
    if rule is not None:
        rule(tracer, node)
    return rule is not None


# -- sequences --------------------------------------------------------------------------------------------------
def _sequence(tracer: Tracer, name: str) -> tuple[str, ...]:
    """The names of a sequence's tensors. Raises Refused."""
    group = tracer.groups.get(name)
    if group is None or group.optional:
        raise Refused(f"'{name}' is no sequence")
    if group.stacked:
        raise Refused(f"the length of '{name}', which a loop makes, is known at run time only")
    return group.names


def _stacked(tracer: Tracer, name: str) -> str:
    """The tensor that holds all elements of a list that a loop made; empty for any other sequence. Raises Refused."""
    group = tracer.groups.get(name)
    if group is None or not group.stacked:
        return ""
    if group.names or group.stacked not in tracer.emitter.graph_types:
        raise Refused(f"it reads '{name}', which a loop is not done with, or which was appended to behind it")
    return group.stacked


def _position(tracer: Tracer, node: Node, i: int, length: int) -> int:
    """Input `i` as a place in 0..length-1; the last where it is absent. Raises Refused."""
    if not node.input(i):
        return length - 1
    place = number(tracer, node.input(i))
    if place is None:
        raise Refused("its position is known at run time only")
    if not -length <= place < length:
        raise Refused(f"position {place} is outside of a sequence of {length}")
    return place % length


def _give(tracer: Tracer, node: Node, names: tuple[str, ...]) -> None:
    tracer.groups[node.outputs[0]] = Group(names)


def _empty(tracer: Tracer, node: Node) -> None:
    _give(tracer, node, ())


def _construct(tracer: Tracer, node: Node) -> None:
    _give(tracer, node, node.inputs)


def _insert(tracer: Tracer, node: Node) -> None:
    group = tracer.groups.get(node.inputs[0])
    if group is not None and group.stacked and not node.input(2):
        tracer.groups[node.outputs[0]] = replace(group, names=(*group.names, node.inputs[1]))
        return
    names = list(_sequence(tracer, node.inputs[0]))
    names.insert(_position(tracer, node, 2, len(names) + 1), node.inputs[1])
    _give(tracer, node, tuple(names))


def _erase(tracer: Tracer, node: Node) -> None:
    names = list(_sequence(tracer, node.inputs[0]))
    del names[_position(tracer, node, 1, len(names))]
    _give(tracer, node, tuple(names))


def _at(tracer: Tracer, node: Node) -> None:
    if tensor := _stacked(tracer, node.inputs[0]):
        visit_node(tracer, "Gather", [tensor, node.inputs[1]], node.outputs[0], axis=0)
        return
    names = _sequence(tracer, node.inputs[0])
    visit_node(tracer, "Identity", [names[_position(tracer, node, 1, len(names))]], node.outputs[0])


def _length(tracer: Tracer, node: Node) -> None:
    if tensor := _stacked(tracer, node.inputs[0]):
        shape = visit_node(tracer, "Shape", [tensor], f"{prefix_of(node)}<shape>")
        visit_node(tracer, "Gather", [shape, constant(tracer, f"{shape}<first>", 0)], node.outputs[0])
    else:
        constant(tracer, node.outputs[0], len(_sequence(tracer, node.inputs[0])))


def _split(tracer: Tracer, node: Node) -> None:
    """Parts of the sizes that are given, of one size, or of size 1 each, without their axis where keepdims is 0."""
    x, shape = node.inputs[0], tracer.emitter.graph_types[node.inputs[0]].shape
    axis = int(node.attrs.get("axis", 0))
    if not -len(shape) <= axis < len(shape):
        raise Refused(f"axis {axis} is outside of a tensor of rank {len(shape)}")
    extent = shape[axis]
    given = tracer.emitter.value(node.input(1)) if node.input(1) else None
    if node.input(1) and (given is None or given.dtype == object):
        raise Refused("its sizes are known at run time only")
    if given is not None and given.ndim:
        sizes = [int(v) for v in given]
    elif not isinstance(extent, int):
        raise Refused(f"it makes as many parts as dimension {extent} says, which differs from run to run")
    else:
        step = 1 if given is None else int(given.reshape(-1)[0])
        if step < 1 or extent > step * MAX_PARTS:
            raise Refused(f"parts of {step} of a dimension of {extent}")
        sizes = [min(step, extent - start) for start in range(0, extent, step)]
    prefix = prefix_of(node)
    parts = tuple(f"{prefix}<part {n}>" for n in range(len(sizes)))
    if len(parts) == 1:
        visit_node(tracer, "Identity", [x], parts[0])
    elif node.version < 13:
        visit_nodes(tracer, "Split", [x], parts, axis=axis, split=sizes)
    elif parts:
        visit_nodes(tracer, "Split", [x, constant(tracer, f"{prefix}<sizes>", sizes)], parts, axis=axis)
    if given is None and not node.attrs.get("keepdims", 1):
        parts = tuple(squeeze(tracer, node.version, part, axis, f"{part}<narrow>") for part in parts)
    _give(tracer, node, parts)


def _concat(tracer: Tracer, node: Node) -> None:
    axis = int(node.attrs["axis"])
    if tensor := _stacked(tracer, node.inputs[0]):
        _concat_stacked(tracer, node, tensor, axis)
        return
    names = _sequence(tracer, node.inputs[0])
    if not names:
        raise Refused("a tensor of no parts")
    if node.attrs.get("new_axis", 0):
        stack(tracer, node.version, names, axis, node.outputs[0], prefix_of(node))
    else:
        visit_node(tracer, "Concat", names, node.outputs[0], axis=axis)


def _concat_stacked(tracer: Tracer, node: Node, tensor: str, axis: int) -> None:
    """The elements of a tensor along its first axis, joined along a new axis, or one of their own."""
    prefix, rank = prefix_of(node), len(tracer.emitter.graph_types[tensor].shape) - 1
    if node.attrs.get("new_axis", 0):
        move_first(tracer, tensor, axis, node.outputs[0])
        return
    if not -rank <= axis < rank:
        raise Refused(f"axis {axis} is outside of a tensor of rank {rank}")
    axis %= rank
    wide = move_first(tracer, tensor, axis, f"{prefix}<wide>")
    shape = visit_node(tracer, "Shape", [wide], f"{prefix}<shape>")
    parts = [constant(tracer, f"{prefix}<all>", [-1])]
    for name, axes in (("<before>", range(axis)), ("<behind>", range(axis + 2, rank + 1))):
        if axes:
            places = constant(tracer, f"{prefix}{name}<axes>", list(axes))
            parts.insert(
                len(parts) * (name == "<behind>"), visit_node(tracer, "Gather", [shape, places], prefix + name)
            )
    target = visit_node(tracer, "Concat", parts, f"{prefix}<target>", axis=0)
    visit_node(tracer, "Reshape", [wide, target], node.outputs[0])


def _map(tracer: Tracer, node: Node) -> None:
    """The body once for each element of the first sequence, with the same element of the others, or a tensor."""
    body = subgraph(node, "body", len(node.inputs), len(node.outputs))
    constants = initialisers(tracer, body, prefix_of(node))
    given = [_sequence(tracer, node.inputs[0])]
    for name in node.inputs[1:]:
        given.append(_sequence(tracer, name) if name in tracer.groups else (name,) * len(given[0]))
    if len(set(map(len, given))) > 1:
        raise Refused(f"its sequences have different lengths: {', '.join(str(len(names)) for names in given)}")
    results: list[list[str]] = []
    for n, names in enumerate(zip(*given, strict=True)):
        results.append(visit_body(tracer, body, {**constants, **formals(body, names)}, prefix_of(node, n)))
        if is_lost(tracer, node, results[-1]):
            return
    for n, output in enumerate(node.outputs):
        if output:
            tracer.groups[output] = Group(tuple(result[n] for result in results))


# -- optionals --------------------------------------------------------------------------------------------------
def _optional(tracer: Tracer, node: Node) -> None:
    tracer.groups[node.outputs[0]] = Group(tuple(filter(None, node.inputs)), optional=True)


def _content(tracer: Tracer, node: Node) -> tuple[str, ...]:
    """The name of what an optional holds, or none; what is no optional holds itself."""
    name = node.input(0)
    group = tracer.groups.get(name)
    return group.names if group is not None and group.optional else tuple(filter(None, [name]))


def _get(tracer: Tracer, node: Node) -> None:
    content = _content(tracer, node)
    if not content:
        raise Refused("the optional is empty")
    visit_node(tracer, "Identity", [content[0]], node.outputs[0])


def _has(tracer: Tracer, node: Node) -> None:
    constant(tracer, node.outputs[0], bool(_content(tracer, node)))


GROUPS: dict[str, Callable[[Tracer, Node], None]] = {
    "SequenceEmpty": _empty,
    "SequenceConstruct": _construct,
    "SequenceInsert": _insert,
    "SequenceErase": _erase,
    "SequenceAt": _at,
    "SequenceLength": _length,
    "SequenceMap": _map,
    "SplitToSequence": _split,
    "ConcatFromSequence": _concat,
    "Optional": _optional,
    "OptionalGetElement": _get,
    "OptionalHasElement": _has,
}
