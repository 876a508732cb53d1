"""A random graph as plain data: what the generator makes, the minimiser shrinks, and a JSON file keeps.

Weights and inputs are not stored: a value that nothing computes is uniform over its own range, from a seed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import onnx
from onnx import helper, numpy_helper

MS = "com.microsoft"
RUNS = 2  # calls of a compiled graph, each with its own sizes


@dataclass(frozen=True)
class Length:
    """A dimension that is known at run time: a sum of symbols, each some times, and a number (the symbol "")."""

    terms: tuple[tuple[str, int], ...]

    @staticmethod
    def symbol(name: str) -> Length:
        return Length(((name, 1),))

    def at(self, sizes: Mapping[str, int]) -> int:
        return sum(times * (sizes[name] if name else 1) for name, times in self.terms)

    def __add__(self, other: Dim) -> Length:
        terms = dict(self.terms)
        for name, times in other.terms if isinstance(other, Length) else (("", other),):
            terms[name] = terms.get(name, 0) + times
        return Length(tuple(sorted((n, t) for n, t in terms.items() if t)))

    __radd__ = __add__

    def __mul__(self, times: int) -> Length:
        return Length(tuple((n, t * times) for n, t in self.terms))

    __rmul__ = __mul__

    def __str__(self) -> str:
        """As a dim_param says it."""
        parts = [str(t) if not n else n if t == 1 else f"{t} * {n}" for n, t in reversed(self.terms)]
        return " + ".join(parts).replace("+ -", "- ")


Dim: TypeAlias = int | Length


@dataclass(frozen=True)
class Value:
    """A tensor, its elements within [low, high].

    `error` bounds how far rounding can take an element from what exact arithmetic gives: in the graph as it is written,
    and in its float model, where llmc rounds activations as it pleases.
    """

    name: str
    dtype: str
    shape: tuple[Dim, ...]
    low: float
    high: float
    error: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Node:
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    domain: str = ""


@dataclass(frozen=True)
class Program:
    """A graph in topological order. `values` describes every value by name, `inputs` are fed at run time.

    `constants` holds a seed or the data of each initializer. `floats` names the nodes that stand in the float model for
    those that make the same values here: what llmc computes where a graph rounds activations.
    """

    opset: int
    sizes: tuple[dict[str, int], ...]
    values: dict[str, Value]
    inputs: tuple[str, ...]
    constants: dict[str, int | list[Any]]
    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]
    floats: dict[str, Node] = field(default_factory=dict)

    def float_model(self) -> Program:
        """The same graph without rounded activations."""
        nodes = [self.floats.get(n.outputs[0], n) for n in self.nodes]
        return pruned(replace(self, nodes=tuple(nodes), floats={}))


def pruned(program: Program) -> Program:
    """The program without nodes and constants that no output needs; its inputs stay."""
    needed, kept = set(program.outputs), []
    for node in reversed(program.nodes):
        if needed & set(node.outputs):
            kept.append(node)
            needed |= set(node.inputs)
            needed |= {i for o in node.outputs if o in program.floats for i in program.floats[o].inputs}
    made = {o for n in kept for o in n.outputs}
    constants = {name: data for name, data in program.constants.items() if name in needed}
    values = {n: v for n, v in program.values.items() if n in made or n in constants or n in program.inputs}
    floats = {name: node for name, node in program.floats.items() if name in made}
    return replace(program, values=values, constants=constants, nodes=tuple(reversed(kept)), floats=floats)


# -- to ONNX ------------------------------------------------------------------------------------------------------
def element_type(dtype: str) -> int:
    """TensorProto's element type of a dtype's name."""
    return helper.np_dtype_to_tensor_dtype(numpy_type(dtype))


def numpy_type(dtype: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, dtype, dtype))


def to_model(program: Program) -> onnx.ModelProto:
    """The program as an ONNX model. Shapes of outputs are left to whoever reads it."""

    def info(name: str, shaped: bool) -> onnx.ValueInfoProto:
        value = program.values[name]
        shape = [d if isinstance(d, int) else str(d) for d in value.shape] if shaped else None
        return helper.make_tensor_value_info(name, element_type(value.dtype), shape)

    graph = helper.make_graph(
        [
            helper.make_node(n.op, n.inputs, n.outputs, name=f"/{n.outputs[0]}", domain=n.domain, **n.attrs)
            for n in program.nodes
        ],
        "fuzz",
        [info(name, True) for name in program.inputs],
        [info(name, False) for name in program.outputs],
        [numpy_helper.from_array(constant(program, name), name) for name in program.constants],
    )
    opsets = [helper.make_opsetid("", program.opset), helper.make_opsetid(MS, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=11)


def constant(program: Program, name: str) -> np.ndarray:
    """An initializer's array."""
    value, data = program.values[name], program.constants[name]
    if isinstance(data, int):
        return _uniform(value, {}, data)
    return np.asarray(data).astype(numpy_type(value.dtype)).reshape([int(d) for d in value.shape])  # type: ignore[arg-type]


def feeds(program: Program, run: int) -> dict[str, np.ndarray]:
    """Arrays of all inputs for the call number `run`."""
    sizes = program.sizes[run]
    return {name: _uniform(program.values[name], sizes, 1000 * run + i) for i, name in enumerate(program.inputs)}


def _uniform(value: Value, sizes: Mapping[str, int], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    shape = [d if isinstance(d, int) else d.at(sizes) for d in value.shape]
    dtype = numpy_type(value.dtype)
    if value.dtype.startswith("float"):
        return np.asarray(rng.uniform(value.low, value.high, shape)).astype(dtype)
    return np.asarray(rng.integers(int(value.low), int(value.high) + 1, shape)).astype(dtype)


# -- as JSON ------------------------------------------------------------------------------------------------------
def save(program: Program, path: Path) -> None:
    """Write a program as a JSON file that `load` reads."""
    path.write_text(json.dumps(asdict(program), indent=1) + "\n", encoding="utf-8")


def load(path: Path) -> Program:
    """The program of a JSON file."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    return Program(
        raw["opset"],
        tuple(raw["sizes"]),
        {name: _value(v) for name, v in raw["values"].items()},
        tuple(raw["inputs"]),
        raw["constants"],
        tuple(map(_node, raw["nodes"])),
        tuple(raw["outputs"]),
        {name: _node(n) for name, n in raw["floats"].items()},
    )


def _value(raw: Mapping[str, Any]) -> Value:
    error: Sequence[float] = raw["error"]
    return Value(
        raw["name"], raw["dtype"], tuple(map(_dim, raw["shape"])), raw["low"], raw["high"], (error[0], error[1])
    )


def _dim(raw: Any) -> Dim:
    return raw if isinstance(raw, int) else Length(tuple((name, times) for name, times in raw["terms"]))


def _node(raw: Mapping[str, Any]) -> Node:
    return Node(raw["op"], tuple(raw["inputs"]), tuple(raw["outputs"]), raw["attrs"], raw["domain"])
