"""What an install brings: every package, pins that work together, one version."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import setuptools

import llmc

ROOT = Path(__file__).parent.parent
# With a newer apache-tvm-ffi, which pip alone would choose, this apache-tvm segfaults when it writes a PrimFunc as JSON
# or tensorizes a schedule: the two are raised together, after every test ran with both, or not at all.
TVM, TVM_FFI = "0.27.0.post1", "0.1.14.post1"


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py tells setuptools."""
    told: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **kwargs: told.update(kwargs))
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    return told


def test_every_package_is_listed(arguments: dict[str, Any]) -> None:
    for name, folder in (("llmc", "compiler"), ("llmc.schedules", "schedules"), ("llmc.targets", "targets")):
        for init in (ROOT / folder).rglob("__init__.py"):
            package = ".".join([name, *init.parent.relative_to(ROOT / folder).parts])
            assert package in arguments["packages"]
            assert ROOT / arguments["package_dir"][package] == init.parent
    for folder in ("compiler", "schedules", "targets"):
        for source in (ROOT / folder).rglob("*.py"):
            assert (source.parent / "__init__.py").is_file(), (
                f"{source.parent} is no package: it would not be installed"
            )


def test_the_halves_of_tvm_are_pinned_together(arguments: dict[str, Any]) -> None:
    assert f"apache-tvm-ffi=={TVM_FFI}" in arguments["install_requires"]
    assert f"apache-tvm=={TVM}" in arguments["extras_require"]["compile"]
    assert importlib.metadata.version("apache-tvm-ffi") == TVM_FFI
    assert importlib.metadata.version("apache-tvm") == TVM
    shim = ast.parse((ROOT / "compiler/tvm_shim.py").read_text(encoding="utf8"))
    strings = [node.value for node in ast.walk(shim) if isinstance(node, ast.Constant)]
    assert TVM in strings and TVM_FFI in strings


def test_running_needs_no_compiler(arguments: dict[str, Any]) -> None:
    names = {re.match(r"[a-z0-9-]+", r)[0] for r in arguments["install_requires"]}
    assert names == {"numpy", "apache-tvm-ffi", "tokenizers", "jinja2", "typer", "rich"}


def test_one_version(arguments: dict[str, Any]) -> None:
    assert arguments["version"] == llmc.__version__
    assert f"## {llmc.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf8")


IMPORT_NAMES = {"xgboost-cpu": "xgboost", "apache-tvm": "tvm", "apache-tvm-ffi": "tvm_ffi"}
OPTIONAL_PEERS = {"onnxruntime_genai", "openvino", "nncf"}


def imported(folders: tuple[str, ...]) -> set[str]:
    """Top-level modules that are neither Python's nor ours."""
    files = [f for folder in folders for f in (ROOT / folder).rglob("*.py")]
    found = set()
    for node in (n for f in files for n in ast.walk(ast.parse(f.read_text(encoding="utf8")))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {(node.module or "").partition(".")[0]}
    return found - set(sys.stdlib_module_names) - {f.stem for f in files} - {"llmc", "tests", "benchmarks"}


def brought(requirements: list[str]) -> set[str]:
    names = [re.match(r"[A-Za-z0-9-]+", r)[0] for r in requirements]
    return {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names}


def test_what_is_imported_is_installed(arguments: dict[str, Any]) -> None:
    """Every module that the source imports comes with some extra, every one that the tests import with `test`."""
    run, extras = arguments["install_requires"], arguments["extras_require"]
    source = imported(("compiler", "schedules", "targets"))
    onnxruntime_serves_check = {"onnxruntime"}
    dependencies_of_onnx = {"google"}
    offered = [requirement for name in ("compile", "report", "remote", "cluster") for requirement in extras[name]]
    assert source - OPTIONAL_PEERS - onnxruntime_serves_check - dependencies_of_onnx <= brought(run + offered)
    assert imported(("tests", "examples")) - dependencies_of_onnx <= brought(run + extras["test"])
