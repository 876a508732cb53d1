"""Nodes that change nothing go first: casts to the type that is there, factors of one. Exporters write them wherever a
model's source had them, and no pattern expects them.
"""

from __future__ import annotations

from llmc.graph import Editor, Graph, Node, same_dim
from llmc.match import nodes, other, scalar


def drop_no_ops(graph: Graph) -> Graph:
    edit, more = Editor(graph), True
    while more:  # what reads a dropped node is another node from then on
        more = False
        for node in nodes(edit, "Identity", "Cast", "Reshape", "Expand", "Dropout", "Concat", "Mul"):
            source = _unchanged(edit, node)
            if source is not None and _replaceable(edit, node.outputs[0], source):
                edit.remove(node)
                edit.replace_uses(node.outputs[0], source)
                more = True
    return edit.finish()


def _replaceable(edit: Editor, name: str, source: str) -> bool:
    """An output of the graph keeps its name, which whoever makes the source must be able to take."""
    outputs = edit.graph.outputs
    return name not in outputs or (source in edit.producer and source not in outputs)


def _unchanged(edit: Editor, node: Node) -> str | None:
    """The input that the node gives on as it is; None where it changes it."""
    source = node.inputs[0]
    if node.op == "Mul":
        ones = [i for i in node.inputs if scalar(edit, i) == 1]
        if not ones:
            return None
        source = other(node, ones[0])
    if node.op == "Dropout" and node.input(2):
        return None  # its rule looks at what the run says of training
    x, y = edit.types[source], edit.types[node.outputs[0]]
    same = len(x.shape) == len(y.shape) and all(map(same_dim, x.shape, y.shape))
    return source if same and x.dtype == y.dtype and not any(node.outputs[1:]) else None
