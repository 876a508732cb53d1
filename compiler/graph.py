"""The typed graph: what the importer makes, recipes and fusions rewrite, and lowering turns into Relax.

Rewrites happen on this small graph and not on Relax because its use-def is plain (names), its constants may be lazily
mapped or quantised, symbolic dimensions are compared by one analyzer, and a pattern over it reads as ordinary Python.
Relax takes over where it is strong: memory planning, the virtual machine, and fusing the operators that no kernel
template covers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np

from llmc.schedules.formats import QuantizedWeight
from llmc.tvm_shim import Analyzer, Expr, tirx

Dim: TypeAlias = int | Expr
Constant: TypeAlias = np.ndarray | QuantizedWeight

LLMC = "llmc"  # the domain of fused operators

# Types of which compiled code holds the bits alone, a uint8 for each element, as ml_dtypes' arrays do.
NARROW = frozenset(
    {
        *("int2", "uint2", "int4", "uint4", "float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    }
)
CARRIER = "uint8"


@dataclass(frozen=True)
class TensorType:
    """Shape (ints, or TVM integer expressions over the model's symbols) and numpy dtype name."""

    shape: tuple[Dim, ...]
    dtype: str

    @property
    def carrier(self) -> str:
        """The type of its elements in compiled code."""
        return CARRIER if self.dtype in NARROW else self.dtype

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(dim_text, self.shape))}]"


@dataclass(frozen=True)
class Node:
    """One operator. `domain` is "" for ai.onnx, "com.microsoft", or "llmc" for fused operators.

    `inputs` holds value names, "" where an optional input is absent; `version` is the opset that the node obeys.
    """

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    domain: str = ""
    name: str = ""
    version: int = 0

    def input(self, i: int) -> str:
        """Name of input `i`, "" where it is absent."""
        return self.inputs[i] if i < len(self.inputs) else ""

    def __str__(self) -> str:
        op = f"{self.domain}.{self.op}" if self.domain else self.op
        arguments = [*(i or "_" for i in self.inputs), *(f"{k}={_attr_text(v)}" for k, v in self.attrs.items())]
        return f"{', '.join(o or '_' for o in self.outputs)} = {op}({', '.join(arguments)})"


@dataclass(frozen=True)
class Graph:
    """Nodes in topological order; `types` covers every value, constants included.

    `symbols` bounds the symbolic dimensions by name: (least, greatest), None where there is no greatest.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    types: Mapping[str, TensorType]
    constants: Mapping[str, Constant]
    symbols: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)

    def producer(self) -> dict[str, Node]:
        """Value name -> the node that makes it."""
        return {out: node for node in self.nodes for out in node.outputs if out}

    def consumers(self) -> dict[str, list[Node]]:
        """Value name -> the nodes that read it."""
        table: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                if name:
                    table.setdefault(name, []).append(node)
        return table

    def __str__(self) -> str:
        lines = [f"graph {self.name}"]
        lines += [f"  input  {name}: {self.types[name]}" for name in self.inputs]
        lines += [f"  {node}  # {self.types.get(node.outputs[0], '?')}" for node in self.nodes]
        lines += [f"  output {name}: {self.types[name]}" for name in self.outputs]
        return "\n".join(lines)


def graphs(graph: Graph) -> Iterator[Graph]:
    """The graph, and all bodies in it: graphs in the attributes of nodes, which an If or a Loop runs."""
    yield graph
    for node in graph.nodes:
        for value in node.attrs.values():
            if isinstance(value, Graph):
                yield from graphs(value)


def with_bodies(graph: Graph, rewrite: Callable[[Graph], Graph]) -> Graph:
    """The graph with each of its own bodies rewritten."""

    def rewritten(node: Node) -> Node:
        if not any(isinstance(value, Graph) for value in node.attrs.values()):
            return node
        return replace(node, attrs={k: rewrite(v) if isinstance(v, Graph) else v for k, v in node.attrs.items()})

    return replace(graph, nodes=tuple(map(rewritten, graph.nodes)))


def as_dim(expr: Any) -> Dim:
    """A TVM integer expression as a Python int where it is constant."""
    return int(expr) if isinstance(expr, (int, np.integer, tirx.IntImm)) else expr


def dim_text(dim: Dim) -> str:
    """A dimension as people write it."""
    return re.sub(r"T\.int64\((-?\d+)\)", r"\1", str(dim))


def _attr_text(value: Any) -> str:
    if isinstance(value, Graph):
        return "\n    " + str(value).replace("\n", "\n    ") + "\n  "
    if not isinstance(value, np.ndarray):
        return str(value)
    if value.size > 16:
        return f"<{value.dtype}{list(value.shape)}>"
    items = ", ".join(map(dim_text, value.flat))
    return f"[{items}]" if value.ndim else items


def same_dim(a: Dim, b: Dim) -> bool:
    """Are two dimensions provably equal?"""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(Analyzer().can_prove_equal(a, b))


def prune(graph: Graph) -> Graph:
    """Drop nodes, constants and types that no output needs, and sort nodes topologically."""
    producer = graph.producer()
    order: list[Node] = []
    done: set[int] = set()
    stack: list[tuple[Node, bool]] = [(producer[o], False) for o in reversed(graph.outputs) if o in producer]
    while stack:
        node, ready = stack.pop()
        if id(node) in done:
            continue
        if ready:
            done.add(id(node))
            order.append(node)
            continue
        stack.append((node, True))
        stack += [(producer[i], False) for i in reversed(node.inputs) if i in producer and id(producer[i]) not in done]
    used = {*graph.inputs, *graph.outputs, *(v for n in order for v in (*n.inputs, *n.outputs))}
    return replace(
        graph,
        nodes=tuple(order),
        types={k: v for k, v in graph.types.items() if k in used},
        constants={k: v for k, v in graph.constants.items() if k in used},
    )


class Editor:
    """A mutable view of a graph for one rewrite: change it, then `finish` gives a new, pruned, sorted graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.types = dict(graph.types)
        self.constants = dict(graph.constants)
        self.nodes: dict[int, Node] = {id(n): n for n in graph.nodes}
        self.producer = graph.producer()
        self.consumers = graph.consumers()
        self.renamed: dict[str, str] = {}
        self._fresh = 0

    def fresh(self, hint: str) -> str:
        """A value name that nothing uses yet."""
        name = hint
        while name in self.types:
            self._fresh += 1
            name = f"{hint}.{self._fresh}"
        return name

    def constant(self, hint: str, value: Constant) -> str:
        """Add a constant; returns its name."""
        name = self.fresh(hint)
        shape, dtype = (
            (value.q.shape, "float32") if isinstance(value, QuantizedWeight) else (value.shape, value.dtype.name)
        )
        self.types[name] = TensorType(tuple(map(int, shape)), dtype)
        self.constants[name] = value
        return name

    def add(self, node: Node, types: Iterable[TensorType] = ()) -> Node:
        """Add a node. Outputs that other nodes made are taken over; `types` names those of new outputs."""
        for out, type_ in zip(node.outputs, types, strict=False):
            if out:
                self.types[out] = type_
        for out in node.outputs:
            old = self.producer.get(out)
            if old is not None and id(old) in self.nodes:
                kept = tuple("" if o in node.outputs else o for o in old.outputs)
                self.remove(old)
                if any(kept):
                    self._insert(replace(old, outputs=kept))
        self._insert(node)
        return node

    def _insert(self, node: Node) -> None:
        self.nodes[id(node)] = node
        for out in node.outputs:
            if out:
                self.producer[out] = node
        for name in dict.fromkeys(node.inputs):
            if name:
                self.consumers.setdefault(name, []).append(node)

    def remove(self, node: Node) -> None:
        """Take a node out; its outputs must be made by another, or be unused, when `finish` is called."""
        self.nodes.pop(id(node), None)
        for name in dict.fromkeys(node.inputs):
            if name:
                self.consumers[name] = [n for n in self.consumers[name] if n is not node]
        for out in node.outputs:
            if self.producer.get(out) is node:
                del self.producer[out]

    def replace_uses(self, old: str, new: str) -> None:
        """Every reader of `old` reads `new` from now on. Where `old` is an output of the graph, whoever makes `new`
        makes it under the name `old`; an input or constant needs an Identity for that."""
        self._redirect(old, new)
        if old not in self.graph.outputs:
            return
        maker = self.producer.get(new)
        if maker is None or new in self.graph.outputs:
            self.add(Node("Identity", (new,), (old,), version=1))
            return
        self.remove(maker)
        self.add(replace(maker, outputs=tuple(old if o == new else o for o in maker.outputs)))
        self._redirect(new, old)

    def _redirect(self, old: str, new: str) -> None:
        for node in list(self.consumers.get(old, ())):
            self.remove(node)
            self._insert(replace(node, inputs=tuple(new if i == old else i for i in node.inputs)))

    def finish(self) -> Graph:
        return prune(replace(self.graph, nodes=tuple(self.nodes.values()), types=self.types, constants=self.constants))
