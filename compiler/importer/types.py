"""Types at the model's edge: element types, and dimensions from `dim_param`s to TVM integer expressions.

A dim_param names a symbol, and one name means one dimension in the whole model. Exporters also write sums into it
("past_sequence_length + sequence_length"): those become expressions where every symbol is some input's own dimension.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from onnx import TensorProto, TypeProto, ValueInfoProto, helper

from llmc.errors import ModelError, OptionError, ShapeError, UnsupportedError
from llmc.graph import Dim, TensorType
from llmc.importer.tensors import NO_SIZE
from llmc.tvm_shim import tirx

STRING = "str"
MAX_DIM_TEXT = 1000  # characters of an expression
MAX_NUMBER = 2**31 - 1
UNCOMPILED = {STRING: "strings", "complex64": "complex numbers", "complex128": "complex numbers"}

_DTYPES = {
    t: STRING if t == TensorProto.STRING else helper.tensor_dtype_to_np_dtype(t).name
    for t in helper.get_all_tensor_dtypes()
    if t != TensorProto.UNDEFINED
}
_ELEM_TYPES = {name: t for t, name in _DTYPES.items()}
_OPERATORS: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.floordiv,
}


def dtype_name(elem_type: int) -> str:
    """TensorProto's element type -> numpy dtype name. Raises KeyError for a type that is not known."""
    return _DTYPES[elem_type]


def type_proto(type_: TensorType | None) -> TypeProto:
    """A type as ONNX's schemas want it; symbolic dimensions by their text."""
    if type_ is None:
        return TypeProto()
    shape = [d if isinstance(d, int) else str(d) for d in type_.shape]
    return helper.make_tensor_type_proto(_ELEM_TYPES[type_.dtype], shape)


@dataclass(frozen=True)
class Signature:
    """Types of the model's inputs, its symbols by name with their ranges, and each input's dimensions as declared."""

    types: Mapping[str, TensorType]
    symbols: Mapping[str, Any]
    ranges: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)  # dim_param -> symbol
    extents: dict[str, Dim] = field(default_factory=dict)  # that the run finds, by name: symbols, or what they equal

    def dim(self, text: str) -> Dim | None:
        """A dim_param over known symbols, None where it holds anything else."""
        return parse_dim(text, {**self.symbols, **{k: self.symbols[v] for k, v in self.names.items()}})

    def required_dim(self, text: str) -> Dim:
        """A dimension of an input. Raises ShapeError where the chosen sizes leave it without a meaning."""
        dim = self.dim(text)
        if dim is None or (isinstance(dim, int) and dim < 0):
            raise ShapeError(f"dimension '{text}' cannot be {dim}", hint="choose other sizes for its symbols")
        return dim


def read_signature(inputs: Sequence[ValueInfoProto], dims: Mapping[str, int | tuple[int, int]]) -> Signature:
    """Types of the graph's inputs. `dims` fixes a symbol to a number, or bounds it to (least, greatest).

    A dimension without a name is called "input_axis". Raises UnsupportedError for inputs that are no tensors or have no
    rank, OptionError for a dimension in `dims` that the model does not have.
    """
    texts = {i.name: _dim_texts(i) for i in inputs}
    bare = [t for shape in texts.values() for t in shape if isinstance(t, str) and t.isidentifier()]
    names = {t: t for t in dict.fromkeys(bare)}
    for text in (t for shape in texts.values() for t in shape if isinstance(t, str)):
        if text not in names and parse_dim(text, dict.fromkeys(names.values(), 1)) is None:
            names[text] = _unused(re.sub(r"\W+", "_", text).strip("_") or "dim", set(names.values()))
    if unknown := [d for d in dims if d not in names and d not in names.values()]:
        raise OptionError(
            f"the model has no dimension '{unknown[0]}'",
            hint="it has " + (", ".join(names.values()) or "no symbolic dimensions"),
        )
    chosen = {names.get(d, d): v for d, v in dims.items()}
    symbols: dict[str, Dim] = {}
    ranges: dict[str, tuple[int, int | None]] = {}
    for name in names.values():
        choice = chosen.get(name)
        low, high = choice if isinstance(choice, tuple) else (choice or 0, choice)
        if low < 0 or (high is not None and high < low):
            raise OptionError(f"dimension '{name}' cannot be {choice}")
        if isinstance(choice, int):
            symbols[name] = choice
        else:
            symbols[name] = tirx.Var(name, "int64")
            ranges[name] = (low, high)
    signature = Signature({}, symbols, ranges, names)
    types = {}
    for info in inputs:
        shape = tuple(t if isinstance(t, int) else signature.required_dim(t) for t in texts[info.name])
        types[info.name] = TensorType(shape, dtype_name(info.type.tensor_type.elem_type))
    return replace(signature, types=types)


def parse_dim(text: str, symbols: Mapping[str, Dim]) -> Dim | None:
    """A dim_param as a dimension: a symbol's name, or + - * / of symbols and numbers. None if it is anything else."""
    if text in symbols:
        return symbols[text]
    if len(text) > MAX_DIM_TEXT:
        return None
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None

    def visit(node: ast.expr) -> Any:
        match node:
            case ast.Name(id=name) if name in symbols:
                return symbols[name]
            case ast.Constant(value=int(number)) if not isinstance(number, bool) and number <= MAX_NUMBER:
                return number
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                result = _OPERATORS[type(op)](visit(left), visit(right))
                if not isinstance(result, int) or abs(result) <= MAX_NUMBER:
                    return result
        raise ValueError(text)

    try:
        return visit(tree)  # type: ignore[no-any-return]
    except (ValueError, ZeroDivisionError, RecursionError):
        return None


def _dim_texts(info: ValueInfoProto) -> list[int | str]:
    where = f"input '{info.name}'"
    if info.type.WhichOneof("value") != "tensor_type":
        kind = (info.type.WhichOneof("value") or "untyped").removesuffix("_type")
        raise UnsupportedError(f"inputs must be tensors, not {kind}", where=where)
    type_ = info.type.tensor_type
    if type_.elem_type not in _DTYPES:
        raise ModelError(f"unknown element type {type_.elem_type}", where=where)
    if not type_.HasField("shape"):
        raise UnsupportedError("its rank is not declared", where=where, hint="export the model with shaped inputs")
    texts: list[int | str] = []
    for axis, dim in enumerate(type_.shape.dim):
        if dim.HasField("dim_value") and dim.dim_value != NO_SIZE:
            if dim.dim_value < 0:
                raise ModelError(f"dimension {dim.dim_value}", where=where)
            texts.append(dim.dim_value)
        else:
            texts.append(dim.dim_param.strip() or _unused(re.sub(r"\W+", "_", f"{info.name}_{axis}"), set()))
    return texts


def _unused(name: str, taken: set[str]) -> str:
    name = name if name.isidentifier() else f"d_{name}"
    number = 1
    while name in taken:
        number += 1
        name = f"{name}_{number}"
    return name
