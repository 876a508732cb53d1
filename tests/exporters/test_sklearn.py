"""skl2onnx writes operators of ai.onnx.ml, which are refused: all at once, by name, whatever stands among them."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from llmc.errors import UnsupportedError
from llmc.importer import import_model

ML = "ai.onnx.ml"


@pytest.mark.parametrize("standard", [True, False], ids=["with ai.onnx", "ai.onnx.ml alone"])
def test_every_operator_is_named(tmp_path: Path, standard: bool) -> None:
    node = helper.make_node
    nodes = [
        node("Scaler", ["x"], ["scaled"], name="scale", domain=ML, offset=[0.0] * 4, scale=[1.0] * 4),
        node("LinearClassifier", ["scaled"], ["label", "raw"], name="classify", domain=ML, coefficients=[0.1] * 8),
        node("Normalizer", ["raw"], ["p"], name="normalise", domain=ML, norm="L1"),
        node("ZipMap", ["p"], ["probabilities"], name="zip", domain=ML, classlabels_int64s=[0, 1]),
    ]
    if standard:
        nodes.insert(1, node("Cast", ["scaled"], ["double"], name="cast", to=TensorProto.DOUBLE))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 4])
    outputs = [helper.make_value_info(name, onnx.TypeProto()) for name in ("label", "probabilities")]
    imports = [helper.make_opsetid(ML, 1), *([helper.make_opsetid("", 17)] if standard else [])]
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(helper.make_graph(nodes, "pipeline", [x], outputs), opset_imports=imports), path)
    with pytest.raises(UnsupportedError) as refused:
        import_model(path)
    for name, op in (
        ("scale", "Scaler"),
        ("classify", "LinearClassifier"),
        ("normalise", "Normalizer"),
        ("zip", "ZipMap"),
    ):
        assert f"{name} (ai.onnx.ml.{op}, opset 1)" in str(refused.value)
