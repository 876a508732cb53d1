"""A model for a GPU through the command line, on a machine without one: compiled, inspected, not run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from llmc.gpu.sources import cuda_sources
from llmc.targets.detect import compute_capability
from tests.cli.conftest import Call
from tests.gpu.tools import needs_compiler


@needs_compiler
def test_a_model_for_a_gpu_is_compiled_and_inspected(llmc: Call, relu: Path, mlp: Path, tmp_path: Path) -> None:
    artifact = tmp_path / "relu.llmc"
    code, _, err = llmc("compile", relu, "--target", "cuda-sm80", "-o", artifact)
    assert code == 0 and "cuda-sm80: NVIDIA Ampere" in err

    code, out, _ = llmc("inspect", artifact, "--kernels", "--json")
    (kernel,) = json.loads(out)
    assert code == 0 and kernel["name"] == "relu_kernel" and kernel["arch"] == "sm_80"
    assert 0 < kernel["registers"] < 256 and 0 < kernel["occupancy"] <= 1
    assert kernel["spill_bytes"] == kernel["shared_bytes"] == kernel["hmma"] == kernel["imma"] == 0
    assert 0.9 < kernel["predicted_us"] < 10 and kernel["predicted_at"] == "512 tokens"
    assert kernel["worst_conflict"] == kernel["mean_conflict"] == 1
    code, out, _ = llmc("inspect", artifact, "--kernels")
    assert code == 0 and "relu_kernel" in out and "not yet, on any GPU" in out
    assert "predicted us" in out and "by a model, not measured" in out
    code, out, _ = llmc("inspect", artifact)
    assert code == 0 and "cuda-sm80 (sm_80), needs an NVIDIA GPU" in out and "cuda/relu_kernel.cu" in out
    (source,) = cuda_sources(artifact).values()
    assert 'extern "C" __global__' in source.source
    assert [a.pointer for a in source.launch.arguments][:2] == [True, True]

    code, _, err = llmc("inspect", mlp, "--kernels")
    assert code == 6 and "holds no kernels for a GPU" in err

    if compute_capability() is None:
        np.save(tmp_path / "x.npy", np.zeros((2, 8), np.float32))
        code, _, err = llmc("run", artifact, "--input", f"x={tmp_path / 'x.npy'}")
        assert code == 6 and "needs an NVIDIA GPU of sm_80 or later" in err and "hint" in err


@needs_compiler
def test_names_of_the_model_are_no_part_of_the_source(llmc: Call, tmp_path: Path) -> None:
    """Inputs and dimensions are named by whoever wrote the model."""
    dim, name = "rows/<0>; }", 'x"); int'
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [dim, 8]) for n in (name, "y"))
    graph = helper.make_graph([helper.make_node("Relu", [name], ["y"])], "g", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    code, _, err = llmc("compile", tmp_path / "m.onnx", "--target", "cuda", "-o", tmp_path / "m.llmc")
    assert code == 0, err
    (source,) = cuda_sources(tmp_path / "m.llmc").values()
    assert "rows/" not in source.source and 'x"' not in source.source


def test_targets_say_what_can_be_done_here(llmc: Call) -> None:
    code, out, _ = llmc("targets", "--json")
    known = json.loads(out)["targets"]
    assert code == 0 and known["cuda-sm90"]["mcpu"] == "sm_90" and "run on no GPU yet" in known["cuda-sm90"]["verified"]
    assert known["cuda-sm80"]["runs_here"] is (compute_capability() is not None)
