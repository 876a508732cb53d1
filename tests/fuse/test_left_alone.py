"""Attention that the kernels do not compute stays ai.onnx's, for its rule: half precision, and windows."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from llmc.fuse import fuse
from llmc.importer import import_model


def fused(tmp_path: Path, dtype: int, **attrs: int) -> list[str]:
    """Domains of the Attention nodes that are left of one."""
    names = ["q", "k", "v"]
    node = helper.make_node("Attention", names, ["y"], **attrs)
    inputs = [helper.make_tensor_value_info(n, dtype, [2, 3, 4, 8]) for n in names]
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", dtype, [2, 3, 4, 8])])
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 25)], ir_version=13), path)
    return [n.domain for n in fuse(import_model(path)).nodes if n.op == "Attention"]


def test_single_precision_is_fused(tmp_path: Path) -> None:
    assert fused(tmp_path, TensorProto.FLOAT) == ["llmc"]


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_half_precision_is_not(tmp_path: Path, dtype: int) -> None:
    assert fused(tmp_path, dtype) == [""]


@pytest.mark.parametrize("attrs", [{"left_window_size": 1}, {"right_window_size": 0}])
def test_windows_are_not(tmp_path: Path, attrs: dict[str, int]) -> None:
    assert fused(tmp_path, TensorProto.FLOAT, **attrs) == [""]
