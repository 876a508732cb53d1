"""Names and references: every value is made once and before it is read, in every graph; no function calls itself.

What the walks here recurse into nests at most `scan.MAX_SUBGRAPHS` deep.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto

from llmc.errors import ModelError, UnsupportedError
from llmc.importer.scan import MAX_NODES
from llmc.importer.tensors import check_size

FunctionId = tuple[str, str]  # domain, name

# The field of an attribute that holds its value.
_VALUE_FIELDS = {
    AttributeProto.FLOAT: "f",
    AttributeProto.INT: "i",
    AttributeProto.STRING: "s",
    AttributeProto.TENSOR: "t",
    AttributeProto.GRAPH: "g",
    AttributeProto.SPARSE_TENSOR: "sparse_tensor",
    AttributeProto.TYPE_PROTO: "tp",
    AttributeProto.FLOATS: "floats",
    AttributeProto.INTS: "ints",
    AttributeProto.STRINGS: "strings",
    AttributeProto.TENSORS: "tensors",
    AttributeProto.GRAPHS: "graphs",
    AttributeProto.SPARSE_TENSORS: "sparse_tensors",
    AttributeProto.TYPE_PROTOS: "type_protos",
}
_ASIDE = {"name", "doc_string", "type", "ref_attr_name"}


def domain_of(proto: NodeProto | FunctionProto) -> str:
    """The operator domain; "ai.onnx" is another spelling of ""."""
    return "" if proto.domain == "ai.onnx" else str(proto.domain)


def describe(node: NodeProto) -> str:
    """A node in an error message."""
    return f"node '{node.name or next(iter(node.output), '')}' ({domain_of(node) or 'ai.onnx'}.{node.op_type})"


def opset_versions(imports: Iterable[Any]) -> dict[str, int]:
    """Domain -> version of a list of OperatorSetIdProto. Raises ModelError where two entries contradict each other."""
    versions: dict[str, int] = {}
    for entry in imports:
        domain = "" if entry.domain == "ai.onnx" else str(entry.domain)
        if versions.setdefault(domain, entry.version) != entry.version:
            raise ModelError(f"opset_import gives two versions of domain '{domain or 'ai.onnx'}'")
    return versions


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs in the attributes of a node."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def reads(node: NodeProto) -> list[str]:
    """Every outer value that a node reads, through its subgraphs too; each once."""
    found = dict.fromkeys(filter(None, node.input))
    for graph in subgraphs(node):
        own = {i.name for i in graph.input} | {t.name for t in graph.initializer}
        own |= {o for n in graph.node for o in n.output}
        inner = dict.fromkeys(name for n in graph.node for name in reads(n))
        found |= dict.fromkeys(name for name in (*inner, *(o.name for o in graph.output)) if name not in own)
    return list(found)


def sorted_nodes(nodes: Sequence[NodeProto], known: Collection[str]) -> list[NodeProto]:
    """Nodes in topological order; files that are already sorted keep theirs. `known` are the values from outside.

    Raises ModelError for a value that nothing makes and for a cycle.
    """
    needs = [reads(node) for node in nodes]
    made = {o for node in nodes for o in node.output if o}
    for node, names in zip(nodes, needs, strict=True):
        for name in names:
            if name not in made and name not in known:
                raise ModelError(f"input '{name}' is made by nothing", where=describe(node))
    return [nodes[i] for i in _order(nodes, needs)]


def check_structure(proto: ModelProto) -> None:
    """Raises ModelError where names or references of a model are not sound, UnsupportedError for function overloads."""
    functions: dict[FunctionId, FunctionProto] = {}
    for function in proto.functions:
        key = (domain_of(function), function.name)
        if key in functions and functions[key].overload != function.overload:
            raise UnsupportedError(f"function '{function.name}' is overloaded", hint="export it under several names")
        if key in functions:
            raise ModelError(f"function '{function.name}' is given twice")
        functions[key] = function
    for function in proto.functions:
        _check_function(function)
    for dangling in _check_graph(proto.graph, in_function=False).values():
        raise dangling
    names = [o.name for o in proto.graph.output]
    if not names or len(set(names)) < len(names):
        raise ModelError("outputs are missing or named twice")
    _check_calls(proto.graph.node, functions)


def _check_function(function: FunctionProto) -> None:
    where = f"function '{function.name}'"
    opset_versions(function.opset_import)
    made = _made_once(function.input, function.node, where)
    for dangling in _check_nodes(function.node, made, in_function=True).values():
        raise dangling
    if unmade := [o for o in function.output if o not in made]:
        raise ModelError(f"output '{unmade[0]}' is made by nothing", where=where)


# The names that nodes take from around their graph, each with what to raise where nothing there makes it.
_Free = dict[str, ModelError]


def _check_graph(graph: GraphProto, *, in_function: bool) -> _Free:
    where = f"graph '{graph.name}'"
    constants: set[str] = set()
    for tensor in graph.initializer:
        check_size(tuple(tensor.dims), 1, f"tensor '{tensor.name}'")
        if tensor.name in constants:
            raise ModelError(f"initializer '{tensor.name}' is given twice", where=where)
        constants.add(tensor.name)
    # Before IR version 4 every initializer had to be an input too.
    inputs = [i.name for i in graph.input if i.name not in constants]
    if not all((*inputs, *constants)):
        raise ModelError("an input or initializer has no name", where=where)
    made = _made_once([*inputs, *constants], graph.node, where)
    free = _check_nodes(graph.node, made, in_function)
    for out in graph.output:
        if out.name not in made:
            free.setdefault(out.name, ModelError(f"output '{out.name}' is made by nothing", where=where))
    return free


def _made_once(outside: Iterable[str], nodes: Iterable[NodeProto], where: str) -> set[str]:
    made: set[str] = set()
    for name in (*outside, *(o for n in nodes for o in n.output if o)):
        if name in made:
            raise ModelError(f"value '{name}' is made twice", where=where)
        made.add(name)
    return made


def _check_nodes(nodes: Sequence[NodeProto], made: set[str], in_function: bool) -> _Free:
    free: _Free = {}
    needs = []
    for node in nodes:
        _check_attributes(node, in_function)
        names = [i for i in node.input if i]
        for name in names:
            if name not in made and name not in free:
                free[name] = ModelError(f"input '{name}' is made by nothing", where=describe(node))
        _check_bodies(node)
        for graph in subgraphs(node):
            inner = _check_graph(graph, in_function=in_function)
            free |= {name: dangling for name, dangling in inner.items() if name not in made and name not in free}
            names += inner
        needs.append(names)
    _order(nodes, needs)
    return free


def _order(nodes: Sequence[NodeProto], needs: Sequence[Collection[str]]) -> list[int]:
    """Indices of nodes in topological order, where node i reads the names needs[i]. Raises ModelError for a cycle."""
    maker = {o: i for i, n in enumerate(nodes) for o in n.output if o}
    waiting = [{maker[name] for name in names if name in maker} for names in needs]
    if all(max(makers, default=-1) < i for i, makers in enumerate(waiting)):
        return list(range(len(nodes)))
    readers: dict[int, list[int]] = {}
    for i, makers in enumerate(waiting):
        for made_by in makers:
            readers.setdefault(made_by, []).append(i)
    ready = [i for i, makers in enumerate(waiting) if not makers]
    order = []
    while ready:
        i = ready.pop()
        order.append(i)
        for reader in readers.get(i, ()):
            waiting[reader].discard(i)
            if not waiting[reader]:
                ready.append(reader)
    if len(order) < len(nodes):
        stuck = next(n for i, n in enumerate(nodes) if waiting[i])
        raise ModelError("the graph has a cycle through this node", where=describe(stuck))
    return order


def _check_attributes(node: NodeProto, in_function: bool) -> None:
    """Each has a name of its own and a value of its type, and nothing else: a graph cannot hide beside a number."""
    if not node.op_type:
        raise ModelError("a node names no operator", where=describe(node))
    names = set()
    for attribute in node.attribute:
        if attribute.name in names or not attribute.name:
            raise ModelError(f"attribute '{attribute.name}' is given twice or has no name", where=describe(node))
        names.add(attribute.name)
        values = {field.name for field, _ in attribute.ListFields()} - _ASIDE
        if attribute.ref_attr_name:
            if not in_function:
                raise ModelError(
                    f"attribute '{attribute.name}' refers to an attribute of a function that is not around it",
                    where=describe(node),
                )
        elif attribute.type not in _VALUE_FIELDS or values - {_VALUE_FIELDS[attribute.type]}:
            raise ModelError(f"the value of attribute '{attribute.name}' is not of its type", where=describe(node))
        elif attribute.type in _SINGLE and not values:
            raise ModelError(f"attribute '{attribute.name}' has no value", where=describe(node))
        for tensor in (*([attribute.t] if attribute.type == AttributeProto.TENSOR else ()), *attribute.tensors):
            check_size(tuple(tensor.dims), 1, describe(node))


# How many (inputs, outputs) a subgraph may have where its node has so many.
_BODIES: Mapping[str, Callable[[int, int], set[tuple[int, int]]]] = {
    "If": lambda inputs, outputs: {(0, outputs)},
    "Loop": lambda inputs, outputs: {(inputs, outputs + 1)},  # it says whether to go on, too
    "Scan": lambda inputs, outputs: {(inputs, outputs), (inputs - 1, outputs)},  # in opset 8, one more is the lengths
    "SequenceMap": lambda inputs, outputs: {(inputs, outputs)},
}


def _check_bodies(node: NodeProto) -> None:
    """The standard's control flow has the subgraphs that it needs, and these as many edges as the node."""
    if domain_of(node) or node.op_type not in _BODIES:
        return
    graphs = {a.name: a.g for a in node.attribute if a.type == AttributeProto.GRAPH}
    for name in ("then_branch", "else_branch") if node.op_type == "If" else ("body",):
        if name not in graphs and not any(a.name == name and a.ref_attr_name for a in node.attribute):
            raise ModelError(f"it has no {name}", where=describe(node))
    for name, graph in graphs.items():
        inputs, outputs = len(graph.input), len(graph.output)
        if (inputs, outputs) not in _BODIES[node.op_type](len(node.input), len(node.output)):
            raise ModelError(
                f"{name} has {inputs} inputs and {outputs} outputs, which do not fit the node's", where=describe(node)
            )


# Types whose absent value means nothing; an absent number is 0, and an absent list is empty.
_SINGLE = {
    AttributeProto.TENSOR,
    AttributeProto.GRAPH,
    AttributeProto.SPARSE_TENSOR,
    AttributeProto.TYPE_PROTO,
}


def _check_calls(nodes: Iterable[NodeProto], functions: Mapping[FunctionId, FunctionProto]) -> None:
    """Raises ModelError where a function calls itself, or all calls unfold into more than MAX_NODES nodes."""
    called = {key: list(_calls(function.node, functions)) for key, function in functions.items()}
    sizes: dict[FunctionId, int] = {}

    def unfolded(nodes: Iterable[NodeProto], calls: Iterable[FunctionId]) -> int:
        return min(_count(nodes) + sum(sizes[c] for c in calls), MAX_NODES + 1)

    for key in functions:
        path = {key: iter(called[key])} if key not in sizes else {}
        while path:  # depth first, without recursion: calls may nest as deep as the file is long
            current = next(reversed(path))
            callee = next((c for c in path[current] if c not in sizes), None)
            if callee is None:
                sizes[current] = unfolded(functions[current].node, called[current])
                del path[current]
            elif callee in path:
                raise ModelError(f"function '{callee[1]}' calls itself", hint="ONNX has no recursion; use Loop")
            else:
                path[callee] = iter(called[callee])
    if unfolded(nodes, _calls(nodes, functions)) > MAX_NODES:
        raise ModelError(f"its functions unfold into more than {MAX_NODES} nodes")


def _calls(nodes: Iterable[NodeProto], functions: Mapping[FunctionId, FunctionProto]) -> Iterator[FunctionId]:
    for node in nodes:
        key = (domain_of(node), node.op_type)
        if key in functions:
            yield key
        for graph in subgraphs(node):
            yield from _calls(graph.node, functions)


def _count(nodes: Iterable[NodeProto]) -> int:
    return sum(1 + sum(_count(g.node) for g in subgraphs(n)) for n in nodes)
