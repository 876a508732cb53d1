"""Tensors that claim, hide or lack something, and external data that leads elsewhere."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.importer.helpers import FLOAT, INT64, model, node, saved
from tests.security.kinds import kind
from tests.security.wire import GRAPH, INITIALIZER, field


def with_tensor(folder: Path, tensor: TensorProto) -> Path:
    """x + tensor, whose name is w."""
    tensor.name = "w"
    proto = model([node("Add", "x w", "y")], [("x", FLOAT, [4, 4])], ["y"])
    proto.graph.initializer.append(tensor)
    return saved(folder, proto)


def claims(folder: Path, dims: Sequence[int], data_type: int = FLOAT, raw: bytes = b"data", **fields: object) -> Path:
    return with_tensor(folder, TensorProto(dims=dims, data_type=data_type, raw_data=raw, **fields))


@kind("declares")
def a_tensor_of_exabytes(folder: Path) -> Path:
    return claims(folder, [2**31, 2**31])


@kind("declares")
def a_size_that_overflows(folder: Path) -> Path:
    return claims(folder, [2**62, 4])  # 2^66 bytes: 0 in 64 bits


@kind("declares")
def a_size_that_overflows_many_times(folder: Path) -> Path:
    return claims(folder, [2**63 - 1] * 30)


@kind("declares")
def nothing_times_too_much(folder: Path) -> Path:
    return claims(folder, [0, 2**62])


@kind("impossible shape")
def a_negative_dimension(folder: Path) -> Path:
    return claims(folder, [-4, -4], raw=bytes(64))


@kind("impossible shape")
def a_rank_of_33(folder: Path) -> Path:
    return claims(folder, [1] * 33, raw=bytes(4))


@kind("needs 64 bytes, but 60 are given")
def too_little_data(folder: Path) -> Path:
    return claims(folder, [4, 4], raw=bytes(60))


@kind("needs 64 bytes, but 8192 are given")
def too_much_data(folder: Path) -> Path:
    return claims(folder, [4, 4], raw=bytes(8192))


@kind("does not fill shape [4, 4]")
def too_few_numbers(folder: Path) -> Path:
    return with_tensor(folder, TensorProto(dims=[4, 4], data_type=FLOAT, float_data=[1.0] * 15))


@kind("does not fill shape [4, 4]")
def numbers_of_another_type(folder: Path) -> Path:
    return with_tensor(folder, TensorProto(dims=[4, 4], data_type=FLOAT, int64_data=[1] * 16))


@kind("does not fill shape [4, 4]")
def no_data(folder: Path) -> Path:
    return with_tensor(folder, TensorProto(dims=[4, 4], data_type=FLOAT))


@kind("data is given twice")
def data_in_two_fields(folder: Path) -> Path:
    return claims(folder, [4, 4], raw=bytes(64), float_data=[1.0] * 16)


@kind("data is given twice")
def raw_data_twice(folder: Path) -> Path:
    path = claims(folder, [64, 64], raw=bytes(4 * 64 * 64))
    content = path.read_bytes()
    proto = onnx.load_from_string(content)
    again = TensorProto(raw_data=b"other" * 1000).SerializeToString()
    tensor = proto.graph.initializer[0].SerializeToString() + again
    proto.graph.ClearField("initializer")
    graph = proto.graph.SerializeToString()
    proto.ClearField("graph")
    path.write_bytes(proto.SerializeToString() + field(GRAPH, graph + field(INITIALIZER, tensor)))
    return path


@kind("in pieces")
def a_segment(folder: Path) -> Path:
    return claims(folder, [4, 4], raw=bytes(64), segment=TensorProto.Segment(begin=0, end=2**40))


@kind("unknown element type 1000")
def an_unknown_type(folder: Path) -> Path:
    return claims(folder, [4, 4], data_type=1000, raw=bytes(64))


@kind("strings need more than 64 MiB")
def strings_that_grow(folder: Path) -> Path:
    """numpy would take 4 bytes for each character of the longest, a million times."""
    strings = [b"s" * 100_000, *[b""] * 9_999]
    return with_tensor(folder, TensorProto(dims=[10_000], data_type=TensorProto.STRING, string_data=strings))


@kind("does not fill shape")
def too_few_strings(folder: Path) -> Path:
    return with_tensor(folder, TensorProto(dims=[2**20], data_type=TensorProto.STRING, string_data=[b"one"]))


@kind("declares")
def a_constant_of_exabytes(folder: Path) -> Path:
    value = TensorProto(dims=[2**31, 2**31], data_type=FLOAT, raw_data=b"data")
    nodes = [node("Constant", "", "w", value=value), node("Add", "x w", "y")]
    return saved(folder, model(nodes, [("x", FLOAT, [4])], ["y"]))


@kind("declares")
def an_input_of_exabytes(folder: Path) -> Path:
    return saved(folder, model([node("Relu", "x", "y")], [("x", FLOAT, [2**40, 2**40])], ["y"]))


@kind("impossible shape")
def an_input_with_a_negative_dimension(folder: Path) -> Path:
    return saved(folder, model([node("Relu", "x", "y")], [("x", FLOAT, [-3])], ["y"]))


@kind("unknown element type 99")
def an_input_of_an_unknown_type(folder: Path) -> Path:
    proto = model([node("Relu", "x", "y")], [("x", INT64, [4])], ["y"])
    proto.graph.input[0].type.tensor_type.elem_type = 99
    return saved(folder, proto)


@kind("sparse initializers")
def a_sparse_tensor_of_exabytes(folder: Path) -> Path:
    proto = model([node("Relu", "x", "y")], [("x", FLOAT, [4])], ["y"])
    values = helper.make_tensor("v", FLOAT, [1], [1.0])
    indices = helper.make_tensor("i", INT64, [1], [2**62])
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [2**62, 2**62]))
    return saved(folder, proto)


# -- external data ------------------------------------------------------------------------------------------------
def external(folder: Path, *entries: tuple[str, str]) -> Path:
    """A model whose tensor of 64 bytes lies outside; beside it is a good data file, and above it a secret one."""
    inner = folder / "folder"
    inner.mkdir()
    (folder / "secret").write_bytes(bytes(64))
    (inner / "good").write_bytes(bytes(64))
    tensor = TensorProto(dims=[4, 4], data_type=FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in entries:
        tensor.external_data.add(key=key, value=value)
    return with_tensor(inner, tensor)


@kind("not a plain path")
def external_absolute(folder: Path) -> Path:
    return external(folder, ("location", "/etc/passwd"))


@kind("not a plain path")
def external_own_memory(folder: Path) -> Path:
    return external(folder, ("location", "/proc/self/mem"), ("offset", "4096"), ("length", "64"))


@kind("not a plain path")
def external_above(folder: Path) -> Path:
    return external(folder, ("location", "../secret"))


@kind("not a plain path")
def external_above_by_a_detour(folder: Path) -> Path:
    return external(folder, ("location", "a/../../secret"))


@kind("not a plain path")
def external_with_backslashes(folder: Path) -> Path:
    return external(folder, ("location", "..\\secret"))


@kind("not a plain path")
def external_with_a_zero(folder: Path) -> Path:
    return external(folder, ("location", "good\0.png"))


@kind("not a plain path")
def external_without_a_place(folder: Path) -> Path:
    return external(folder, ("length", "64"))


@kind("is missing")
def external_in_memory(folder: Path) -> Path:
    return external(folder, ("location", "*/_ORT_MEM_ADDR_/*"), ("offset", "140737488355328"), ("length", "64"))


@kind("is missing")
def external_on_the_web(folder: Path) -> Path:
    return external(folder, ("location", "https://example.org/w"))


@kind("is a link")
def external_link_out(folder: Path) -> Path:
    path = external(folder, ("location", "w"))
    (path.parent / "w").symlink_to(folder / "secret")
    return path


@kind("is a link")
def external_link_inside(folder: Path) -> Path:
    """Where it leads can change after any check."""
    path = external(folder, ("location", "w"))
    (path.parent / "w").symlink_to("good")
    return path


@kind("is a link")
def external_linked_folder(folder: Path) -> Path:
    path = external(folder, ("location", "up/secret"))
    (path.parent / "up").symlink_to(folder)
    return path


@kind("is a hard link")
def external_hard_link(folder: Path) -> Path:
    path = external(folder, ("location", "w"))
    os.link(folder / "secret", path.parent / "w")
    return path


@kind("is not a file")
def external_pipe(folder: Path) -> Path:
    path = external(folder, ("location", "w"))
    os.mkfifo(path.parent / "w")
    return path


@kind("is not a file")
def external_folder(folder: Path) -> Path:
    path = external(folder, ("location", "w"))
    (path.parent / "w").mkdir()
    return path


@kind("is not a file")
def external_socket(folder: Path) -> Path:
    path = external(folder, ("location", "w"))
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's name must be short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind("w")
    finally:
        os.chdir(here)
    return path


@kind("is not a file")
def external_device(folder: Path) -> Path | None:
    path = external(folder, ("location", "w"))
    try:
        os.mknod(path.parent / "w", stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
        return None
    return path


@kind("is empty")
def external_empty(folder: Path) -> Path:
    path = external(folder, ("location", "w"))
    (path.parent / "w").touch()
    return path


@kind("has 64 bytes, but bytes 32 to 96 are wanted")
def external_past_the_end(folder: Path) -> Path:
    return external(folder, ("location", "good"), ("offset", "32"), ("length", "64"))


@kind("has 64 bytes, but bytes 9223372036854775807 to")
def external_offset_that_overflows(folder: Path) -> Path:
    return external(folder, ("location", "good"), ("offset", str(2**63 - 1)), ("length", str(2**63 - 1)))


@kind("needs 64 bytes, but 32 are given")
def external_too_short(folder: Path) -> Path:
    return external(folder, ("location", "good"), ("offset", "32"))


@kind("where a number of bytes belongs")
def external_negative_offset(folder: Path) -> Path:
    return external(folder, ("location", "good"), ("offset", "-64"), ("length", "64"))


@kind("where a number of bytes belongs")
def external_number_as_only_python_reads_it(folder: Path) -> Path:
    return external(folder, ("location", "good"), ("length", " 6_4"))


@kind("where a number of bytes belongs")
def external_number_of_a_million_digits(folder: Path) -> Path:
    return external(folder, ("location", "good"), ("length", "9" * 1_000_000))


@kind("a key that is unknown or given twice")
def external_unknown_key(folder: Path) -> Path:
    return external(folder, ("location", "good"), ("__class__", "x"))


@kind("a key that is unknown or given twice")
def external_key_twice(folder: Path) -> Path:
    return external(folder, ("location", "good"), ("location", "/etc/passwd"))


@kind("data is given twice")
def external_and_inside(folder: Path) -> Path:
    path = external(folder, ("location", "good"))
    proto = onnx.load_model(path, load_external_data=False)
    proto.graph.initializer[0].raw_data = np.ones(16, np.float32).tobytes()
    path.write_bytes(proto.SerializeToString())
    return path
