"""Types that no memory can hold: operators can ask for any size, and products of sizes overflow in 64 bits."""

from __future__ import annotations

from llmc.errors import ModelError
from llmc.graph import Graph, graphs
from llmc.importer.tensors import check_size


def check_sizes(graph: Graph) -> Graph:
    """The graph itself. Raises ModelError for a value of more than 2^40 bytes, 32 dimensions, or a negative one.

    Symbolic dimensions count as 1: what they are is checked when the model is called.
    """
    for inner in graphs(graph):
        _check(inner)
    return graph


def _check(graph: Graph) -> None:
    makers = graph.producer()
    for name, type_ in graph.types.items():
        try:
            check_size(tuple(d for d in type_.shape if isinstance(d, int)), 1, f"value '{name}'")
        except ModelError as error:
            maker = makers.get(name)
            where = f"node '{maker.name or name}' ({maker.op})" if maker else error.where
            raise ModelError(error.what, where=where, hint="no machine can run it; export the model again") from None
