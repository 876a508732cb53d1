"""Damaged and hostile files: each gives one clear error, and nothing outside of the model's folder is read."""

from __future__ import annotations

import contextlib
import mmap
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from llmc.errors import LlmcError, ModelError, UnsupportedError
from llmc.importer.reader import read_model
from llmc.importer.tensors import ExternalData, load_tensor
from tests.importer.helpers import FLOAT, INT64, model, node, saved


def linear(weight: np.ndarray) -> onnx.ModelProto:
    return model([node("MatMul", "x w", "y")], [("x", FLOAT, ["n", weight.shape[0]])], ["y"], {"w": weight})


def fails(path: Path, text: str, kind: type[LlmcError] = ModelError) -> None:
    with pytest.raises(kind) as caught:
        read_model(path)
    assert text in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2, "one line, and perhaps a hint"


@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"<!doctype html>", b"\x00" * 100, b"\xff" * 100]
)
def test_not_onnx(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    fails(path, "not an ONNX model")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    fails(tmp_path / "none.onnx", "no such file")
    fails(tmp_path, "not a file")


def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.onnx")
    fails(tmp_path / "pipe.onnx", "not a file")


def test_every_truncation_is_an_error(tmp_path: Path, rng: np.random.Generator) -> None:
    content = linear(rng.standard_normal((64, 64)).astype(np.float32)).SerializeToString()
    path = tmp_path / "model.onnx"
    for size in [*range(0, 200, 7), *range(200, len(content), 997)]:
        path.write_bytes(content[:size])
        with pytest.raises(ModelError):
            read_model(path)


def test_flipped_bytes_never_crash(tmp_path: Path, rng: np.random.Generator) -> None:
    content = linear(rng.standard_normal((40, 40)).astype(np.float32)).SerializeToString()
    path = tmp_path / "model.onnx"
    for _ in range(300):
        damaged = bytearray(content)
        head = [i for i in range(len(content)) if i < 60 or i > len(content) - 60]
        for i in rng.choice(head, 2):
            damaged[i] = rng.integers(256)
        path.write_bytes(damaged)
        with contextlib.suppress(LlmcError):
            read_model(path)


def test_inline_weights_are_views_of_the_file(tmp_path: Path, rng: np.random.Generator) -> None:
    weight = rng.standard_normal((64, 48)).astype(np.float32)
    small = rng.standard_normal(48).astype(np.float32)
    proto = linear(weight)
    proto.graph.initializer.append(numpy_helper.from_array(small, "b"))
    got = read_model(saved(tmp_path, proto)).constants
    np.testing.assert_array_equal(got["w"], weight)
    np.testing.assert_array_equal(got["b"], small)
    assert not got["w"].flags.writeable and not got["w"].flags.owndata


def test_external_weights_are_mapped(tmp_path: Path, rng: np.random.Generator) -> None:
    weight = rng.standard_normal((64, 48)).astype(np.float32)
    path = saved(tmp_path, linear(weight), save_as_external_data=True, location="w.data", size_threshold=0)
    got = read_model(path).constants["w"]
    np.testing.assert_array_equal(got, weight)
    assert not got.flags.writeable and not got.flags.owndata
    base: Any = got
    while isinstance(base, np.ndarray):
        base = base.base
    assert isinstance(base.obj if isinstance(base, memoryview) else base, mmap.mmap)


def external(tmp_path: Path, **entries: str) -> Path:
    proto = linear(np.ones((4, 4), np.float32))
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    path = tmp_path / "folder" / "model.onnx"
    path.parent.mkdir()
    path.write_bytes(proto.SerializeToString())
    (tmp_path / "secret").write_bytes(bytes(64))
    (path.parent / "good").write_bytes(bytes(64))
    (path.parent / "link").symlink_to(tmp_path / "secret")
    (path.parent / "short").write_bytes(bytes(60))
    return path


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ({"location": "../secret"}, "not a plain path"),
        ({"location": "a/../../secret"}, "not a plain path"),
        ({"location": "/etc/passwd"}, "not a plain path"),
        ({"location": "..\\secret"}, "not a plain path"),
        ({"location": ""}, "not a plain path"),
        ({}, "not a plain path"),
        ({"location": "link"}, "is a link"),
        ({"location": "none"}, "is missing"),
        ({"location": "."}, "not a plain path"),
        ({"location": "short"}, "needs 64 bytes"),
        ({"location": "short", "length": "64"}, "60 bytes"),
        ({"location": "good", "offset": "32", "length": "64"}, "64 bytes"),
        ({"location": "good", "offset": "-64", "length": "64"}, "where a number of bytes belongs"),
        ({"location": "good", "offset": "x"}, "where a number of bytes belongs"),
        ({"location": "good", "length": str(2**62)}, "64 bytes"),
        ({"location": "good", "length": str(2**70)}, "where a number of bytes belongs"),
    ],
)
def test_external_data_stays_in_the_folder(tmp_path: Path, entries: dict[str, str], text: str) -> None:
    fails(external(tmp_path, **entries), text)


def test_external_data_in_a_folder(tmp_path: Path) -> None:
    path = external(tmp_path, location="./data/w")
    (path.parent / "data").mkdir()
    (path.parent / "data" / "w").write_bytes(np.arange(16, dtype=np.float32).tobytes())
    assert read_model(path).constants["w"][3, 3] == 15


def test_external_data_cannot_be_swapped_for_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody puts a link in the file's place at the last moment before it is opened, and again right after."""
    path = external(tmp_path, location="good")
    target, real = path.parent / "good", os.open

    def swapped(name: Any, *args: Any, **options: Any) -> int:
        if name == "good":
            target.unlink()
            target.symlink_to(tmp_path / "secret")
        return real(name, *args, **options)

    monkeypatch.setattr(os, "open", swapped)
    fails(path, "is a link")

    def swapped_later(name: Any, *args: Any, **options: Any) -> int:
        descriptor = real(name, *args, **options)
        if name == "good":
            target.unlink()
            target.symlink_to(tmp_path / "secret")
        return descriptor

    target.unlink()
    target.write_bytes(np.ones(16, np.float32).tobytes())
    monkeypatch.setattr(os, "open", swapped_later)
    np.testing.assert_array_equal(read_model(path).constants["w"], np.ones((4, 4)))


def test_folders_of_external_data_cannot_be_swapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder on the way becomes a link after it was opened: what was opened is read."""
    path = external(tmp_path, location="data/w")
    folder, real = path.parent / "data", os.open
    folder.mkdir()
    (folder / "w").write_bytes(np.ones(16, np.float32).tobytes())
    (tmp_path / "w").write_bytes(bytes(64))

    def swapped(name: Any, *args: Any, **options: Any) -> int:
        descriptor = real(name, *args, **options)
        if name == "data":
            folder.rename(path.parent / "moved")
            folder.symlink_to(tmp_path)
        return descriptor

    monkeypatch.setattr(os, "open", swapped)
    np.testing.assert_array_equal(read_model(path).constants["w"], np.ones((4, 4)))


def test_nothing_stays_open(tmp_path: Path) -> None:
    path = external(tmp_path, location="good")
    before = len(os.listdir("/proc/self/fd"))
    for location in ("good", "link", "none", "short"):
        proto = onnx.load_model(path, load_external_data=False)
        proto.graph.initializer[0].external_data[0].value = location
        path.write_bytes(proto.SerializeToString())
        with contextlib.suppress(ModelError):
            read_model(path)
    assert len(os.listdir("/proc/self/fd")) <= before + 1, "a map keeps one, until it is collected"


def test_external_data_of_the_right_size_is_read(tmp_path: Path) -> None:
    assert read_model(external(tmp_path, location="good")).constants["w"].shape == (4, 4)


@pytest.mark.parametrize(
    ("dims", "text"),
    [
        ([2**31, 2**31], "declares"),
        ([-1, 4], "impossible shape"),
        ([5, 5], "needs 100 bytes"),
        ([1] * 65, "impossible"),
    ],
)
def test_shape_is_checked_before_allocation(tmp_path: Path, dims: list[int], text: str) -> None:
    proto = linear(np.ones((4, 4), np.float32))
    proto.graph.initializer[0].dims[:] = dims
    fails(saved(tmp_path, proto), text)


def test_typed_fields_are_checked() -> None:
    folder = ExternalData(Path())
    tensor = helper.make_tensor("t", TensorProto.FLOAT, [4], [1.0, 2.0, 3.0, 4.0])
    np.testing.assert_array_equal(load_tensor(tensor, folder), [1, 2, 3, 4])
    tensor.dims[:] = [5]
    with pytest.raises(ModelError, match="does not fill"):
        load_tensor(tensor, folder)


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "int4", "uint4", "float4_e2m1fn"])
@pytest.mark.parametrize("outside", [False, True])
def test_narrow_types(tmp_path: Path, rng: np.random.Generator, name: str, outside: bool) -> None:
    values = rng.integers(0, 6, (3, 5)).astype(getattr(ml_dtypes, name))
    tensor = numpy_helper.from_array(values, "t")
    if outside:
        (tmp_path / "t.data").write_bytes(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="t.data")
    got = load_tensor(tensor, ExternalData(tmp_path))
    assert got.dtype == values.dtype
    np.testing.assert_array_equal(got.astype(np.float32), values.astype(np.float32))


def test_strings_and_empty_tensors() -> None:
    folder = ExternalData(Path())
    got = load_tensor(helper.make_tensor("s", TensorProto.STRING, [2], ["a", "bc"]), folder)
    assert got.tolist() == ["a", "bc"]
    assert load_tensor(helper.make_tensor("e", TensorProto.INT64, [0], []), folder).shape == (0,)


def graph_of(*nodes: onnx.NodeProto, outputs: list[str] | None = None) -> onnx.ModelProto:
    return model(nodes, [("x", FLOAT, ["n"])], outputs or ["y"])


@pytest.mark.parametrize(
    ("proto", "text"),
    [
        (graph_of(node("Relu", "z", "y")), "'z' is made by nothing"),
        (graph_of(node("Add", "x b", "a"), node("Relu", "a", "b"), node("Relu", "b", "y")), "cycle"),
        (graph_of(node("Relu", "x", "y"), node("Abs", "x", "y")), "'y' is made twice"),
        (graph_of(node("Relu", "x", "x"), node("Relu", "x", "y")), "'x' is made twice"),
        (graph_of(node("Relu", "x", "y"), outputs=["q"]), "output 'q' is made by nothing"),
        (graph_of(node("Relu", "x", "y"), outputs=["y", "y"]), "named twice"),
    ],
)
def test_broken_graphs(tmp_path: Path, proto: onnx.ModelProto, text: str) -> None:
    fails(saved(tmp_path, proto), text)


def test_duplicate_initializer(tmp_path: Path) -> None:
    proto = linear(np.ones((2, 2), np.float32))
    proto.graph.initializer.append(proto.graph.initializer[0])
    fails(saved(tmp_path, proto), "given twice")


@pytest.mark.parametrize("opset", [6, 99])
def test_opset_out_of_range(tmp_path: Path, opset: int) -> None:
    fails(
        saved(tmp_path, model([node("Relu", "x", "y")], [("x", FLOAT, [1])], ["y"], opset=opset)),
        "opset",
        UnsupportedError,
    )


def test_unsorted_and_dead_nodes(tmp_path: Path) -> None:
    got = read_model(saved(tmp_path, graph_of(node("Relu", "a", "y"), node("Exp", "x", "dead"), node("Abs", "x", "a"))))
    assert [n.op_type for n in got.nodes] == ["Abs", "Relu"]


def test_inputs_with_initializers_are_constants(tmp_path: Path) -> None:
    proto = linear(np.ones((2, 2), np.float32))
    proto.graph.input.append(helper.make_tensor_value_info("w", FLOAT, [2, 2]))
    got = read_model(saved(tmp_path, proto))
    assert [i.name for i in got.inputs] == ["x"]


def test_default_domain_has_two_spellings(tmp_path: Path) -> None:
    proto = model([node("Relu", "x", "y", domain="ai.onnx")], [("x", INT64, [1])], ["y"])
    proto.opset_import[0].domain = "ai.onnx"
    assert read_model(saved(tmp_path, proto)).opsets == {"": 17}
