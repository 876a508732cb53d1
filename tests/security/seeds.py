"""Small real files from which fuzzing starts, and ways to damage them; all made by code, the same ones every time."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.importer.helpers import BOOL, FLOAT, INT64, model, node
from tests.package import files

DATA = "w.data"  # the external data of a seed; 64 bytes


def linear() -> onnx.ModelProto:
    """A weight large enough to be mapped, a small one, a typed one."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((40, 32), "float32"), "b": np.zeros(32, np.float32)}
    proto = model([node("MatMul", "x w", "h"), node("Add", "h b", "y")], [("x", FLOAT, ["n", 40])], ["y"], weights)
    proto.graph.initializer.append(helper.make_tensor("unused", FLOAT, [3], [1.0, 2.0, 3.0]))
    return proto


def shapes() -> onnx.ModelProto:
    """An exporter's shape arithmetic."""
    nodes = [
        node("Shape", "x", "s"),
        node("Gather", "s zero", "n", axis=0),
        node("Unsqueeze", "n axes", "n1"),
        node("Concat", "n1 rest", "shape", axis=0),
        node("Reshape", "x shape", "y"),
    ]
    constants = {"zero": np.array(0), "axes": np.array([0]), "rest": np.array([2, -1])}
    return model(nodes, [("x", FLOAT, ["batch", "2*half"])], [("y", FLOAT, ["batch", 2, "half"])], constants)


def branches() -> onnx.ModelProto:
    """An If in an If, with constants of their own."""
    three = onnx.numpy_helper.from_array(np.full(4, 3, np.float32), "three")
    out = onnx.ValueInfoProto(name="o")
    inner = helper.make_graph([node("Mul", "h three", "o")], "inner", [], [out], [three])
    nested = node("If", "yes", "o", then_branch=inner, else_branch=inner)
    branch = helper.make_graph([nested], "outer", [], [out])
    nodes = [node("Relu", "x", "h"), node("If", "yes", "y", then_branch=branch, else_branch=branch)]
    return model(nodes, [("x", FLOAT, [2, 4])], ["y"], {"yes": np.array(True)})


def functions() -> onnx.ModelProto:
    """A function that calls another and hands it an attribute."""
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    leaky = node("LeakyRelu", "a", "b")
    leaky.attribute.append(onnx.AttributeProto(name="alpha", ref_attr_name="slope", type=onnx.AttributeProto.FLOAT))
    inner = helper.make_function("local", "Inner", ["a"], ["b"], [leaky], imports, ["slope"])
    call = node("Inner", "a", "b", domain="local", slope=0.1)
    outer = helper.make_function("local", "Outer", ["a"], ["b"], [call], imports)
    nodes = [node("Outer", "x", "y", domain="local")]
    return model(nodes, [("x", FLOAT, ["n"])], ["y"], functions=[inner, outer], domains={"local": 1})


def types() -> onnx.ModelProto:
    """Strings, 4-bit integers, bfloat16, an attribute of each plain kind, and external data."""
    constants = [
        helper.make_tensor("s", TensorProto.STRING, [2], ["a", "bc"]),
        helper.make_tensor("q", TensorProto.INT4, [3, 5], [1] * 15),
        helper.make_tensor("h", TensorProto.BFLOAT16, [2], [1.0, 2.0]),
    ]
    outside = TensorProto(name="w", dims=[4, 4], data_type=FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", DATA), ("offset", "0"), ("length", "64")):
        outside.external_data.add(key=key, value=value)
    nodes = [
        node("Constant", "", "k", value_floats=[1.0, 2.0, 3.0, 4.0]),
        node("Gemm", "x w k", "g", alpha=0.5, transB=1),
        node("ReduceSum", "g axes", "r", keepdims=1),
        node("Where", "c r r", "y"),
    ]
    inputs = [("x", FLOAT, [4, 4]), ("c", BOOL, [1]), ("i", INT64, [1])]
    proto = model(nodes, inputs, ["y"], {"axes": np.array([1])})
    proto.graph.initializer.extend([*constants, outside])
    return proto


def models() -> dict[str, bytes]:
    """ONNX files by name; `types` wants DATA beside it."""
    makers = (linear, shapes, branches, functions, types)
    return {make.__name__: make().SerializeToString(deterministic=True) for make in makers}


def artifact() -> bytes:
    """An artifact without real code."""
    with tempfile.TemporaryDirectory() as folder:
        return files.write(Path(folder) / "m.llmc", extras={"tokenizer.json": b"{}"}).read_bytes()


def damaged(seeds: Sequence[bytes], count: int, seed: int = 0) -> Iterator[bytes]:
    """`count` mutations: bits flipped; bytes cut, doubled, zeroed, set to extremes, spliced from another seed."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        content, other = bytearray(seeds[i % len(seeds)]), seeds[rng.integers(len(seeds))]
        for _ in range(rng.integers(1, 4)):
            start = int(rng.integers(len(content) or 1))
            stop = start + int(2 ** rng.uniform(0, 8))
            source = int(rng.integers(len(other)))
            match rng.integers(7):
                case 0:
                    for at in rng.integers(0, len(content) or 1, rng.integers(1, 9)):
                        content[at : at + 1] = bytes(b ^ 1 << rng.integers(8) for b in content[at : at + 1])
                case 1:
                    del content[int(rng.integers(len(content) or 1)) :]
                case 2:
                    del content[start:stop]
                case 3:
                    content[stop:stop] = content[start:stop]
                case 4:
                    content[start:stop] = bytes(len(content[start:stop]))
                case 5:
                    content[start : start + 1] = [b"\xff", b"\x80", b"\x7f", b"\xff" * 9 + b"\x01"][rng.integers(4)]
                case _:
                    content[start : start + 1] = other[source : source + stop - start]
        yield bytes(content)
