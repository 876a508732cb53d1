"""Operators that are not supported are refused by name, with the reason."""

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from llmc.errors import UnsupportedError
from llmc.importer import import_model
from llmc.ops.refused import REFUSED

ATTRIBUTES = {"RandomNormal": {"shape": [2, 3]}, "RandomUniform": {"shape": [2, 3]}}


def element_type(op: str) -> int:
    if "strings" in REFUSED[op]:
        return TensorProto.STRING
    return TensorProto.UINT8 if op == "ImageDecoder" else TensorProto.FLOAT


@pytest.mark.parametrize("op", REFUSED)
def test_refused(tmp_path: Path, op: str) -> None:
    attributes = ATTRIBUTES.get(op, {})
    node = helper.make_node(op, [] if attributes else ["x"] * (1 + (op == "StringConcat")), ["y"], "made", **attributes)
    if op == "StringSplit":
        node.output.append("lengths")
    info = helper.make_tensor_value_info("x", element_type(op), [2, 3])
    graph = helper.make_graph([node], "g", [info], [helper.make_value_info("y", onnx.TypeProto())])
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10), path)
    with pytest.raises(UnsupportedError, match=rf"made \(ai.onnx.{op}, opset 22\)") as refused:
        import_model(path)
    assert REFUSED[op] in str(refused.value)
