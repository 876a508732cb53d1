"""What all that opens subgraphs at import has in common: their nodes visited, with names that are new."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from onnx import GraphProto, NodeProto, helper

from llmc.graph import Dim, Node, TensorType
from llmc.importer.functions import open_body
from llmc.importer.structure import reads, sorted_nodes
from llmc.importer.tensors import ExternalData, load_tensor
from llmc.ops.context import Emitter


@dataclass(frozen=True)
class Group:
    """A sequence of values, or an optional one, by their names.

    A list that a loop appends to begins with the elements of a tensor, `stacked`, along its first axis; in the body of
    that loop there is no such tensor yet.
    """

    names: tuple[str, ...]
    optional: bool = False
    stacked: str = ""


class Tracer(Protocol):
    """What opening asks of the walk: it visits nodes, and knows what became of them."""

    emitter: Emitter
    lost: set[str]
    external: ExternalData
    groups: dict[str, Group]

    def visit(self, proto: NodeProto) -> None: ...

    def visited(self) -> int:
        """How many nodes have been visited, those of functions and of other bodies included."""

    def constant(self, name: str, array: np.ndarray) -> None: ...

    def variable(self, name: str, type_: TensorType) -> None: ...

    def value(self, name: str, value: np.ndarray, dtype: str) -> None:
        """Make what is known up to symbols, an object array of ints and expressions."""

    def add(self, node: Node) -> None: ...

    def recorded(self) -> AbstractContextManager[list[Node]]:
        """The nodes that are added within, which become none of the graph's."""

    def mark(self) -> Any:
        """What has failed so far, for `back_to`: failures of an attempt that is given up do not count."""

    def back_to(self, mark: Any) -> None: ...


class Refused(Exception):
    """The reason why a node cannot be opened."""


def prefix_of(node: Node, *parts: object) -> str:
    """Of names that are new: no model's name has parts in angle brackets."""
    return "/".join([next(filter(None, node.outputs), node.name), *map(str, parts), ""])


def initialisers(tracer: Tracer, graph: GraphProto, prefix: str) -> dict[str, str]:
    """A subgraph's constants by their names there, made once however often it runs."""
    names = {tensor.name: prefix + tensor.name for tensor in graph.initializer}
    for tensor in graph.initializer:
        if names[tensor.name] not in tracer.emitter.graph_types:
            tracer.constant(names[tensor.name], load_tensor(tensor, tracer.external))
    return names


def captured(graph: GraphProto) -> list[str]:
    """The names of what a subgraph, which has no inputs, reads of what is around it."""
    own = {t.name for t in graph.initializer} | {o for n in graph.node for o in n.output}
    names = (*(name for n in graph.node for name in reads(n)), *(o.name for o in graph.output))
    return [name for name in dict.fromkeys(names) if name not in own]


def visit_body(tracer: Tracer, graph: GraphProto, given: Mapping[str, str], prefix: str) -> list[str]:
    """Visit a subgraph's nodes, where `given` are the values from outside; returns the names of its outputs."""
    names = dict(given)
    lost = dict.fromkeys(tracer.lost)
    known = ChainMap[str, Any](names, tracer.emitter.graph_types, tracer.groups, lost)
    for opened in open_body(sorted_nodes(graph.node, known), names, {}, prefix):
        tracer.visit(opened)
    return [names.get(o.name, o.name) for o in graph.output]


def subgraph(node: Node, name: str, inputs: int, outputs: int, *, more: bool = False) -> GraphProto:
    """A subgraph that takes and gives as many values as it should, or gives more. Raises Refused."""
    graph = node.attrs[name]
    if not isinstance(graph, GraphProto):
        raise Refused(f"{name} is no graph")
    given, made = len(graph.input), len(graph.output)
    if given != inputs or made < outputs or (made > outputs and not more):
        raise Refused(f"{name} takes {given} and gives {made} values, where {inputs} and {outputs} are needed")
    return graph


def formals(body: GraphProto, given: Sequence[str]) -> dict[str, str]:
    """What a body's inputs are called outside."""
    return {formal.name: name for formal, name in zip(body.input, given, strict=True)}


def visit_nodes(tracer: Tracer, op: str, inputs: Sequence[str], outputs: Sequence[str], **attrs: Any) -> None:
    tracer.visit(helper.make_node(op, inputs, outputs, **attrs))


def visit_node(tracer: Tracer, op: str, inputs: Sequence[str], output: str, **attrs: Any) -> str:
    visit_nodes(tracer, op, inputs, [output], **attrs)
    return output


def constant(tracer: Tracer, name: str, value: Any) -> str:
    tracer.constant(name, np.asarray(value))
    return name


def unsqueeze(tracer: Tracer, version: int, x: str, axis: int, output: str, op: str = "Unsqueeze") -> str:
    """A new axis of size 1, as the opset says it."""
    if version < 13:
        return visit_node(tracer, op, [x], output, axes=[axis])
    return visit_node(tracer, op, [x, constant(tracer, f"{output}<axes>", [axis])], output)


def squeeze(tracer: Tracer, version: int, x: str, axis: int, output: str) -> str:
    """Without an axis of size 1."""
    return unsqueeze(tracer, version, x, axis, output, "Squeeze")


def scalar(tracer: Tracer, name: str) -> Dim | bool | None:
    """The value of one number or flag where it is known, up to symbols. Raises Refused where it is not one."""
    value = tracer.emitter.value(name)
    if value is None:
        return None
    if value.size != 1:
        raise Refused(f"'{name}' has {value.size} elements, where one is needed")
    element = value.reshape(-1)[0]
    return element.item() if isinstance(element, np.generic) else element  # type: ignore[no-any-return]


def number(tracer: Tracer, name: str) -> int | None:
    """The same, None where symbols are left."""
    value = scalar(tracer, name)
    return int(value) if isinstance(value, (int, float)) else None


def is_lost(tracer: Tracer, node: Node, names: Sequence[str]) -> bool:
    """Did one of the body's results get lost? The node's outputs are, then."""
    if not tracer.lost.intersection(names):
        return False
    tracer.lost.update(filter(None, node.outputs))
    return True


def stack(tracer: Tracer, version: int, elements: Sequence[str], axis: int, output: str, prefix: str) -> None:
    """Join tensors along a new axis."""
    wide = [unsqueeze(tracer, version, name, axis, f"{prefix}{i}/<wide>") for i, name in enumerate(elements)]
    visit_node(tracer, "Concat", wide, output, axis=axis)


def move_first(tracer: Tracer, x: str, axis: int, output: str) -> str:
    """The first axis moved to where `axis` is. Raises Refused where the tensor has no such axis."""
    rank = len(tracer.emitter.graph_types[x].shape)
    if not -rank <= axis < rank:
        raise Refused(f"axis {axis} of a tensor of rank {rank}")
    order = list(range(1, rank))
    order.insert(axis % rank, 0)
    return visit_node(tracer, "Transpose", [x], output, perm=order)
