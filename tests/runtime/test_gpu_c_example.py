"""The C++ example on an artifact for a GPU: as a library, in a process with an emulated one."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto

from llmc.emulator import driver
from llmc.emulator.emulator import available
from llmc.pipeline import compile
from tests.cuda_emulator.child import emulated
from tests.gpu.tools import needs_compiler
from tests.graphs import Builder
from tests.runtime.test_c_example import SOURCE

pytestmark = [needs_compiler, pytest.mark.skipif(not available(), reason="no g++ 12 for x86-64")]


def model(path: Path) -> Path:
    """y = relu(x W), and its largest numbers."""
    b = Builder()
    x = b.input("x", TensorProto.FLOAT, ["rows", 8])
    weight = b.const("w", np.random.default_rng(0).standard_normal((8, 8)), np.float32)
    y = b.op("Relu", [b.op("MatMul", [x, weight], "product")], "y", outputs=["y"])
    b.op("ReduceMax", [y, b.ints(1)], "largest", outputs=["largest"], keepdims=0)
    b.output("y", TensorProto.FLOAT, ["rows", 8])
    b.output("largest", TensorProto.FLOAT, ["rows"])
    return b.save(path, 18)


def built(folder: Path) -> Path:
    """The program as a library, against the libraries that the artifact carries."""
    with zipfile.ZipFile(folder / "m.llmc") as archive:
        archive.extractall(folder)
    runtime = folder / "runtime"
    spec = importlib.util.find_spec("tvm_ffi")
    assert spec is not None and spec.origin is not None
    include = Path(spec.origin).parent / "include"
    libraries = [f"-L{runtime}", f"-Wl,--no-as-needed,-rpath,{runtime}", "-ltvm_runtime", "-ltvm_ffi"]
    command = ["g++", "-std=c++17", "-O0", "-Wall", "-Werror", "-shared", "-fPIC", f"-I{include}", str(SOURCE)]
    subprocess.run([*command, "-o", str(folder / "run.so"), *libraries], check=True)
    return folder / "run.so"


def main(folder: Path, program: Path, *arguments: str) -> tuple[int, int]:
    """In the child process: the exit status, and how many kernels ran."""
    os.chdir(folder)
    driver.register(folder / "m.llmc")
    words = [word.encode() for word in (str(program), str(folder / "m.llmc"), *arguments)]
    before = driver.launches()
    with driver.judged():
        status = ctypes.CDLL(str(program)).main(len(words), (ctypes.c_char_p * len(words))(*words))
    return status, driver.launches() - before


def test_same_results(tmp_path: Path) -> None:
    onnx = model(tmp_path / "m.onnx")
    compile(onnx, target="cuda-sm80").save(tmp_path / "m.llmc")
    x = np.random.default_rng(1).standard_normal((5, 8), np.float32)
    x.tofile(tmp_path / "x.in")
    program = built(tmp_path)
    with emulated() as call:
        status, launches = call(main, tmp_path, program, "x=x.in:5,8")
    assert status == 0 and launches > 0
    session = onnxruntime.InferenceSession(str(onnx), providers=["CPUExecutionProvider"])
    for name, expected in zip(("y", "largest"), session.run(["y", "largest"], {"x": x}), strict=True):
        found = np.fromfile(tmp_path / f"{name}.bin", "float32").reshape(expected.shape)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
