"""A session keeps caches of its own, and what it hands out is float32: Casts at a decoder's inputs and outputs, which
float16 models have there, are none of its business."""

from __future__ import annotations

from dataclasses import replace

from llmc.graph import Editor, Graph, TensorType
from llmc.match import made_by

_TO_WIDE = 1  # ONNX's float32


def wide_ends(graph: Graph) -> Graph:
    """The graph with float32 inputs where it reads them through Casts, and outputs as they are before Casts."""
    edit, wide = Editor(graph), {}
    for name in graph.inputs:
        readers = edit.consumers.get(name, [])
        if graph.types[name].dtype != "float16" or not all(
            n.op == "Cast" and n.attrs["to"] == _TO_WIDE for n in readers
        ):
            continue
        for node in readers:
            edit.remove(node)
            edit.replace_uses(node.outputs[0], name)
        wide[name] = TensorType(graph.types[name].shape, "float32")
    for name in graph.outputs:
        cast = made_by(edit, name, "Cast")
        maker = edit.producer.get(cast.inputs[0]) if cast is not None else None
        if cast is None or maker is None or edit.types[cast.inputs[0]].dtype != "float32":
            continue
        edit.remove(cast)
        source = cast.inputs[0]
        edit.remove(maker)
        edit.add(replace(maker, outputs=tuple(name if o == source else o for o in maker.outputs)))
        edit.replace_uses(source, name)
        wide[name] = edit.types[source]
    edit.types.update(wide)
    return edit.finish()
