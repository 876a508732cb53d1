"""An If that runs in the artifact: each branch is a graph with sizes of its own, and only the one taken is entered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmc.graph import LLMC, Node, TensorType
from llmc.importer.bodies import Body, add, body_of, check_one, check_tensors, outside
from llmc.importer.opening import Refused, Tracer, is_lost, prefix_of
from llmc.importer.own_sizes import SAME, OwnSizes, SameSizes

Visit = Callable[
    [str, str, Callable[[str], str]], list[str]
]  # by name, with a prefix, and what values are called in it
_SIDES = ("then", "else")


@dataclass(frozen=True)
class _Side:
    """A branch, what its inputs are called around it, and what it gives, in symbols around it as far as there are."""

    body: Body
    inputs: tuple[str, ...]
    types: list[TensorType]


def run_if(tracer: Tracer, node: Node, visit: Visit) -> None:
    """Add an If that chooses when it runs.

    Where the branches give tensors of other ranks in sizes of their own, they are tried once more in the sizes around
    them: what one demands may decide the condition, as a Squeeze does that stands behind a test for 1.

    Raises Refused, and Unify or Narrow for what both branches demand.
    """
    check_one(tracer, node.inputs[0], "bool")
    mark, prefixes = tracer.mark(), [prefix_of(node, name) for name in _SIDES]
    one, other = (OwnSizes(tracer, prefix) for prefix in prefixes)
    sides = _visited(tracer, node, visit, prefixes, [one, other])
    if sides is not None:
        one.check_both(other)
        if _strangers(sides):
            tracer.back_to(mark)
            together = [f"{prefix}<together>/" for prefix in prefixes]
            sides = _visited(tracer, node, visit, together, [SAME, SAME])
    if sides is None:
        return
    if strangers := _strangers(sides):
        a, b = strangers[0]
        raise Refused(f"its condition is known at run time only, and its branches give {a} and {b}")
    types = [
        outside(tracer, prefix_of(node, f"<output {n}>"), a, b, [side.body for side in sides], node.outputs)
        for n, (a, b) in enumerate(zip(*(side.types for side in sides), strict=True))
    ]
    attrs: dict[str, Any] = {name: side.body.graph for name, side in zip(_SIDES, sides, strict=True)}
    attrs |= {"types": tuple(types), "sizes": tuple(side.body.sizes for side in sides)}
    told = (size.around for side in sides for size in side.body.sizes)
    makers = (tracer.emitter.measured[s] for s in told if s in tracer.emitter.measured)
    inputs = (node.inputs[0], *(i for side in sides for i in side.inputs), *dict.fromkeys(makers))
    add(tracer, Node("If", inputs, node.outputs, attrs, LLMC, node.name, 1), types)


def _visited(
    tracer: Tracer, node: Node, visit: Visit, prefixes: Sequence[str], sizes: Sequence[SameSizes]
) -> list[_Side] | None:
    """Both branches. None where something in them failed. Raises Refused."""
    results, recorded = [], []
    for name, prefix, own in zip(_SIDES, prefixes, sizes, strict=True):
        with tracer.recorded() as nodes:
            results.append(visit(name, prefix, own.read))
        recorded.append(nodes)
    if is_lost(tracer, node, [*results[0], *results[1]]):
        return None
    sides = []
    for prefix, outputs, nodes, own in zip(prefixes, results, recorded, sizes, strict=True):
        check_tensors(tracer, outputs)
        body = body_of(tracer, prefix.removesuffix("/"), [], nodes, outputs, own)
        inner = [tracer.emitter.graph_types[o] for o in outputs]
        types = [replace(t, shape=tuple(map(own.outside, t.shape))) for t in inner]
        sides.append(_Side(body, tuple(map(own.around, body.graph.inputs)), types))
    return sides


def _strangers(sides: Sequence[_Side]) -> list[tuple[TensorType, TensorType]]:
    """The outputs that no type fits."""
    pairs = zip(*(side.types for side in sides), strict=True)
    return [(a, b) for a, b in pairs if a.dtype != b.dtype or len(a.shape) != len(b.shape)]
