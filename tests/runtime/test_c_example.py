"""The C++ example gives what Python gives."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest

from llmc.package.archive import write_artifact
from llmc.runtime import load
from tests.runtime import toys

SOURCE = Path(__file__).parents[2] / "examples" / "c" / "run_artifact.cc"

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The program, linked with the libraries that the artifact carries, and the artifact."""
    folder = tmp_path_factory.mktemp("c")
    artifact = folder / "m.llmc"
    tensors = {f"t.{name}": w for name, w in toys.mlp_weights().items()}
    write_artifact(artifact, toys.mlp_manifest(), lib=toys.mlp_library(), tensors=tensors, include_runtime=True)
    with zipfile.ZipFile(artifact) as archive:
        archive.extractall(folder)
    runtime = folder / "runtime"
    spec = importlib.util.find_spec("tvm_ffi")
    assert spec is not None and spec.origin is not None
    include = Path(spec.origin).parent / "include"
    libraries = [f"-L{runtime}", f"-Wl,--no-as-needed,-rpath,{runtime}", "-ltvm_runtime", "-ltvm_ffi"]
    command = ["g++", "-std=c++17", "-O0", "-Wall", "-Werror", f"-I{include}", str(SOURCE), "-o", str(folder / "run")]
    subprocess.run([*command, *libraries], check=True)
    return folder / "run", artifact


def call(built: tuple[Path, Path], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(built[0]), str(built[1]), *arguments], cwd=built[1].parent, capture_output=True, text=True
    )


def test_same_results(built: tuple[Path, Path]) -> None:
    rng = np.random.default_rng(0)
    given = {"x": rng.standard_normal((5, toys.HIDDEN), "float32"), "shift": rng.standard_normal((5, 3), "float32")}
    for name, array in given.items():
        array.tofile(built[1].parent / f"{name}.in")
    done = call(built, f"x=x.in:5,{toys.HIDDEN}", "shift=shift.in:5,3")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "hidden float32 5 7\nout float32 5 3\n"
    expected = load(built[1])(given)
    assert isinstance(expected, dict)
    for name, array in expected.items():
        found = np.fromfile(built[1].parent / f"{name}.bin", "float32").reshape(array.shape)
        np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("x=x.in:5,40",), "no input shift"),
        (("x",), "write NAME=FILE"),
        (("x=x.in:6,40", "shift=x.in:6,3"), "too short"),
    ],
)
def test_wrong_use_is_one_line(built: tuple[Path, Path], arguments: tuple[str, ...], says: str) -> None:
    (built[1].parent / "x.in").write_bytes(bytes(5 * 40 * 4))
    done = call(built, *arguments)
    assert done.returncode == 1
    assert says in done.stderr and done.stderr.count("\n") == 1
