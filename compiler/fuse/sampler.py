"""The function that chooses a decoder's tokens where its logits are: `sample`, a graph of one operator.

It stands beside step and decode in artifacts for GPUs, so that a token comes back from there and not a row of logits.
"""

from __future__ import annotations

from llmc.graph import LLMC, Graph, Node, TensorType
from llmc.schedules.sampling.sample import SampleWorkload
from llmc.tvm_shim import tirx


def sampler_of(vocab_size: int) -> Graph:
    """The graph: inputs and output are those of the workload."""
    w, rows = SampleWorkload(vocab_size), tirx.Var("rows", "int64")
    types = {
        arg.name: TensorType(tuple(rows if isinstance(d, str) else d for d in arg.shape), arg.dtype)
        for arg in (*w.inputs(), *w.outputs())
    }
    inputs, outputs = (tuple(arg.name for arg in args) for args in (w.inputs(), w.outputs()))
    return Graph("sample", inputs, outputs, (Node("Sample", inputs, outputs, domain=LLMC),), types, {})
