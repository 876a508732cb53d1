"""The quantise stage: find the linear layers, read weights that arrive quantised, round the others by a recipe."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from llmc.graph import LLMC, Editor, Graph, Node, TensorType, prune, with_bodies
from llmc.match import nodes
from llmc.quantize.apart import take_apart
from llmc.quantize.checkpoint import read_quantized
from llmc.quantize.formats import Format
from llmc.quantize.linears import find_linears
from llmc.quantize.observe import Statistics
from llmc.quantize.outliers import outlier_channels, split
from llmc.quantize.rows import lift_rows
from llmc.quantize.rtn import round_to_nearest, round_to_range, round_to_table
from llmc.quantize.smooth import smooth

_SMALLEST = 4096  # weights below this many elements gain nothing


def quantize(graph: Graph, format: Format | None, statistics: Statistics | None = None) -> Graph:
    """Linear layers as `Linear` nodes; with a format, their float weights as `QuantizedWeight`s.

    Weights that arrive quantised stay as they are, whatever `format` says. A format with a recipe takes `statistics` of
    the graph without a format.
    """
    graph = with_bodies(find_linears(lift_rows(take_apart(read_quantized(graph)))), lambda body: quantize(body, format))
    if format is None:
        return graph
    if statistics is not None and format.recipe == "smooth":
        graph = smooth(graph, statistics)
    return _apply(graph, format, statistics)


def _apply(graph: Graph, format: Format, statistics: Statistics | None) -> Graph:
    edit = Editor(graph)
    heads = _output_layers(graph)
    constants = dict(graph.constants)
    done: dict[str, str] = {}
    for node in nodes(edit, "Linear", domain=LLMC):
        name = node.inputs[1]
        weight = constants[name]
        if name not in done:
            if not isinstance(weight, np.ndarray) or weight.size < _SMALLEST:
                continue
            if format.bits < 16:
                bits = format.head_bits if name in heads else format.bits
                if format.table and name not in heads:
                    table = round_to_table(weight, format.table, format.group_size, powers=format.powers)
                    constants[name] = table
                else:
                    nearest = round_to_range if format.asymmetric and bits < 8 else round_to_nearest
                    rounded = nearest(weight, bits, format.group_size)
                    if statistics is not None and format.recipe == "outliers":
                        rounded = split(weight, rounded, outlier_channels(statistics.of(edit, name)))
                    constants[name] = rounded
            done[name] = format.activations
        edit.remove(node)
        edit.add(replace(node, attrs={**node.attrs, "activations": done[name]}))
    return prune(replace(edit.finish(), constants=constants))


def _output_layers(graph: Graph) -> set[str]:
    """Weights of the linears that make a graph output and are wide: a vocabulary, not a hidden state."""
    producer = graph.producer()
    heads = set()
    for output in graph.outputs:
        node: Node | None = producer.get(output)
        if node is not None and node.op == "Linear" and node.domain == LLMC:
            type_: TensorType = graph.types[node.inputs[1]]
            if type_.shape[0] >= 4 * type_.shape[1]:
                heads.add(node.inputs[1])
    return heads
