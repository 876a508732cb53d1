"""Runs the small subgraph that makes a mask, at small sizes, with ONNX's own reference implementation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.graph import Dim, Editor, Node
from llmc.match import array, rank
from llmc.tvm_shim import Analyzer, substitute, tirx

_MOST_NODES = 200
MOST_QUERIES = 4096  # of a trial: as many keys, and some tens of bytes for each pair

Sizes = Mapping[Any, int]  # a value for every symbol
Feed = Callable[[str, tuple[int, ...]], np.ndarray]  # values for a leaf of some shape


@dataclass(frozen=True)
class Subgraph:
    """All that `name`, a mask over [B, H, S, T], is computed from."""

    name: str
    nodes: tuple[Node, ...]
    leaves: tuple[str, ...]  # run-time inputs
    constants: tuple[str, ...]
    dims: tuple[Dim, Dim, Dim]  # batch, queries, keys


def subgraph(edit: Editor, name: str, dims: tuple[Dim, Dim, Dim]) -> Subgraph | None:
    """What `name` is computed from; None where that is large or no arithmetic of masks."""
    order: list[Node] = []
    leaves: dict[str, None] = {}
    constants: dict[str, None] = {}
    seen: set[str] = set()

    def visit(value: str) -> bool:
        if not value or value in seen:
            return True
        seen.add(value)
        node = edit.producer.get(value)
        if value in edit.constants:
            constants[value] = None
            return array(edit, value) is not None
        if node is None:
            leaves[value] = None
            return rank(edit, value) <= 2
        known = node.domain == "" or node.op in ("ShapeValue", "Positions")
        if not known or len(order) >= _MOST_NODES or not all(visit(i) for i in node.inputs):
            return False
        order.append(node)
        return True

    if not visit(name):
        return None
    unique = tuple({id(n): n for n in order}.values())
    return Subgraph(name, unique, tuple(leaves), tuple(constants), dims)


def integers(edit: Editor, sub: Subgraph) -> list[int]:
    """Positive integer constants in the subgraph: any could be the size of something."""
    found = set()
    for name in sub.constants:
        value = array(edit, name)
        if value is not None and value.size == 1 and value.dtype.kind in "iuf" and np.isfinite(value).all():
            number = abs(float(value.reshape(-1)[0]))
            if 0 < number < 1 << 17 and number == int(number):
                found.add(int(number))
    return sorted(found)


class Trials:
    """The subgraph, ready to be run at sizes."""

    def __init__(self, edit: Editor, sub: Subgraph) -> None:
        self.edit, self.sub = edit, sub
        dims: list[Dim] = [*sub.dims, *edit.types[sub.name].shape]
        for node in sub.nodes:
            dims += list(node.attrs["value"].flat) if node.op == "ShapeValue" else []
            dims += [d for out in node.outputs if out for d in edit.types[out].shape]
        dims += [d for leaf in sub.leaves for d in edit.types[leaf].shape]
        symbols = {s.name: s for d in dims if not isinstance(d, int) for s in tirx.analysis.undefined_vars(d)}
        batch, queries, _ = sub.dims
        self.role = {
            s: "batch" if s.same_as(batch) else "query" if s.same_as(queries) else "other" for s in symbols.values()
        }

    def at(self, batch: int, query: int, other: int) -> Sizes:
        """Sizes by the symbols' roles; `other` is the past, mostly."""
        return {s: {"batch": batch, "query": query, "other": other}[role] for s, role in self.role.items()}

    def small(self, fed: bool) -> Iterator[Sizes]:
        """Few queries and keys. What is `fed` at random takes more of them, or chance might explain it."""
        for sizes in ((2, 3, 4), (1, 5, 0), (3, 1, 7), *([(4, 9, 2)] if fed else [])):
            yield self.at(*sizes)

    def beyond(self, key: int, more: int) -> Sizes | None:
        """So that there are `more` keys beyond `key`; None where that takes too many queries."""
        if "other" in self.role.values():
            return self.at(1, 2, key + more)
        return self.at(1, key + more, 0) if key <= MOST_QUERIES else None

    def around(self, key: int) -> Sizes | None:
        """So that there are queries on both sides of `key`; None where that takes too many."""
        return self.at(1, key + 2, 1) if key <= MOST_QUERIES else None

    def sizes(self, sizes: Sizes) -> tuple[int, int, int]:
        """B, S, T."""
        B, S, T = (evaluate(d, sizes) for d in self.sub.dims)
        return B, S, T

    def feeds(self, sizes: Sizes, feed: Feed) -> dict[str, np.ndarray]:
        return {
            leaf: feed(leaf, tuple(evaluate(d, sizes) for d in self.edit.types[leaf].shape)) for leaf in self.sub.leaves
        }

    def run(self, sizes: Sizes, feeds: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """The subgraph's value; None where the reference implementation has no such operator."""
        from onnx import helper, numpy_helper
        from onnx.reference.reference_evaluator import ReferenceEvaluator

        values: dict[str, np.ndarray] = dict(feeds)
        values.update({c: np.asarray(self.edit.constants[c]) for c in self.sub.constants})
        for node in self.sub.nodes:
            if node.op == "ShapeValue":
                flat = [evaluate(d, sizes) for d in node.attrs["value"].reshape(-1)]
                values[node.outputs[0]] = np.asarray(flat, np.int64).reshape(node.attrs["value"].shape)
                continue
            if node.op == "Positions":
                batch, start, length = (evaluate(node.attrs[k], sizes) for k in ("batch", "start", "length"))
                values[node.outputs[0]] = np.broadcast_to(start + np.arange(length), (batch, length))
                continue
            try:
                tensors = {k: numpy_helper.from_array(v) for k, v in node.attrs.items() if isinstance(v, np.ndarray)}
                proto = helper.make_node(node.op, node.inputs, node.outputs, **{**node.attrs, **tensors})
                used = [i for i in dict.fromkeys(node.inputs) if i]
                graph = helper.make_graph(
                    [proto],
                    "mask",
                    [
                        helper.make_tensor_value_info(i, helper.np_dtype_to_tensor_dtype(values[i].dtype), None)
                        for i in used
                    ],
                    [helper.make_empty_tensor_value_info(o) for o in node.outputs],
                )
                model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", max(node.version, 11))])
                outputs = ReferenceEvaluator(model).run(None, {i: values[i] for i in used})
            except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError):
                return None
            values.update(zip(node.outputs, outputs, strict=True))
        return np.asarray(values[self.sub.name])


def evaluate(dim: Dim, sizes: Sizes) -> int:
    if isinstance(dim, int):
        return dim
    return int(Analyzer().simplify(substitute(dim, sizes)))
