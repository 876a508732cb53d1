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
from llmc.quantize.rtn import round_to_e4m3, round_to_nearest, round_to_range, round_to_table
from llmc.quantize.smooth import smooth
from llmc.quantize.widen import fold_widened, widen_halves
from llmc.schedules.formats import E4M3, QuantizedWeight

_SMALLEST = 4096  # weights below this many elements gain nothing


def quantize(graph: Graph, format: Format | None, statistics: Statistics | None = None) -> Graph:
    """Linear layers as `Linear` nodes; with a format, their float weights as `QuantizedWeight`s.

    Weights that arrive quantised stay as they are, whatever `format` says. A format with a recipe takes `statistics` of
    the graph without a format.
    """
    graph = fold_widened(find_linears(lift_rows(take_apart(read_quantized(widen_halves(graph))))))
    graph = with_bodies(graph, lambda body: quantize(body, format))
    if format is None:
        return graph
    if statistics is not None and format.recipe == "smooth":
        graph = smooth(graph, statistics)
    return _apply(graph, format, statistics)


def _apply(graph: Graph, format: Format, statistics: Statistics | None) -> Graph:
    edit = Editor(graph)
    heads = _output_layers(graph)
    looked_up = {n.inputs[0] for n in graph.nodes if n.op == "Embedding" and n.domain == LLMC}
    constants = dict(graph.constants)
    done: dict[str, str] = {}
    for node in nodes(edit, "Linear", domain=LLMC):
        name = node.inputs[1]
        weight = constants[name]
        if name not in done:
            if not isinstance(weight, np.ndarray) or weight.size < _SMALLEST:
                continue
            done[name] = format.activations
            if format.bits < 16:
                head = name in heads or (format.table == E4M3 and name in looked_up)
                channels = None
                if statistics is not None and format.recipe == "outliers":
                    channels = outlier_channels(statistics.of(edit, name))
                constants[name] = _rounded(weight, format, head, channels)
                if head and format.activations == "fp8":  # 8-bit floats multiply their own kind alone
                    done[name] = "a32"
        edit.remove(node)
        edit.add(replace(node, attrs={**node.attrs, "activations": done[name]}))
    return prune(replace(edit.finish(), constants=constants))


def _rounded(weight: np.ndarray, format: Format, head: bool, channels: np.ndarray | None) -> QuantizedWeight:
    """A weight [N, K] in the format, or as an output layer has it. `channels` get no codes."""
    if format.table == E4M3 and not head:
        return round_to_e4m3(weight)
    if format.table and not head:
        return round_to_table(weight, format.table, format.group_size, powers=format.powers)
    bits = format.head_bits if head else format.bits
    nearest = round_to_range if format.asymmetric and bits < 8 else round_to_nearest
    rounded = nearest(weight, bits, format.group_size)
    return rounded if channels is None else split(weight, rounded, channels)


def _output_layers(graph: Graph) -> set[str]:
    """Weights of the linears that make a graph output and are wide: a vocabulary, not a hidden state."""
    producer = graph.producer()
    heads = set()
    for output in graph.outputs:
        node: Node | None = producer.get(output)
        if node is not None and node.op == "Cast":  # a float16 model's
            node = producer.get(node.inputs[0])
        if node is not None and node.op == "Linear" and node.domain == LLMC:
            type_: TensorType = graph.types[node.inputs[1]]
            if type_.shape[0] >= 4 * type_.shape[1]:
                heads.add(node.inputs[1])
    return heads
