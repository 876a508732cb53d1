"""An ONNX file -> a checked `Model`: nodes sorted and needed, constants mapped, nothing trusted.

A model is input from strangers: every limit is checked before memory is spent on it, and what is wrong with a file is
said in one line.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, ValueInfoProto, defs

from llmc.errors import ModelError, UnsupportedError
from llmc.importer.tensors import ExternalData, load_tensor
from llmc.importer.wire import split_weights

MAX_FILE_BYTES = 2**31 - 1  # protobuf's own limit
MAX_NODES = 500_000
OLDEST_OPSET = 11


@dataclass(frozen=True)
class Model:
    """What a file says, checked. `nodes` are in topological order and all needed by some output."""

    name: str
    inputs: tuple[ValueInfoProto, ...]
    outputs: tuple[ValueInfoProto, ...]
    nodes: tuple[NodeProto, ...]
    constants: Mapping[str, np.ndarray]
    opsets: Mapping[str, int]
    functions: Mapping[tuple[str, str], FunctionProto]
    external: ExternalData


def read_model(path: str | Path) -> Model:
    """Read and check an ONNX file. Raises ModelError, or UnsupportedError for an opset out of range."""
    path = Path(path)
    proto, weights = _parse(path)
    graph = proto.graph
    if not _is_text(proto):
        raise ModelError(
            "a name in it is not text", where=str(path), hint="the file is damaged; fetch or export it again"
        )
    _limit_nodes(proto)
    external = ExternalData(path.parent)
    opsets = opset_versions(proto.opset_import)
    _check_opset(opsets.get("", 1))
    if graph.sparse_initializer:
        raise UnsupportedError("sparse initializers", where=str(path), hint="store them as dense tensors")

    constants: dict[str, np.ndarray] = {}
    for tensor, raw in zip(graph.initializer, weights, strict=True):
        if tensor.name in constants:
            raise ModelError(f"initializer '{tensor.name}' is given twice", where=str(path))
        constants[tensor.name] = load_tensor(tensor, external, raw)
    # Before IR version 4 every initializer had to be an input too: such an input is a constant here.
    inputs = tuple(i for i in graph.input if i.name not in constants)
    _check_names(graph, inputs, constants, path)
    nodes = _needed(sorted_nodes(graph.node, {*constants, *(i.name for i in inputs)}), graph.output)
    return Model(
        name=graph.name or path.stem,
        inputs=inputs,
        outputs=tuple(graph.output),
        nodes=nodes,
        constants=constants,
        opsets=opsets,
        functions={(domain_of(f), f.name): f for f in proto.functions},
        external=external,
    )


def domain_of(proto: NodeProto | FunctionProto) -> str:
    """The operator domain; "ai.onnx" is another spelling of ""."""
    return "" if proto.domain == "ai.onnx" else str(proto.domain)


def opset_versions(imports: Iterable[object]) -> dict[str, int]:
    """Domain -> version of a list of OperatorSetIdProto."""
    return {"" if o.domain == "ai.onnx" else o.domain: o.version for o in imports}  # type: ignore[attr-defined]


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs in the attributes of a node."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def reads(node: NodeProto) -> Iterator[str]:
    """Every outer value that a node reads, through its subgraphs too."""
    yield from filter(None, node.input)
    for graph in subgraphs(node):
        own = {i.name for i in graph.input} | {t.name for t in graph.initializer}
        own |= {o for n in graph.node for o in n.output}
        yield from (name for n in graph.node for name in reads(n) if name not in own)
        yield from (o.name for o in graph.output if o.name not in own)


def sorted_nodes(nodes: Sequence[NodeProto], known: set[str]) -> list[NodeProto]:
    """Nodes in topological order; files that are already sorted keep theirs. `known` are the values from outside.

    Raises ModelError for a value that nothing makes and for a cycle.
    """
    producer = {o: i for i, n in enumerate(nodes) for o in n.output if o}
    waiting: list[set[int]] = []
    readers: dict[int, list[int]] = {}
    for i, node in enumerate(nodes):
        makers = set()
        for name in reads(node):
            if name in producer:
                makers.add(producer[name])
            elif name not in known:
                raise ModelError(f"input '{name}' is made by nothing", where=describe(node))
        waiting.append(makers)
        for maker in makers:
            readers.setdefault(maker, []).append(i)
    if all(max(makers, default=-1) < i for i, makers in enumerate(waiting)):
        return list(nodes)
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
    return [nodes[i] for i in order]


def describe(node: NodeProto) -> str:
    """A node in an error message."""
    return f"node '{node.name or next(iter(node.output), '')}' ({domain_of(node) or 'ai.onnx'}.{node.op_type})"


def _parse(path: Path) -> tuple[ModelProto, list[np.ndarray | None]]:
    """The file's message, and the large weights inside of it (one entry for each initializer)."""
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise ModelError("not a file", where=str(path), hint="give the path of the .onnx file itself")
        if size > MAX_FILE_BYTES:
            raise ModelError(
                f"{size} bytes are more than an ONNX file may have",
                where=str(path),
                hint="save the weights as external data",
            )
        content, weights = split_weights(_mapped(path) if size else memoryview(b""))
    except FileNotFoundError:
        raise ModelError("no such file", where=str(path)) from None
    except OSError as error:
        raise ModelError(error.strerror or str(error), where=str(path)) from None
    except ValueError:
        content, weights = b"", []
    try:
        proto = ModelProto.FromString(content)
    except DecodeError:
        proto = ModelProto()
    if not proto.ir_version or not proto.HasField("graph") or not proto.opset_import:
        raise ModelError(
            "not an ONNX model, or a truncated one",
            where=str(path),
            hint="fetch or export it again; git-lfs pointers and web pages saved as .onnx look like this too",
        )
    return proto, weights


def _mapped(path: Path) -> memoryview:
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _is_text(message: Message) -> bool:
    """Is every string in the message UTF-8? Protobuf gives bytes for one that is not."""
    for descriptor, value in message.ListFields():
        values = value if descriptor.is_repeated else (value,)
        if descriptor.type == FieldDescriptor.TYPE_MESSAGE:
            if not all(map(_is_text, values)):
                return False
        elif descriptor.type == FieldDescriptor.TYPE_STRING and not all(isinstance(v, str) for v in values):
            return False
    return True


def _limit_nodes(proto: ModelProto) -> None:
    def count(nodes: Iterable[NodeProto]) -> int:
        return sum(1 + sum(count(g.node) for g in subgraphs(n)) for n in nodes)

    total = count(proto.graph.node) + sum(count(f.node) for f in proto.functions)
    if total > MAX_NODES:
        raise ModelError(f"{total} nodes are more than the limit of {MAX_NODES}")


def _check_opset(version: int) -> None:
    newest = defs.onnx_opset_version()
    if not OLDEST_OPSET <= version <= newest:
        raise UnsupportedError(
            f"opset {version} of ai.onnx; llmc reads {OLDEST_OPSET} to {newest}",
            hint="convert the model with onnx.version_converter.convert_version",
        )


def _check_names(
    graph: GraphProto, inputs: Sequence[ValueInfoProto], constants: Mapping[str, np.ndarray], path: Path
) -> None:
    made = set(constants)
    for name in (*(i.name for i in inputs), *(o for n in graph.node for o in n.output if o)):
        if not name or name in made:
            raise ModelError(f"value '{name}' is made twice" if name else "an input has no name", where=str(path))
        made.add(name)
    names = [o.name for o in graph.output]
    for name in names:
        if name not in made:
            raise ModelError(f"output '{name}' is made by nothing", where=str(path))
    if not names or len(set(names)) < len(names):
        raise ModelError("outputs are missing or named twice", where=str(path))


def _needed(nodes: Sequence[NodeProto], outputs: Iterable[ValueInfoProto]) -> tuple[NodeProto, ...]:
    wanted = {o.name for o in outputs}
    kept = []
    for node in reversed(nodes):
        if any(o in wanted for o in node.output):
            kept.append(node)
            wanted.update(reads(node))
    return tuple(reversed(kept))
