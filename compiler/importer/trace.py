"""One walk over a model's nodes that learns the type of every value, and so turns the model into a Graph.

For each node, in this order: what only computes shapes becomes a shape value; what has a rule is run for its types,
and folded if all of it is constant and small; calls of local functions, operators that the standard defines by
others, and control flow are opened. Whatever remains is collected, so that a user learns of every unsupported node at
once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import AttributeProto, FunctionProto, NodeProto, helper

from llmc.errors import LlmcError, ModelError, UnsupportedError
from llmc.graph import LLMC, Graph, Node, TensorType, prune
from llmc.importer.control import CONTROL, open_control
from llmc.importer.fold import fold, may_fold
from llmc.importer.functions import breach, default_attributes, has_standard_body, open_call, standard_body
from llmc.importer.opening import Group, Refused
from llmc.importer.reader import MAX_NODES, Model, describe, domain_of, opset_versions
from llmc.importer.sequences import GROUPS, open_group
from llmc.importer.tensors import ExternalData, load_tensor
from llmc.importer.types import STRING, UNCOMPILED, Signature
from llmc.importer.types_only import TypeBuilder
from llmc.ops.context import SHAPE_VALUE, Emitter, Rule, Unify, bind, symbols
from llmc.ops.values import evaluate
from llmc.tvm_shim import Analyzer, relax, tirx

MAX_DEPTH = 32
_CONTRIB = "com.microsoft"
_TENSORS = "outputs of a compiled model are tensors: give those that it holds"


@dataclass(frozen=True)
class Failure:
    """A node that cannot be compiled, as the user knows it."""

    name: str
    domain: str
    op: str
    version: int
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.domain or 'ai.onnx'}.{self.op}, opset {self.version}): {self.reason}"


@dataclass(frozen=True)
class _Scope:
    """Where a node stands: the opsets that hold there, the calls around it, and the model's node that it comes from."""

    opsets: Mapping[str, int]
    calls: tuple[str, ...] = ()
    origin: NodeProto | None = None


def trace_model(model: Model, signature: Signature, rules: Mapping[tuple[str, str], Rule]) -> Graph:
    """Type the whole model. Raises Unify, UnsupportedError with all failures, ShapeError or ModelError."""
    builder = TypeBuilder()
    try:
        return _Trace(model, signature, rules, builder).run()
    finally:
        builder.close()


class _Trace:
    def __init__(
        self, model: Model, signature: Signature, rules: Mapping[tuple[str, str], Rule], builder: TypeBuilder
    ) -> None:
        self.model, self.signature = model, signature
        analyzer = Analyzer()
        for name, bounds in signature.ranges.items():
            bind(analyzer, {**signature.extents, **signature.symbols}[name], bounds)
        self.emitter = Emitter(rules, builder, analyzer)
        self.emitter.extents = signature.extents
        self.nodes: list[Node] = []
        self.failures: dict[tuple[str, str], Failure] = {}
        self.lost: set[str] = set()  # outputs of failed nodes, and all that follows from them
        self.groups: dict[str, Group] = {}  # sequences and optionals, of which nothing is left in the graph
        self.visited = 0
        self.cause: Exception | None = None  # the first error that was not raised on purpose

    def run(self) -> Graph:
        for name, type_ in self.signature.types.items():
            self._variable(name, type_)
        for name, array in self.model.constants.items():
            self._constant(name, array)
        scope = _Scope(self.model.opsets)
        for node in self.model.nodes:
            self._visit(node, scope)
        if self.failures:
            listed = "".join(f"\n  {f}" for f in self.failures.values())
            count = len(self.failures)
            raise UnsupportedError(
                f"{count} node{'s' * (count > 1)} cannot be compiled:{listed}",
                where=self.model.name,
                hint="export the model without these operators, or another opset of it",
            ) from self.cause
        for info in self.model.outputs:
            if info.name in self.groups:
                kind = "an optional" if self.groups[info.name].optional else "a sequence"
                raise UnsupportedError(f"output '{info.name}' is {kind}", where=self.model.name, hint=_TENSORS)
        self._unify_outputs()
        return self._graph()

    # -- what is known of values --------------------------------------------------------------------------------
    def _variable(self, name: str, type_: TensorType) -> None:
        if name in self.emitter.graph_types:
            raise ModelError(f"value '{name}' is made twice")
        self.emitter.graph_types[name] = type_
        if type_.dtype not in UNCOMPILED:
            self.emitter.exprs[name] = relax.Var(name, relax.TensorType(list(type_.shape), type_.carrier))

    def _constant(self, name: str, array: np.ndarray) -> None:
        dtype = STRING if array.dtype.kind == "U" else array.dtype.name
        self._variable(name, TensorType(tuple(array.shape), dtype))
        self.emitter.constants[name] = array

    def _value(self, name: str, value: np.ndarray, dtype: str) -> None:
        """A shape value; one without symbols is an ordinary constant."""
        if all(isinstance(v, int) for v in value.flat):
            self._constant(name, value.astype(dtype))
            return
        self._variable(name, TensorType(tuple(value.shape), dtype))
        self.emitter.values[name] = value
        measured = dict.fromkeys(
            self.emitter.measured[s] for v in value.flat for s in symbols(v) if s in self.emitter.measured
        )
        self.nodes.append(Node(SHAPE_VALUE, tuple(measured), (name,), {"value": value}, LLMC, name))

    # -- nodes --------------------------------------------------------------------------------------------------
    def _visit(self, proto: NodeProto, scope: _Scope) -> None:
        self.visited += 1
        if self.visited > MAX_NODES:
            raise ModelError(f"functions and loops unfold into more than {MAX_NODES} nodes", where=self.model.name)
        self._check(proto, scope)
        node = self._node(proto, scope)
        if self.lost.intersection(node.inputs):
            self.lost.update(node.outputs)
            if not self._supported(proto, node, scope):
                self._fail(node, scope, "no rule for this operator")
            return
        if proto.op_type == "Constant" and not node.domain:
            self._constant(node.outputs[0], _constant_value(proto, node, self.model.external))
        elif not (
            self._open_group(node, scope)
            or self._evaluate(node)
            or self._open_local(proto, node, scope)
            or self._open_control(node, scope)
            or self._run(proto, node, scope)
        ):
            self.lost.update(filter(None, node.outputs))

    def _check(self, proto: NodeProto, scope: _Scope) -> None:
        """Inputs exist, and arity and attributes are those of the standard. Raises ModelError."""
        for name in filter(None, proto.input):
            if name not in self.emitter.graph_types and name not in self.lost and name not in self.groups:
                raise ModelError(f"input '{name}' is made by nothing", where=describe(proto))
        if reason := breach(proto, scope.opsets.get(domain_of(proto), 1)):
            raise ModelError(reason, where=describe(proto))

    def _node(self, proto: NodeProto, scope: _Scope) -> Node:
        domain = domain_of(proto)
        if (
            not domain
            and ("", proto.op_type) not in self.emitter.rules
            and (_CONTRIB, proto.op_type) in self.emitter.rules
        ):
            domain = _CONTRIB  # onnxruntime writes some of its own operators into the standard's domain
        return Node(
            proto.op_type,
            tuple(proto.input),
            tuple(proto.output),
            {a.name: attribute_value(a, self.model.external) for a in proto.attribute},
            domain,
            proto.name,
            scope.opsets.get(domain, 1),
        )

    def _types(self, node: Node) -> list[TensorType | None]:
        return [self.emitter.graph_types.get(i) if i else None for i in node.inputs]

    def _evaluate(self, node: Node) -> bool:
        """Is the node's value known up to the model's symbols?"""
        inputs = [self.emitter.value(i) if i else None for i in node.inputs]
        results = evaluate(node, inputs, self._types(node), self.emitter.analyzer)
        if results is None:
            return False
        for name, (value, dtype) in zip(node.outputs, results, strict=False):
            if name:
                self._value(name, value, dtype)
        return True

    def _run(self, proto: NodeProto, node: Node, scope: _Scope) -> bool:
        """Run the node's rule; where there is none, or it declines, open the standard's definition."""
        if any(name in self.groups for name in node.inputs):
            return self._fail(node, scope, "it works on a sequence or an optional")
        for type_ in self._types(node):
            if type_ is not None and type_.dtype in UNCOMPILED:
                return self._fail(node, scope, f"it works on {UNCOMPILED[type_.dtype]}")
        try:
            types = self.emitter.run(node)
        except UnsupportedError as error:
            return (
                self._fold(proto, node, None)
                or self._open_standard(proto, node, scope)
                or self._fail(node, scope, error.what)
            )
        except (Unify, LlmcError):
            raise
        except Exception as error:  # operands that no valid model has: rules and TVM's checks raise anything then
            self.cause = self.cause or error
            return self._fail(
                node, scope, f"its operands do not fit: {(str(error).strip() or repr(error)).splitlines()[-1]}"
            )
        if not self._fold(proto, node, [t for t in types if t is not None]):
            self.nodes.append(self.emitter.remember(node))
        return True

    def _fold(self, proto: NodeProto, node: Node, types: list[TensorType] | None) -> bool:
        constants = [self.emitter.constants.get(i) if i else None for i in node.inputs]
        if node.domain or any(c is None for c, i in zip(constants, node.inputs, strict=True) if i):
            return False
        results = fold(proto, node.version, constants) if may_fold(proto, constants, types) else None
        if results is None:
            return False
        for name, array in zip(filter(None, node.outputs), results, strict=True):
            self.emitter.graph_types.pop(name, None)
            self._constant(name, array)
        return True

    # -- calls --------------------------------------------------------------------------------------------------
    def _open_local(self, proto: NodeProto, node: Node, scope: _Scope) -> bool:
        function = self.model.functions.get((domain_of(proto), proto.op_type))
        return function is not None and self._open(proto, function, {}, scope, scope.origin)

    def _open_standard(self, proto: NodeProto, node: Node, scope: _Scope) -> bool:
        body = standard_body(proto, node.version, self._types(node))
        if body is None:
            return False
        return self._open(proto, body, default_attributes(proto, node.version), scope, scope.origin or proto)

    def _open(
        self,
        call: NodeProto,
        body: FunctionProto,
        defaults: Mapping[str, AttributeProto],
        scope: _Scope,
        origin: NodeProto | None,
    ) -> bool:
        if len(scope.calls) >= MAX_DEPTH or call.op_type in scope.calls:
            raise ModelError(f"function '{call.op_type}' calls itself, or nests too deep", where=self.model.name)
        opsets = {**scope.opsets, **opset_versions(body.opset_import)}
        inner = _Scope(opsets, (*scope.calls, call.op_type), origin)
        for opened in open_call(call, body, defaults):
            self._visit(opened, inner)
        return True

    def _open_group(self, node: Node, scope: _Scope) -> bool:
        """Does it work on sequences or optionals?"""
        try:
            return open_group(_Opener(self, scope), node)
        except Refused as reason:
            self.lost.update(filter(None, node.outputs))
            self._fail(node, scope, str(reason))
            return True

    def _open_control(self, node: Node, scope: _Scope) -> bool:
        """Is it control flow that stands for other nodes?"""
        if node.domain or node.op not in CONTROL:
            return False
        try:
            open_control(_Opener(self, scope), node)
        except Refused as reason:
            return self._fail(node, scope, str(reason))
        return True

    # -- failures -----------------------------------------------------------------------------------------------
    def _supported(self, proto: NodeProto, node: Node, scope: _Scope) -> bool:
        """Might this node be compiled, if what stands before it were?"""
        return (
            (node.domain, node.op) in self.emitter.rules
            or (domain_of(proto), node.op) in self.model.functions
            or node.op in ("Constant", *CONTROL, *GROUPS)
            or has_standard_body(proto, node.version)
        )

    def _fail(self, node: Node, scope: _Scope, reason: str) -> bool:
        if scope.origin is not None:
            reason = f"its standard definition needs {node.op}: {reason}"
            node = self._node(scope.origin, _Scope(self.model.opsets))
        name = node.name or node.outputs[0]
        self.failures.setdefault((name, node.op), Failure(name, node.domain, node.op, node.version, reason))
        return False

    # -- the result ---------------------------------------------------------------------------------------------
    def _unify_outputs(self) -> None:
        """A declared output dimension that is also an input's says what that input's is, where it is computed.

        attention_mask's `total` is past + seq because present is declared [.., total, ..] and computed as that.
        """
        for info in self.model.outputs:
            declared = info.type.tensor_type.shape.dim
            computed = self.emitter.graph_types[info.name].shape
            for dim, actual in zip(declared, computed, strict=False):
                symbol = self.signature.dim(dim.dim_param) if dim.dim_param else None
                derived = not isinstance(actual, (int, tirx.Var))
                if derived and isinstance(symbol, tirx.Var) and symbol not in symbols(actual):
                    raise Unify(symbol, actual)

    def _graph(self) -> Graph:
        used = {s.name for t in self.signature.types.values() for d in t.shape for s in symbols(d)}
        return prune(
            Graph(
                name=self.model.name,
                inputs=tuple(self.signature.types),
                outputs=tuple(o.name for o in self.model.outputs),
                nodes=tuple(self.nodes),
                types=dict(self.emitter.graph_types),
                constants=dict(self.emitter.constants),
                symbols={n: r for n, r in self.signature.ranges.items() if n in used},
            )
        )


class _Opener:
    """The walk, as opening control flow sees it: everything that it visits stands in one scope."""

    def __init__(self, trace: _Trace, scope: _Scope) -> None:
        self.emitter, self.lost, self.external = trace.emitter, trace.lost, trace.model.external
        self.groups = trace.groups
        self.constant, self.variable, self.value = trace._constant, trace._variable, trace._value
        self._trace, self._scope = trace, scope

    def visit(self, proto: NodeProto) -> None:
        self._trace._visit(proto, self._scope)

    def visited(self) -> int:
        return self._trace.visited

    def add(self, node: Node) -> None:
        self._trace.nodes.append(node)

    @contextmanager
    def recorded(self) -> Iterator[list[Node]]:
        around, self._trace.nodes = self._trace.nodes, []
        try:
            yield self._trace.nodes
        finally:
            self._trace.nodes = around

    def mark(self) -> tuple[dict[tuple[str, str], Failure], set[str]]:
        return dict(self._trace.failures), set(self.lost)

    def back_to(self, mark: tuple[dict[tuple[str, str], Failure], set[str]]) -> None:
        failures, lost = mark
        self._trace.failures = dict(failures)
        self.lost.intersection_update(lost)


def attribute_value(attribute: AttributeProto, external: ExternalData) -> Any:
    """An attribute as a Python value: int, float, str, numpy array, tuple of these; graphs stay GraphProto."""
    match attribute.type:
        case AttributeProto.STRING:
            return attribute.s.decode("utf-8", "replace")
        case AttributeProto.STRINGS:
            return tuple(s.decode("utf-8", "replace") for s in attribute.strings)
        case AttributeProto.TENSOR:
            return load_tensor(attribute.t, external)
        case AttributeProto.TENSORS:
            return tuple(load_tensor(t, external) for t in attribute.tensors)
    value = helper.get_attribute_value(attribute)
    return tuple(value) if isinstance(value, (list, tuple)) or hasattr(value, "append") else value


def _constant_value(proto: NodeProto, node: Node, external: ExternalData) -> np.ndarray:
    """The value of a Constant node (its attribute has one of several names). Raises ModelError."""
    dtypes = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32, "value_floats": np.float32}
    for name, value in node.attrs.items():
        if name == "value":
            return np.asarray(value)
        if name in dtypes:
            return np.array(value, dtypes[name])
        if name in ("value_string", "value_strings"):
            return np.array(value, np.str_)
    raise UnsupportedError("this kind of constant", where=f"node '{proto.name or node.outputs[0]}'")
