"""What a rule sees of a node, and the emitter that runs rules one after another into a Relax block builder.

A *rule* says what one ONNX operator means, as a Relax expression. The importer runs it to learn output types, lowering
runs it again to get code: there is no second statement of an operator's shapes.

A *shape value* is a small integer tensor that is known in terms of the model's symbols: a numpy object array of ints
and TVM expressions. In a graph it is the output of an `llmc.ShapeValue` node, so exporters' shape arithmetic is gone
before any rule runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from operator import mul
from typing import Any, NoReturn, TypeAlias

import numpy as np

from llmc.errors import ShapeError, UnsupportedError
from llmc.graph import CARRIER, NARROW, Dim, Graph, Node, TensorType, as_dim, dim_text
from llmc.ops.equal_dims import same_polynomial, sizes_where_equal, solve
from llmc.ops.zeros import zeros
from llmc.schedules.formats import QuantizedWeight
from llmc.tvm_shim import Analyzer, Expr, relax, te, tirx, tvm

Result: TypeAlias = Expr | tuple[Expr | None, ...]
Rule = Callable[["Context"], Result]

MOST = 2.0**40  # elements that the extents found by one node may make together
MEASURED = "measured"  # the attribute that holds the symbols of extents which a node finds at run time
_TO_SHAPE = "vm.builtin.tensor_to_shape"

# Operators of ai.onnx that only move elements, whatever these are, and all that take narrow types.
MOVES = {
    *("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Expand", "Tile", "Concat", "Split"),
    *("Slice", "Gather", "GatherElements", "GatherND", "DepthToSpace", "SpaceToDepth"),
}
NARROW_OPS = MOVES | {"Cast", "CastLike", "QuantizeLinear", "DequantizeLinear", "Shape", "Size", "BitCast"}

SHAPE_VALUE = "ShapeValue"  # in the domain llmc; attrs {"value": object array of ints and TVM expressions}


class Unify(Exception):
    """Two dimensions must be equal for a node to make sense: the importer substitutes `symbol` and starts again."""

    def __init__(self, symbol: Expr, value: Dim | tuple[int, int | None]) -> None:
        super().__init__(f"{symbol} = {value}")
        self.symbol, self.value = symbol, value


class Narrow(Unify):
    """The same, where several sizes do: the importer keeps to `value`, (least, greatest), and starts again."""

    value: tuple[int, int | None]


class Context:
    """One node while its rule runs."""

    def __init__(self, emitter: Emitter, node: Node) -> None:
        self.emitter, self.node, self.bb = emitter, node, emitter.bb
        self.narrow: dict[int, str] = {}  # outputs whose elements are of a type that only its bits represent
        self.measures: list[Any] = []

    # -- inputs -------------------------------------------------------------------------------------------------
    def has(self, i: int) -> bool:
        return bool(self.node.input(i))

    def __len__(self) -> int:
        return len(self.node.inputs)

    def x(self, i: int = 0) -> Expr:
        """Input `i` as a Relax expression. Raises UnsupportedError where it is absent."""
        if not self.has(i):
            self.fail(f"input {i} is required")
        return self.emitter.expr(self.node.input(i))

    def type(self, i: int = 0) -> TensorType:
        """Type of input `i`. Raises UnsupportedError where it is absent."""
        if not self.has(i):
            self.fail(f"input {i} is required")
        return self.emitter.graph_types[self.node.input(i)]

    def shape(self, i: int = 0) -> tuple[Dim, ...]:
        return self.type(i).shape

    def rank(self, i: int = 0) -> int:
        return len(self.type(i).shape)

    def dtype(self, i: int = 0) -> str:
        return self.type(i).dtype

    def const(self, i: int) -> np.ndarray | None:
        """Input `i` where it is a constant of numbers, else None."""
        value = self.emitter.value(self.node.input(i)) if self.has(i) else None
        if value is None or (value.dtype == object and not all(isinstance(v, int) for v in value.flat)):
            return None
        return value.astype(np.int64) if value.dtype == object else value

    def value(self, i: int) -> np.ndarray | None:
        """Input `i` as a shape value: an object array of ints and expressions; None where it is run-time data."""
        value = self.emitter.value(self.node.input(i)) if self.has(i) else None
        if value is None or value.dtype.kind not in "iuO":
            return None
        return objects(value)

    def dims(self, i: int) -> list[Dim]:
        """Input `i` as a list of dimensions. Raises UnsupportedError where it depends on data."""
        value = self.value(i)
        if value is None:
            self.fail(f"input {i} ('{self.node.input(i)}') must be known at compile time, up to symbolic dimensions")
        return list(value.reshape(-1))

    def extents(self, i: int) -> list[Dim]:
        """Input `i`, which holds sizes, as a list of dimensions: those of `dims`, or measured at run time."""
        if self.value(i) is not None:
            return self.dims(i)
        count = 1
        for d in self.shape(i):
            if not isinstance(d, int):
                self.fail(f"input {i} ('{self.node.input(i)}') has an unknown number of sizes")
            count *= d
        if not count:
            return []
        flat = self.emit(relax.op.reshape(self.emit(relax.op.astype(self.x(i), "int64")), [count]))
        return self.bounded(flat, count)

    def bounded(self, sizes: Expr, count: int, checks: Sequence[Dim] = ()) -> list[Dim]:
        """`measured`, where data may ask for anything: the run fails where it asks for what no memory holds."""
        checked = self.emit(self.bb.call_te(_bounded, sizes, count, primfunc_name_hint="bounded"))
        return self.measured(checked, count, [*checks, 1])

    def measured(self, sizes: Expr, count: int, checks: Sequence[Dim] = ()) -> list[Dim]:
        """The elements of an int64 tensor [count], which are not negative, as dimensions that are symbols of their own:
        what they are is known when the model runs, and only then. One that has to equal another dimension is that, and
        the run fails where it does not. `sizes` may have elements behind these that have to equal `checks`."""
        if self.emitter.outer is not None:
            return self.emitter.outer.measured(sizes, count, checks)
        known = self.node.attrs.get(MEASURED, ())
        first, made = len(self.measures), []
        for k in range(first, first + count):
            output = next(filter(None, self.node.outputs))
            name = f"{output}.{k}"
            dim = known[k] if k < len(known) else self.emitter.extents.setdefault(name, tirx.Var(name, "int64"))
            made.append(dim)
            if isinstance(dim, tirx.Var) and not self.emitter.analyzer.can_prove(dim >= 0):  # one that is new
                bind(self.emitter.analyzer, dim, (0, None))
                self.emitter.measured[dim] = output
        self.measures += made
        whole = [*made, *checks]
        shape = relax.op.call_pure_packed(_TO_SHAPE, sizes, ty_args=relax.ShapeType(ndim=len(whole)))
        self.bb.match_cast(self.emit(shape), relax.ShapeType(whole))
        return made

    def ints(self, i: int) -> list[int]:
        """Input `i` as a list of plain ints. Raises UnsupportedError where it is not constant."""
        value = self.const(i)
        if value is None:
            self.fail(f"input {i} ('{self.node.input(i)}') must be constant")
        return [int(v) for v in value.reshape(-1)]

    # -- attributes ---------------------------------------------------------------------------------------------
    def attr(self, name: str, default: Any = None) -> Any:
        return self.node.attrs.get(name, default)

    def axis(self, value: int, rank: int) -> int:
        """A possibly negative axis as 0 <= axis < rank."""
        if not -rank <= value < max(rank, 1):
            self.fail(f"axis {value} is outside of a tensor of rank {rank}")
        return value + rank if value < 0 else value

    # -- results ------------------------------------------------------------------------------------------------
    def emit(self, expr: Expr) -> Expr:
        """Bind an intermediate expression, so that its type can be asked for."""
        return self.bb.emit(expr)

    def literal(self, array: np.ndarray | float | int, dtype: str | None = None) -> Expr:
        return relax.const(np.asarray(array, dtype), dtype)

    def unify(self, a: Dim, b: Dim) -> None:
        """Demand a == b. A free symbol is substituted in the whole model; two unequal numbers are an error."""
        if self.emitter.same(a, b):
            return
        for symbol in reversed(self.emitter.measured):  # a later one may be an earlier one, of which all is known
            for one, other in ((a, b), (b, a)):
                known = isinstance(other, tirx.Var) or not any(s in self.emitter.measured for s in symbols(other))
                if isinstance(one, tirx.Var) and one.same_as(symbol) and known and symbol.name in self.emitter.extents:
                    raise Unify(symbol, other)
        for dim in (a, b):
            if any(s in self.emitter.measured for s in symbols(dim)):
                self.fail(f"dimension {dim} is known at run time only, but has to equal {b if dim is a else a}")
        for one, other in ((a, b), (b, a)):
            if isinstance(one, tirx.Var) and (isinstance(other, int) or one not in symbols(other)):
                raise Unify(one, other)
        if solved := solve(a, b):
            raise Unify(*solved)
        if narrowed := sizes_where_equal(self.emitter.analyzer, a, b):
            symbol, least, greatest = narrowed
            raise Unify(symbol, least) if least == greatest else Narrow(symbol, (least, greatest))
        raise ShapeError(
            f"dimensions {dim_text(a)} and {dim_text(b)} must be equal", where=self.where(), hint=_fixed(a, b)
        )

    def where(self) -> str:
        domain = self.node.domain or "ai.onnx"
        return f"node '{self.node.name or self.node.outputs[0]}' ({domain}.{self.node.op}, opset {self.node.version})"

    def fail(self, reason: str) -> NoReturn:
        """This node cannot be compiled; the importer collects these and reports all at once."""
        raise UnsupportedError(reason, where=self.where())


class Emitter:
    """Runs rules one after another into a Relax block builder. `rules` maps (domain, op) to the rule.

    The importer fills `graph_types`, `values` and `constants` as it goes; for a finished graph `bind_graph` does. The
    `analyzer` knows the ranges of the model's symbols.
    """

    def __init__(self, rules: Mapping[tuple[str, str], Rule], bb: Any, analyzer: Any = None) -> None:
        self.rules, self.bb, self.analyzer = rules, bb, analyzer or Analyzer()
        self.graph_types: dict[str, TensorType] = {}
        self.exprs: dict[str, Expr] = {}
        self.values: dict[str, np.ndarray] = {}
        self.constants: dict[str, Any] = {}
        self.measured: dict[Any, str] = {}  # symbol of an extent that a node finds at run time -> that node's output
        self.extents: dict[str, Dim] = {}  # of such symbols by name: themselves, or what they have to equal
        self.nested: Callable[..., Any] | None = None  # emits the bodies of control flow, where rules do not
        self.outer: Context | None = None  # the node whose rule runs others
        self._measures: dict[str, tuple[Any, ...]] = {}

    @classmethod
    def bind_graph(
        cls, graph: Graph, exprs: Mapping[str, Expr], rules: Mapping[tuple[str, str], Rule], bb: Any
    ) -> Emitter:
        """An emitter that can `run` any primitive node of a finished graph, in any order that respects its inputs.

        `exprs` are the graph's inputs, and those constants that are parameters. The other constants become Relax
        constants where they are first used, and shape values tensors. What lowering makes by other means it adds to
        `exprs` of the emitter itself.
        """
        emitter = cls(rules, bb, bounded_analyzer(graph))
        emitter.graph_types.update(graph.types)
        emitter.constants.update(graph.constants)
        emitter.exprs.update(exprs)
        emitter.values.update({n.outputs[0]: n.attrs["value"] for n in graph.nodes if n.op == SHAPE_VALUE})
        return emitter

    def value(self, name: str) -> np.ndarray | None:
        """What is known of a value at compile time: a constant, or a shape value."""
        if name in self.values:
            return self.values[name]
        constant = self.constants.get(name)
        return constant if isinstance(constant, np.ndarray) else None

    def expr(self, name: str) -> Expr:
        """The Relax expression of a value; constants and shape values become tensors here, on first use."""
        if name not in self.exprs:
            self.exprs[name] = self._materialise(name)
        return self.exprs[name]

    def _materialise(self, name: str) -> Expr:
        value = self.value(name)
        if value is None:
            constant = self.constants.get(name)
            if not isinstance(constant, QuantizedWeight):
                raise KeyError(name)
            value = constant.dequantize()
        if value.dtype.name in NARROW:
            value = value.view(CARRIER)
        if not value.size and isinstance(self.bb, relax.BlockBuilder):
            return zeros(self.bb, value.shape, self.graph_types[name].carrier)
        if value.dtype != object:
            return relax.const(value, value.dtype.name)
        dims = [tirx.IntImm("int64", v) if isinstance(v, int) else v for v in value.reshape(-1)]
        tensor = self.bb.emit(relax.op.shape_to_tensor(relax.ShapeExpr(dims)))
        if value.ndim != 1:
            tensor = self.bb.emit(relax.op.reshape(tensor, value.shape))
        dtype = self.graph_types[name].dtype
        return tensor if dtype == "int64" else self.bb.emit(relax.op.astype(tensor, dtype))

    def run(self, node: Node) -> tuple[TensorType | None, ...]:
        """Emit one node; returns the types of its outputs, None for one that is absent.

        Raises UnsupportedError, ShapeError or Unify.
        """
        if node.op == SHAPE_VALUE:
            return (self.graph_types[node.outputs[0]],)
        ctx = Context(self, node)
        rule = self.rules.get((node.domain, node.op))
        if rule is None:
            ctx.fail("no rule for this operator")
        if not node.domain and node.op not in NARROW_OPS:
            for name in filter(None, node.inputs):
                if self.graph_types[name].dtype in NARROW:
                    ctx.fail(f"it works on {self.graph_types[name].dtype}")
        result = rule(ctx)
        results = result if isinstance(result, tuple) else (result,)
        types: list[TensorType | None] = []
        for i, name in enumerate(node.outputs):
            if not name:
                types.append(None)
                continue
            expr = results[i] if i < len(results) else None
            if expr is None:
                ctx.fail(f"output {i} ('{name}') is not computed")
            var = self.bb.emit(expr)
            self.exprs[name] = var
            self.graph_types[name] = self._type_of(ctx, var, i)
            types.append(self.graph_types[name])
        self._measures[node.outputs[0]] = tuple(ctx.measures)
        return tuple(types)

    def remember(self, node: Node) -> Node:
        """A node that was run, with the symbols that it made: the next run is to use the same."""
        made = self._measures.get(node.outputs[0], ())
        return replace(node, attrs={**node.attrs, MEASURED: made}) if made else node

    def _type_of(self, ctx: Context, var: Any, i: int) -> TensorType:
        shape = getattr(var.ty, "shape", None)
        if not isinstance(shape, relax.ShapeExpr):
            ctx.fail("the output's shape depends on data")
        dtype = ctx.narrow.get(i, str(var.ty.dtype))
        if ctx.node.op in MOVES and ctx.has(0) and ctx.dtype() in NARROW and dtype == CARRIER:
            dtype = ctx.dtype()
        return TensorType(tuple(self.simplify(d) for d in shape.values), dtype)

    def same(self, a: Dim, b: Dim) -> bool:
        """Are two dimensions provably equal?"""
        if isinstance(a, int) and isinstance(b, int):
            return a == b
        return bool(self.analyzer.can_prove_equal(a, b)) or same_polynomial(a, b)

    def simplify(self, dim: Dim) -> Dim:
        return dim if isinstance(dim, int) else as_dim(self.analyzer.simplify(dim))


def _fixed(*dims: Dim) -> str | None:
    """What may help where dimensions are equal for some sizes alone."""
    names = dict.fromkeys(s.name.partition(" in ")[0] for dim in dims for s in symbols(dim))  # a branch's have more
    return f"a size of its own may do: --dim {' --dim '.join(f'{n}=SIZE' for n in names)}" if names else None


def _bounded(sizes: Any, count: int) -> Any:
    """`sizes`, and behind them 1 where the first `count` make a tensor that memory may hold, else -1."""
    wide = [sizes(te.const(n, "int64")).astype("float64") for n in range(count)]
    fits = tirx.all(*(w >= 0 for w in wide), reduce(mul, wide, te.const(1.0, "float64")) <= te.const(MOST, "float64"))
    last = sizes.shape[0]
    flag = tirx.Select(fits, te.const(1, "int64"), te.const(-1, "int64"))

    def element(i: Any) -> Any:
        return te.if_then_else(i < last, sizes(te.min(i, last - 1)), flag)

    return te.compute((last + 1,), element, name="bounded")


def symbols(dim: Dim) -> list[Any]:
    """The symbolic variables inside a dimension."""
    return [] if isinstance(dim, int) else list(tvm.tirx.analysis.undefined_vars(dim))


def bounded_analyzer(graph: Graph) -> Any:
    """An analyzer that knows the ranges of the graph's symbols."""
    analyzer = Analyzer()
    for var in {s for name in graph.inputs for d in graph.types[name].shape for s in symbols(d)}:
        bind(analyzer, var, graph.symbols.get(var.name, (0, None)))
    return analyzer


def bind(analyzer: Any, var: Any, bounds: tuple[int, int | None]) -> None:
    """Tell an analyzer that least <= var <= greatest; without a greatest, any extent that an int32 holds."""
    low, high = bounds
    analyzer.bind(var, tvm.ir.Range(low, (2**31 - 1 if high is None else high) + 1))


def objects(array: np.ndarray) -> np.ndarray:
    """An integer or bool array as an object array of Python ints or bools."""
    return array.astype(object)
