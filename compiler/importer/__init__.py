"""The import stage: an ONNX file becomes a typed Graph with symbolic dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from llmc.errors import ShapeError
from llmc.graph import Dim, Graph, TensorType, as_dim
from llmc.importer.reader import read_model
from llmc.importer.sizes import check_sizes
from llmc.importer.trace import trace_model
from llmc.importer.types import Signature, read_signature
from llmc.ops import RULES
from llmc.ops.context import Narrow, Rule, Unify
from llmc.tvm_shim import Analyzer, substitute

__all__ = ["import_model"]


def import_model(
    path: str | Path,
    dims: Mapping[str, int | tuple[int, int]] | None = None,
    *,
    rules: Mapping[tuple[str, str], Rule] = RULES,
) -> Graph:
    """Read an ONNX model (opset 7 to the newest of the installed onnx, com.microsoft, local functions).

    `dims` fixes symbolic dimensions to numbers, or bounds them to (least, greatest). The graph is complete: every value
    has a type over the model's symbols (int64 variables named by dim_param), constants are views of the mapped files,
    shape arithmetic is gone, and no node is dead.

    Raises ModelError for a damaged or hostile file, UnsupportedError listing every node that cannot be compiled,
    ShapeError where dimensions contradict each other, OptionError for a dimension that the model does not have.
    """
    model = read_model(path)
    signature = read_signature(model.inputs, dims or {})
    while True:  # ends: every round has one symbol less, or fewer sizes of one
        try:
            return check_sizes(trace_model(model, signature, rules))
        except Narrow as found:
            signature = replace(signature, ranges={**signature.ranges, found.symbol.name: found.value})
        except Unify as found:
            signature = _replace_symbol(signature, found)


def _replace_symbol(signature: Signature, found: Unify) -> Signature:
    """The signature after the model turned out to need `found.symbol == found.value`."""
    name = found.symbol.name
    low, high = signature.ranges.get(name, (0, None))
    if isinstance(found.value, int) and not (low <= found.value and (high is None or found.value <= high)):
        raise ShapeError(f"dimension '{name}' must be {found.value}, outside of its range {low} to {high}")
    analyzer = Analyzer()

    def new(dim: Dim) -> Dim:
        return dim if isinstance(dim, int) else as_dim(analyzer.simplify(substitute(dim, {found.symbol: found.value})))

    return replace(
        signature,
        types={n: TensorType(tuple(map(new, t.shape)), t.dtype) for n, t in signature.types.items()},
        symbols={n: new(d) for n, d in signature.symbols.items()},
        extents={n: new(d) for n, d in signature.extents.items()},
        ranges={n: r for n, r in signature.ranges.items() if n != name},
    )
