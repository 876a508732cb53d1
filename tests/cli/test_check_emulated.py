"""`llmc check --emulate`: an artifact for a GPU, compared with onnxruntime on a machine without one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from llmc import checker, emulation
from llmc.emulator import driver
from llmc.emulator.emulator import available
from llmc.errors import LlmcError
from llmc.package.device import device_kernels
from llmc.package.manifest import ArraySpec
from llmc.package.reader import open_artifact
from llmc.pipeline import compile
from tests import graphs
from tests.cli.conftest import Call
from tests.cuda_emulator.child import emulated
from tests.gpu.tools import needs_compiler

needs_emulator = pytest.mark.skipif(not available(), reason="no g++ 12 for x86-64")


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """y = relu(x W), x [rows, 8], for a GPU: its artifact, and the model."""
    folder = tmp_path_factory.mktemp("emulated")
    compile(graphs.linear(folder / "m.onnx", 8), target="cuda-sm80").save(folder / "m.llmc")
    return folder / "m.llmc", folder / "m.onnx"


@needs_compiler
@needs_emulator
def test_it_is_run_without_a_gpu(linear: tuple[Path, Path]) -> None:
    def check(*words: str) -> str:
        command = [sys.executable, "-m", "llmc", "check", *map(str, linear), "--emulate", *words]
        done = subprocess.run(command, capture_output=True, text=True)
        assert not done.returncode, done.stderr
        return done.stdout

    report = json.loads(check("--json"))
    assert report["emulated"] and report["passed"]
    assert [output["case"] for output in report["outputs"]] == ["rows=1", "rows=5"]
    text = check("--dim", "rows=3")
    assert "rows=3" in text and "functionally emulated; not run on a GPU" in text


@needs_compiler
def test_hopeless_work_is_refused(linear: tuple[Path, Path], llmc: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**_: object) -> None:
        raise AssertionError("work was done")

    monkeypatch.setattr(driver, "install", refused)
    code, _, err = llmc("check", *linear, "--emulate", "--dim", "rows=1000000000")
    assert code == 2 and "about 6.4e+10 multiplications would take some 9 hours here" in err and "--dim" in err
    monkeypatch.setattr(emulation, "_BOOKS", 1 << 40)
    code, _, err = llmc("check", *linear, "--emulate")
    assert code == 2 and "MB of weights would take" in err


@needs_compiler
@pytest.mark.parametrize("format", ["w4a16", "w8a8", "f16"])
def test_packed_weights_are_counted_one_by_one(format: str, llmc: Call, tmp_path: Path) -> None:
    """However many of them an element of the packed weight holds."""
    compile(graphs.linear(tmp_path / "m.onnx", 64), target="cuda-sm80", quantize=format).save(tmp_path / "m.llmc")
    code, _, err = llmc("check", tmp_path / "m.llmc", tmp_path / "m.onnx", "--emulate", "--dim", "rows=1000000000")
    counted = float(re.search(r"about (\S+) multiplications", err)[1]) / 1e9  # type: ignore[index]
    assert code == 2 and 64 * 64 <= counted < 1.3 * 64 * 64  # and scales, and what rounds the numbers up


@needs_compiler
def test_without_a_compiler_it_says_what_to_install(
    linear: tuple[Path, Path], llmc: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emulation, "compiler", lambda: None)
    code, _, err = llmc("check", *linear, "--emulate")
    assert code == 2 and "needs g++ 12 or later" in err and "apt install g++" in err


def test_it_is_for_gpus_alone(llmc: Call, mlp: Path, relu: Path) -> None:
    code, _, err = llmc("check", mlp, relu, "--emulate")
    assert code == 6 and "needs no emulation" in err and "leave --emulate out" in err
    code, _, err = llmc("check", mlp, relu, "--emulate", "--text", relu)
    assert code == 2 and "leave --text out" in err


def test_rows_are_what_a_call_multiplies_with() -> None:
    ids, past = ArraySpec("ids", "int64", ("b", "s")), ArraySpec("past.0", "float32", ("b", 2, "p", 4))
    dims = {"b": 2, "s": 7, "p": 99}
    assert emulation.rows([ids, past], dims) == 14
    assert emulation.rows([ArraySpec("x", "float32", ("b", "s", 64))], dims) == 14
    assert emulation.rows([ArraySpec("image", "float32", ("b", 3, 10, 20))], dims) == 400
    assert emulation.rows([ArraySpec("x", "float32", ())], dims) == 1


def checked(artifact: Path, model: Path, old: str, new: str) -> str:
    """What is said where the kernels' CUDA C is not what it was when it was compiled."""
    opened = open_artifact(artifact)

    def register(path: Path) -> None:
        for name in device_kernels(opened):
            source = opened.read(f"cuda/{name}.cu").decode()
            driver.register_kernel(name, source.replace(old, new), opened.read(f"cuda/{name}.bin"))

    with patch.object(driver, "register", register):
        try:
            checker.check(artifact, model, emulate=True)
        except LlmcError as error:
            driver.forgive()
            return f"{error.exit_code} {error}"
    return ""


@needs_compiler
@needs_emulator
def test_what_the_emulator_finds_is_said(linear: tuple[Path, Path]) -> None:
    with emulated() as call:
        unknown = call(checked, *linear, "{", '{ asm volatile("new.instruction;");')
        assert unknown.startswith("2 --emulate: kernel ") and "cannot be emulated" in unknown, unknown
        message = call(checked, *linear, "((", "(1000000 + (")
        assert re.search(r"^9 .*the emulated GPU found: \w+, block .* line \d+", message), message
