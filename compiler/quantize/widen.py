"""Models whose arithmetic is float16 compute in float32; their weights stay float16, as do their inputs and outputs.

What is in between is then more exact than the model asks for, never less. Kernels round x to float16 where they
multiply it with float16 weights on tensor cores, and every other operator is the same for all models. onnxruntime does
likewise on CPUs, where it has no float16 kernels.

Operators that are known to take any float type read and make float32. Between them and all others stand Casts. Weights
stand behind Casts, too, which `linears` looks through; what it leaves is folded.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from llmc.graph import Editor, Graph, Node, TensorType, prune
from llmc.match import array, nodes

HALF, WIDE = "float16", "float32"
_TO_HALF, _TO_WIDE = 10, 1  # of ONNX's types
_LARGE = 256  # elements of a matrix that may be a layer's

# Without any of these a model is as well served by its operators' own float16 rules.
_PRODUCTS = {
    "": {"MatMul", "Gemm", "Attention", "Conv"},
    "com.microsoft": {"MatMulNBits", "Attention", "MultiHeadAttention", "GroupQueryAttention", "FusedMatMul"},
}
# Whose results have the type of what they read, or are no floats.
_ANY_FLOAT = {
    "": {
        *("MatMul", "Gemm", "Attention", "Conv", "RotaryEmbedding", "Einsum"),
        *("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Sum", "Mean", "Where", "Clip", "PRelu"),
        *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "IsNaN", "IsInf"),
        *("Abs", "Neg", "Sign", "Reciprocal", "Round", "Ceil", "Floor", "Sqrt", "Exp", "Log", "Erf", "Sin", "Cos"),
        *("Relu", "LeakyRelu", "Elu", "Selu", "Celu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Softplus"),
        *("Softsign", "Gelu", "Mish", "Swish", "ThresholdedRelu", "Dropout"),
        *("Softmax", "LogSoftmax", "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"),
        *("BatchNormalization", "InstanceNormalization", "GroupNormalization", "LpNormalization"),
        *("ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceMean", "ReduceSumSquare", "ReduceL1"),
        *("ReduceL2", "ArgMax", "ArgMin", "TopK", "CumSum"),
        *("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Resize"),
        *("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Expand", "Tile", "Concat", "Split"),
        *("Slice", "Gather", "GatherElements", "GatherND", "Pad", "Trilu", "Shape", "Size"),
    },
    "com.microsoft": {
        *("MatMulNBits", "Attention", "MultiHeadAttention", "GroupQueryAttention", "FusedMatMul", "RotaryEmbedding"),
        *("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "SkipLayerNormalization"),
        *("EmbedLayerNormalization", "Gelu", "BiasGelu", "FastGelu", "QuickGelu", "BiasAdd", "GatherBlockQuantized"),
    },
}


def widen_halves(graph: Graph) -> Graph:
    """The graph with float16 products, and what surrounds them, in float32; others as they are."""
    halves = {name for name, type_ in graph.types.items() if type_.dtype == HALF}
    if not any(n.op in _PRODUCTS.get(n.domain, ()) and halves & {*n.inputs} for n in graph.nodes):
        return graph
    return _Widening(graph, halves).graph()


class _Widening:
    """One graph on its way. A float16 value has up to two names, for either type."""

    def __init__(self, graph: Graph, halves: set[str]) -> None:
        self.old, self.halves = graph, halves
        self.types, self.constants = dict(graph.types), dict(graph.constants)
        self.nodes: list[Node] = []
        self.as_wide: dict[str, str] = {}
        self.as_half: dict[str, str] = {}
        self.layers = _layers(graph, halves)

    def graph(self) -> Graph:
        for node in self.old.nodes:
            if node.op == "Cast" and not node.domain and node.attrs["to"] in (_TO_HALF, _TO_WIDE):
                self._cast(node)
            elif node.op in _ANY_FLOAT.get(node.domain, ()):
                self._any_float(node)
            else:
                self.nodes.append(replace(node, inputs=tuple(map(self._half, node.inputs))))
        made = {name for node in self.nodes for name in node.outputs}
        for name in self.old.outputs:
            if name in self.halves and name not in made and name in self.as_wide:
                self._add_cast(self.as_wide[name], name, _TO_HALF)
        wide = replace(self.old, nodes=tuple(self.nodes), types=self.types, constants=self.constants)
        return prune(wide)

    def _cast(self, node: Node) -> None:
        """Between the two types there is nothing to do; an output of the graph keeps its own."""
        (source,), (out,) = node.inputs, node.outputs
        given = self.old.types[source].dtype
        if given not in (HALF, WIDE):  # integers, and other floats
            if out in self.halves:
                name = self.as_wide[out] = self._fresh(out)
                self.nodes.append(replace(node, outputs=(name,), attrs={**node.attrs, "to": _TO_WIDE}))
            else:
                self.nodes.append(node)
            return
        if out in self.halves:
            self.as_wide[out] = self._wide(source)
        else:
            self.nodes.append(Node("Identity", (self._wide(source),), (out,), name=node.name, version=1))

    def _any_float(self, node: Node) -> None:
        outputs = []
        for out in node.outputs:
            if out in self.halves:
                self.as_wide[out] = self._fresh(out)
            outputs.append(self.as_wide.get(out, out))
        inputs = tuple(map(self._wide, node.inputs))
        self.nodes.append(replace(node, inputs=inputs, outputs=tuple(outputs)))

    def _wide(self, name: str) -> str:
        """The value as float32, if it is a float16."""
        if name not in self.halves:
            return name
        if name not in self.as_wide:
            wide = self.as_wide[name] = self._fresh(name)
            value = self.constants.get(name)
            if isinstance(value, np.ndarray) and name not in self.layers:
                self.constants[wide] = value.astype(np.float32)
            else:
                self._add_cast(name, wide, _TO_WIDE)
        return self.as_wide[name]

    def _half(self, name: str) -> str:
        """The value as float16, where it was one."""
        if name not in self.as_wide or name in self.constants or name in self.old.inputs:
            return name
        if name not in self.as_half:
            self.as_half[name] = name
            self._add_cast(self.as_wide[name], name, _TO_HALF)
        return name

    def _add_cast(self, source: str, out: str, to: int) -> None:
        self.nodes.append(Node("Cast", (source,), (out,), {"to": to}, version=13))

    def _fresh(self, name: str) -> str:
        wide = f"{name}.{WIDE}"
        while wide in self.types:
            wide += "_"
        self.types[wide] = TensorType(self.types[name].shape, WIDE)
        return wide


def _layers(graph: Graph, halves: set[str]) -> set[str]:
    """Large float16 matrices that only products and lookups read."""
    readers = graph.consumers()

    def fits(name: str) -> bool:
        return all(
            not node.domain
            and (
                (
                    node.op in ("MatMul", "Gemm")
                    and node.inputs[1] == name
                    and name not in (node.inputs[0], *node.inputs[2:])
                )
                or (node.op == "Gather" and node.inputs[0] == name)
                or (node.op == "Transpose" and fits(node.outputs[0]))
            )
            for node in readers.get(name, [])
        )

    large = {
        n for n in halves if isinstance(v := graph.constants.get(n), np.ndarray) and v.ndim == 2 and v.size >= _LARGE
    }
    return {name for name in large if fits(name)}


def fold_widened(graph: Graph) -> Graph:
    """Casts of float16 constants that no layer took become float32 constants."""
    edit = Editor(graph)
    for node in nodes(edit, "Cast"):
        value = array(edit, node.inputs[0])
        if value is not None and value.dtype == np.float16 and node.attrs["to"] == _TO_WIDE:
            edit.remove(node)
            edit.replace_uses(node.outputs[0], edit.constant(node.outputs[0], value.astype(np.float32)))
    return edit.finish()
