"""Calls of functions, opened: the model's local functions, and operators that the ONNX standard defines by a body.

Both come as a FunctionProto and are opened the same way: the body's nodes with the call's names and attributes. The
importer opens a call when it stands in front of it, because a *context-dependent* body is written by the standard's
schema for the types at hand (LayerNormalization's Cast, for one).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnx import IR_VERSION, AttributeProto, FunctionProto, GraphProto, NodeProto, checker, defs, helper

from llmc.errors import ModelError
from llmc.graph import TensorType
from llmc.importer.reader import describe, domain_of, subgraphs
from llmc.importer.types import type_proto


def breach(node: NodeProto, version: int) -> str | None:
    """How a node breaks the standard's rules of arity and attributes; None where it does not, or has none to keep."""
    if not defs.has(node.op_type, version, domain_of(node)) or any(True for _ in subgraphs(node)):
        return None
    context = checker.C.CheckerContext()
    context.ir_version, context.opset_imports = IR_VERSION, {node.domain: version}
    try:
        checker.check_node(node, context)
    except checker.ValidationError as error:
        return str(error).strip().splitlines()[0]
    return None


def standard_body(node: NodeProto, version: int, types: Sequence[TensorType | None]) -> FunctionProto | None:
    """The standard's own definition of an operator in terms of others, None where it has none.

    `version` is the opset of the node's domain; `types` are those of its inputs, None where one is absent.
    """
    try:
        schema = defs.get_schema(node.op_type, version, domain_of(node))
    except defs.SchemaError:
        return None
    if schema.has_function and (fits := [v for v in schema.function_opset_versions if v <= version]):
        return FunctionProto.FromString(schema.get_function_with_opset_version(max(fits)))
    if schema.has_context_dependent_function:
        fits = [v for v in schema.context_dependent_function_opset_versions if v <= version]
        if fits:
            inputs = [type_proto(t).SerializeToString() for t in types]
            body = schema.get_context_dependent_function_with_opset_version(max(fits), node.SerializeToString(), inputs)
            return FunctionProto.FromString(body) if body else None
    return None


def has_standard_body(node: NodeProto, version: int) -> bool:
    """Does the standard define this operator by others, for some types at least?"""
    try:
        schema = defs.get_schema(node.op_type, version, domain_of(node))
    except defs.SchemaError:
        return False
    return bool(schema.has_function or schema.has_context_dependent_function)


def default_attributes(node: NodeProto, version: int) -> dict[str, AttributeProto]:
    """The schema's default of every attribute that has one; empty for an unknown operator."""
    try:
        schema = defs.get_schema(node.op_type, version, domain_of(node))
    except defs.SchemaError:
        return {}
    return {n: a.default_value for n, a in schema.attributes.items() if a.default_value.type}


def open_call(call: NodeProto, function: FunctionProto, defaults: Mapping[str, AttributeProto]) -> list[NodeProto]:
    """The nodes of a function's body, in the caller's names; `defaults` hold for attributes that the call leaves out.

    Raises ModelError for too many arguments.
    """
    if len(call.input) > len(function.input) or len(call.output) > len(function.output):
        raise ModelError(f"more inputs or outputs than function '{function.name}' has", where=describe(call))
    prefix = f"{next(filter(None, call.output), call.name)}/"
    names = dict.fromkeys(function.input, "") | dict(zip(function.input, call.input, strict=False))
    copied = [(out, actual) for out, actual in zip(function.output, call.output, strict=False) if out in names]
    names |= {o: a for o, a in zip(function.output, call.output, strict=False) if a and o not in names}
    attributes = {**defaults, **{a.name: a for a in function.attribute_proto}}
    attributes |= {a.name: a for a in call.attribute}
    body = open_body(function.node, names, attributes, prefix)
    return [*body, *(helper.make_node("Identity", [names[o]], [a]) for o, a in copied if a)]


def open_body(
    nodes: Sequence[NodeProto], names: dict[str, str], attributes: Mapping[str, AttributeProto], prefix: str
) -> list[NodeProto]:
    """Copies of `nodes` with values renamed by `names`, and by `prefix` where they are new."""
    opened = []
    for node in nodes:
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.name = prefix + (node.name or node.op_type)
        for out in node.output:
            if out:
                names.setdefault(out, prefix + out)
        copy.input[:] = [names.get(i, i) for i in node.input]
        copy.output[:] = [names.get(o, o) for o in node.output]
        _bind_attributes(copy, names, attributes)
        opened.append(copy)
    return opened


def _bind_attributes(node: NodeProto, names: Mapping[str, str], attributes: Mapping[str, AttributeProto]) -> None:
    """Replace references to the function's attributes by their values; rename what subgraphs capture."""
    bound = []
    for attribute in node.attribute:
        if attribute.ref_attr_name:
            if attribute.ref_attr_name not in attributes:
                continue  # not given and no default: the operator's own default holds
            value = AttributeProto()
            value.CopyFrom(attributes[attribute.ref_attr_name])
            value.name = attribute.name
            bound.append(value)
        else:
            for graph in (*([attribute.g] if attribute.type == AttributeProto.GRAPH else ()), *attribute.graphs):
                _rename_captured(graph, names, attributes)
            bound.append(attribute)
    bound = [AttributeProto.FromString(a.SerializeToString()) for a in bound]
    del node.attribute[:]
    node.attribute.extend(bound)


def _rename_captured(graph: GraphProto, names: Mapping[str, str], attributes: Mapping[str, AttributeProto]) -> None:
    own = {i.name for i in graph.input} | {t.name for t in graph.initializer}
    own |= {o for n in graph.node for o in n.output}
    outer = {k: v for k, v in names.items() if k not in own}
    for node in graph.node:
        node.input[:] = [outer.get(i, i) for i in node.input]
        _bind_attributes(node, outer, attributes)
    for out in graph.output:
        out.name = outer.get(out.name, out.name)
