"""An ONNX file -> a checked `Model`: nodes sorted and needed, constants mapped, nothing trusted.

A model is input from strangers: every limit is checked before memory is spent on it, and what is wrong with a file is
said in one line.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError
from onnx import FunctionProto, ModelProto, NodeProto, ValueInfoProto, defs

from llmc.errors import ModelError, UnsupportedError
from llmc.importer.scan import MAX_NODES, check_file
from llmc.importer.structure import (
    check_structure,
    describe,
    domain_of,
    opset_versions,
    reads,
    sorted_nodes,
    subgraphs,
)
from llmc.importer.tensors import NO_SIZE, ExternalData, check_size, load_tensor
from llmc.importer.wire import split_weights

__all__ = ["MAX_NODES", "Model", "describe", "domain_of", "opset_versions", "read_model", "sorted_nodes", "subgraphs"]

MAX_FILE_BYTES = 2**31 - 1  # protobuf's own limit
OLDEST_OPSET = 7


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
    opsets = opset_versions(proto.opset_import)
    if "" in opsets or any(not domain_of(node) for node in graph.node):
        _check_opset(opsets.get("", 1))
    if graph.sparse_initializer:
        raise UnsupportedError("sparse initializers", where=str(path), hint="store them as dense tensors")
    check_structure(proto)

    external = ExternalData(path.parent)
    constants = {t.name: load_tensor(t, external, raw) for t, raw in zip(graph.initializer, weights, strict=True)}
    # Before IR version 4 every initializer had to be an input too: such an input is a constant here.
    inputs = tuple(i for i in graph.input if i.name not in constants)
    for info in inputs:
        _check_input(info)
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


def _parse(path: Path) -> tuple[ModelProto, list[np.ndarray | None]]:
    """The file's message, and the large weights inside of it (one entry for each initializer)."""
    try:
        file = _mapped(path)
        check_file(file)
        content, weights = split_weights(file)
        proto = ModelProto.FromString(content)
    except FileNotFoundError:
        raise ModelError("no such file", where=str(path)) from None
    except OSError as error:
        raise ModelError(error.strerror or str(error), where=str(path)) from None
    except ModelError as error:
        raise ModelError(error.what, where=str(path), hint=error.hint) from None
    except UnicodeDecodeError:
        hint = "the file is damaged; fetch or export it again"
        raise ModelError("a name in it is not text", where=str(path), hint=hint) from None
    except (ValueError, DecodeError):
        proto, weights = ModelProto(), []
    if not proto.ir_version or not proto.HasField("graph") or not proto.opset_import:
        raise ModelError(
            "not an ONNX model, or a truncated one",
            where=str(path),
            hint="fetch or export it again; git-lfs pointers and web pages saved as .onnx look like this too",
        )
    return proto, weights


def _mapped(path: Path) -> bytes | mmap.mmap:
    """The whole file. What is checked is what was opened: another file under the same name changes nothing."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe without a writer must not block
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ModelError("not a file", hint="give the path of the .onnx file itself")
        if status.st_size > MAX_FILE_BYTES:
            raise ModelError(
                f"{status.st_size} bytes are more than an ONNX file may have",
                hint="save the weights as external data",
            )
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) if status.st_size else b""
    finally:
        os.close(descriptor)


def _check_opset(version: int) -> None:
    newest = defs.onnx_opset_version()
    if not OLDEST_OPSET <= version <= newest:
        raise UnsupportedError(
            f"opset {version} of ai.onnx; llmc reads {OLDEST_OPSET} to {newest}",
            hint="convert the model with onnx.version_converter.convert_version",
        )


def _needed(nodes: Sequence[NodeProto], outputs: Iterable[ValueInfoProto]) -> tuple[NodeProto, ...]:
    wanted = {o.name for o in outputs}
    kept = []
    for node in reversed(nodes):
        if any(o in wanted for o in node.output):
            kept.append(node)
            wanted.update(reads(node))
    return tuple(reversed(kept))


def _check_input(info: ValueInfoProto) -> None:
    """The sizes that are declared must be possible."""
    dims = [d.dim_value for d in info.type.tensor_type.shape.dim if d.HasField("dim_value")]
    check_size(tuple(d for d in dims if d != NO_SIZE), 8, f"input '{info.name}'")
