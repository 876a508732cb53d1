"""Imports run one way (docs/architecture.md): every file's imports are compared with what its room may see."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "schedules": "llmc.schedules",
    "targets": "llmc.targets",
    "tuning_logs": "llmc.tuning_logs",
    "compiler": "llmc",
}

KERNELS = {"errors", "tvm_shim", "targets", "schedules"}
GRAPH = KERNELS | {"graph", "match"}
SERVING = {"errors", "package", "runtime"}
MEASURING = SERVING | {"engines", "options", "perplexity", "samples"}
# What each room may import besides itself. The importer, the quantiser and the rewrites do not see each other; a later
# stage knows the values that the stages before it made.
MAY_SEE = {
    "errors": set(),
    "tvm_shim": {"errors"},
    "targets": {"errors", "tvm_shim"},
    "schedules": {"errors", "tvm_shim", "targets"},
    "tuning_logs": set(),
    "graph": KERNELS,
    "match": KERNELS | {"graph"},
    "ops": GRAPH,
    "importer": GRAPH | {"ops"},
    "quantize": GRAPH,
    "fuse": GRAPH,
    "select": GRAPH,
    "tune": KERNELS | {"emulator", "gpu", "select", "tir_pipeline", "runtime"},
    "tir_pipeline": KERNELS,
    "legalize": GRAPH | {"ops", "tir_pipeline"},
    "order": {"tvm_shim"},
    "reshapes": {"tvm_shim"},
    "gpu": KERNELS | {"package", "tir_pipeline"},
    "emulator": KERNELS | SERVING | {"gpu", "tir_pipeline"},
    "fallback": GRAPH | {"gpu", "legalize", "order", "reshapes", "tir_pipeline"},
    "lower": GRAPH | {"ops", "select", "tir_pipeline"},
    "workspace": KERNELS,
    "build": GRAPH | {"fallback", "gpu", "reshapes", "tir_pipeline", "workspace"},
    "package": {"errors"},
    "artifact": GRAPH | {"package", "quantize", "fuse", "select", "tune", "lower", "workspace"},
    "options": {"errors", "targets"},
    "calibrate": GRAPH
    | SERVING
    | {"quantize", "fuse", "select", "tune", "lower", "build", "artifact", "options", "samples"},
    "pipeline": GRAPH
    | {"importer", "quantize", "fuse", "select", "tune", "lower", "build", "artifact", "options", "package"}
    | {"calibrate"},
    "tuning": KERNELS | {"options", "package", "tune"},
    "runtime": {"errors", "package"},
    "engines": SERVING,
    "perplexity": {"errors", "engines"},
    "samples": {"errors", "package"},
    "bench": MEASURING,
    "emulation": SERVING | {"emulator", "samples"},
    "checker": MEASURING | {"emulation"},
    "ceilings": KERNELS,
    "profile": KERNELS | SERVING | {"bench", "ceilings", "options"},
    "report": SERVING | {"targets", "tune", "bench", "profile"},
    "cli": MEASURING | {"bench", "checker", "profile", "pipeline", "quantize", "report", "targets", "tune", "tuning"},
    "__main__": {"cli"},
    "": {"errors", "pipeline", "runtime", "checker"},
}
PLAIN_TARGETS = {"llmc.targets.base", "llmc.targets.x86", "llmc.targets.cuda", "llmc.targets.detect"}
RUNTIME_ONLY = {"numpy", "tvm_ffi", "tokenizers", "jinja2", "ml_dtypes"}


def modules() -> Iterator[tuple[str, Path]]:
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [p for p in path.relative_to(ROOT / folder).with_suffix("").parts if p != "__init__"]
            yield ".".join([package, *parts]), path


def imports(path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(module, names taken from it) of every import anywhere in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = tuple(alias.name for alias in node.names)
            if node.module == "llmc":
                yield from ((f"llmc.{name}", ()) for name in names)
            else:
                yield node.module or "", names


def room(module: str) -> str:
    return module.partition(".")[2].partition(".")[0]


MODULES = dict(modules())


@pytest.mark.parametrize("module", MODULES)
def test_a_room_sees_only_what_lies_below_it(module: str) -> None:
    here = room(module)
    assert here in MAY_SEE, f"{here or module} is a new room: say in MAY_SEE what it may import"
    for name, _ in imports(MODULES[module]):
        if name.partition(".")[0] == "llmc" and name != "llmc.__version__":
            assert room(name) == here or room(name) in MAY_SEE[here], f"{module} must not import {name}"


@pytest.mark.parametrize("module", MODULES)
def test_tvm_comes_through_the_shim(module: str) -> None:
    for name, names in imports(MODULES[module]):
        top = name.partition(".")[0]
        if top == "tvm":
            assert module == "llmc.tvm_shim", f"{module} must import TVM through llmc.tvm_shim"
        if top == "tvm_ffi":
            assert room(module) in ("runtime", "tvm_shim", "package"), f"{module} must not import tvm_ffi"
        if room(module) == "schedules" and name == "llmc.tvm_shim":
            assert "relax" not in names, f"{module}: kernels never see Relax"
        if module in PLAIN_TARGETS:
            assert name != "llmc.tvm_shim", f"{module} is plain data"


@pytest.mark.parametrize("module", [m for m in MODULES if room(m) in ("runtime", "package")])
def test_the_runtime_needs_little(module: str) -> None:
    for name, _ in imports(MODULES[module]):
        top = name.partition(".")[0]
        assert top in sys.stdlib_module_names or top == "llmc" or top in RUNTIME_ONLY, f"{module} imports {name}"


def test_a_wrong_arrow_would_be_seen(tmp_path: Path) -> None:
    source = tmp_path / "source.py"
    source.write_text(
        "def f():\n    from llmc.importer.reader import x\n    import tvm.relax\n    from llmc import fuse\n"
    )
    assert [name for name, _ in imports(source)] == ["llmc.importer.reader", "tvm.relax", "llmc.fuse"]
    assert room("llmc.importer.reader") not in MAY_SEE["schedules"]


def loaded_by(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after `code`."""
    script = f"{code}\nimport sys\nprint(*sys.modules, file=sys.__stderr__)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stderr.split()}


def test_importing_llmc_is_light() -> None:
    assert not loaded_by("import llmc") & {"numpy", "tvm", "tvm_ffi", "onnx", "typer", "rich"}


@pytest.mark.parametrize("arguments", ["'--help'", "'compile', '--help'", "'targets'"])
def test_looking_around_loads_no_compiler(arguments: str) -> None:
    loaded = loaded_by(f"from llmc.cli import main; main([{arguments}])")
    assert not loaded & {"numpy", "tvm", "tvm_ffi", "onnx"}


@pytest.mark.alone
def test_help_is_quick() -> None:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "llmc.cli", "--help"], capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.3
