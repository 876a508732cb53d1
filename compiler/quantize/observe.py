"""What recipes know of the values that a model's linear layers read: statistics over a calibration set.

The model measures itself: `observe` gives its graph other outputs, so that compiling and running it on samples yields a
few numbers for each input channel, however many tokens there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from llmc.graph import LLMC, Editor, Graph, Node, TensorType, prune


@dataclass(frozen=True)
class Statistics:
    """max|x| of each input channel, float32 [K], by the name of the value that linear layers read."""

    largest: Mapping[str, np.ndarray]

    def of(self, edit: Editor, weight: str) -> list[np.ndarray]:
        """Those of the values that are multiplied with `weight`, where they were measured."""
        linears = (n for n in edit.consumers.get(weight, ()) if n.op == "Linear" and n.domain == LLMC)
        return [self.largest[n.inputs[0]] for n in linears if n.inputs[0] in self.largest]

    def __str__(self) -> str:
        return "\n".join(f"{name}: {_summary(row)}" for name, row in self.largest.items())


def _summary(row: np.ndarray) -> str:
    order = np.argsort(-row)[:4]
    top = ", ".join(f"{row[k]:.1f} in channel {k}" for k in order)
    return f"median {np.median(row):.2f}, largest {top}"


def linear_inputs(graph: Graph) -> list[str]:
    """The values that linear layers outside bodies of control flow read, each once."""
    return list(dict.fromkeys(n.inputs[0] for n in graph.nodes if n.op == "Linear" and n.domain == LLMC))


def observe(graph: Graph) -> Graph:
    """A graph with linear layers, as the quantise stage leaves it -> the same with max|x| over all tokens as its only
    outputs: float32 [K] for each of `linear_inputs`."""
    edit = Editor(graph)
    outputs = []
    for x in linear_inputs(graph):
        *leading, K = graph.types[x].shape
        magnitude, largest = edit.fresh(f"{x}.magnitude"), edit.fresh(f"{x}.largest")
        edit.add(Node("Abs", (x,), (magnitude,), version=13), [graph.types[x]])
        attrs = {"axes": list(range(len(leading))), "keepdims": 0}
        edit.add(Node("ReduceMax", (magnitude,), (largest,), attrs, version=13), [TensorType((K,), "float32")])
        outputs.append(largest)
    nodes = tuple(edit.nodes.values())
    return prune(replace(graph, nodes=nodes, types=edit.types, outputs=tuple(outputs)))


def statistics(graph: Graph, runs: Iterable[Sequence[np.ndarray]]) -> Statistics:
    """What runs of the observed `graph` gave, together: of each its outputs, in order."""
    largest: dict[str, np.ndarray] = {}
    for outputs in runs:
        for x, row in zip(linear_inputs(graph), outputs, strict=True):
            largest[x] = np.maximum(row, largest[x]) if x in largest else row
    return Statistics(largest)
