"""Loading: without the compiler, on the right CPU and runtime, weights in place."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llmc.errors import ArtifactError, OptionError
from llmc.package.archive import write_artifact
from llmc.package.manifest import TargetSpec
from llmc.runtime import load
from llmc.runtime.library import cpu_flags
from tests.runtime import toys

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def mlp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.write_mlp(tmp_path_factory.mktemp("mlp") / "m.llmc")


def fresh(code: str, *arguments: object, **environment: str) -> str:
    """What a new process prints; it sees no environment variable of ours that sizes thread pools."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TVM_", "OMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**kept, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_llmc_is_light() -> None:
    code = """
import sys, time
start = time.perf_counter()
import llmc
assert time.perf_counter() - start < 0.5
heavy = {name.partition('.')[0] for name in sys.modules} & {'numpy', 'tvm', 'tvm_ffi', 'onnx', 'typer'}
assert not heavy, heavy
assert set(dir(llmc)) >= {'load', 'compile', 'Session', 'LlmcError'}
"""
    fresh(code)


def test_running_needs_no_compiler(mlp: Path) -> None:
    code = """
import sys
import numpy as np
import llmc
out = llmc.load(sys.argv[1])(x=np.ones((2, 40), 'float32'), shift=np.zeros((2, 3), 'float32'))
maps = open('/proc/self/maps').read()
assert 'libtvm_runtime' in maps and 'libtvm_compiler' not in maps
assert 'tvm' not in sys.modules and 'onnx' not in sys.modules
print(out['out'].tolist())
"""
    expected = toys.mlp_reference(np.ones((2, toys.HIDDEN)), np.zeros((2, 3)))[1]
    np.testing.assert_allclose(json.loads(fresh(code, mlp)), expected, rtol=1e-5)


def test_weights_are_mapped_in_place(mlp: Path) -> None:
    model = load(mlp)
    span = np.frombuffer(model.artifact.data, np.uint8)
    first = span.ctypes.data
    for tensor in model.functions["main"]._weights:
        assert first <= tensor.data_ptr() < first + span.size
        assert tensor.data_ptr() % 64 == 0
    maps = Path("/proc/self/maps").read_text()
    assert str(mlp) in maps


def test_weights_outlive_the_file_name(tmp_path: Path) -> None:
    model = load(toys.write_mlp(tmp_path / "m.llmc"))
    (tmp_path / "m.llmc").unlink()
    x, shift = np.ones((1, toys.HIDDEN), "float32"), np.zeros((1, 3), "float32")
    out = model(x=x, shift=shift)
    np.testing.assert_allclose(out["out"], toys.mlp_reference(x, shift)[1], rtol=1e-5)  # type: ignore[index]


def test_no_temporary_file_stays(mlp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    load(mlp)
    assert list(tmp_path.iterdir()) == []


def test_another_cpu(tmp_path: Path) -> None:
    path = toys.write_mlp(tmp_path / "m.llmc", target=TargetSpec("x86-quantum", "q", ("fpu_of_1999", "qubits")))
    with pytest.raises(ArtifactError, match=r"x86-quantum and needs fpu_of_1999, qubits") as error:
        load(path)
    assert error.value.hint


@pytest.mark.skipif(not cpu_flags(), reason="/proc/cpuinfo lists no flags")
def test_this_cpu(tmp_path: Path) -> None:
    load(toys.write_mlp(tmp_path / "m.llmc", target=TargetSpec("here", "", tuple(sorted(cpu_flags())[:5]))))


@pytest.mark.parametrize(
    ("versions", "says"),
    [({"tvm_ffi": "9.9"}, "apache-tvm-ffi 9.9"), ({"tvm": "9.9"}, "TVM 9.9")],
)
def test_another_runtime(tmp_path: Path, versions: dict[str, str], says: str) -> None:
    path = tmp_path / "m.llmc"
    manifest = dataclasses.replace(toys.mlp_manifest(), **versions)  # type: ignore[arg-type]
    tensors = {f"t.{name}": w for name, w in toys.mlp_weights().items()}
    write_artifact(path, manifest, lib=toys.mlp_library(), tensors=tensors)
    with pytest.raises(ArtifactError, match=says) as error:
        load(path)
    assert "pip install" in str(error.value.hint)


WITHOUT_TVM = """
import sys
import importlib.metadata as metadata
real = metadata.version
def version(name):
    if name == 'apache-tvm':
        raise metadata.PackageNotFoundError(name)
    return real(name)
metadata.version = version
import llmc
try:
    model = llmc.load(sys.argv[1])
except llmc.ArtifactError as error:
    print(error)
else:
    import numpy as np
    print(model(x=np.ones((1, 40), 'float32'), shift=np.zeros((1, 3), 'float32'))['out'].shape)
    assert 'site-packages/tvm/' not in open('/proc/self/maps').read()
"""


def test_without_tvm_the_artifact_brings_its_runtime(mlp: Path, tmp_path: Path) -> None:
    tensors = {f"t.{name}": w for name, w in toys.mlp_weights().items()}
    own = tmp_path / "own.llmc"
    write_artifact(own, toys.mlp_manifest(), lib=toys.mlp_library(), tensors=tensors, include_runtime=True)
    assert fresh(WITHOUT_TVM, own) == "(1, 3)\n"
    assert "it is not installed" in fresh(WITHOUT_TVM, mlp)


def test_a_library_that_is_none(tmp_path: Path) -> None:
    tensors = {f"t.{name}": w for name, w in toys.mlp_weights().items()}
    write_artifact(tmp_path / "m.llmc", toys.mlp_manifest(), lib=b"no code", tensors=tensors)
    with pytest.raises(ArtifactError, match="library cannot be loaded"):
        load(tmp_path / "m.llmc")


THREADS = """
import os, sys
import llmc
before = os.sched_getaffinity(0)
model = llmc.load(sys.argv[1], threads=eval(sys.argv[2]))
assert os.sched_getaffinity(0) == before, 'the caller was pinned'
print(model.threads)
"""


def test_threads(mlp: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    assert fresh(THREADS, mlp, 1) == "1\n"
    assert int(fresh(THREADS, mlp, None)) <= cores
    assert fresh(THREADS, mlp, None, TVM_NUM_THREADS="1") == "1\n"
    if cores > 1:
        assert fresh(THREADS, mlp, 2, TVM_NUM_THREADS="1") == "2\n"


@pytest.mark.parametrize("threads", [0, -1, 100_000])
def test_threads_that_cannot_be(mlp: Path, threads: int) -> None:
    with pytest.raises(OptionError, match="threads is"):
        load(mlp, threads=threads)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_a_pool_that_has_started_does_not_grow(mlp: Path) -> None:
    code = """
import sys
import llmc
llmc.load(sys.argv[1]).threads
try:
    llmc.load(sys.argv[1], threads=2)
except llmc.OptionError as error:
    print(error)
"""
    assert "started its pool of 1 already" in fresh(code, mlp, TVM_NUM_THREADS="1")
