"""Loading an artifact for a GPU: with what it carries alone, and what is said where it cannot run."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.emulator import driver
from llmc.emulator.build import CUDA, CUDART
from llmc.emulator.build import driver as build_driver
from llmc.emulator.emulator import available
from llmc.errors import ArtifactError, InputError
from llmc.package.archive import write_artifact
from llmc.package.layout import DEVICE_KERNELS, RUNTIME_CUDA
from llmc.package.manifest import BufferSpec, CacheSpec, TargetSpec
from llmc.package.reader import open_artifact
from llmc.runtime import device, load
from llmc.runtime.caches import RowCaches
from llmc.runtime.gpu import gpu_memory
from llmc.runtime.pages import PagePool
from llmc.targets.detect import compute_capability
from tests.cuda_emulator.child import emulated
from tests.runtime import toys

Call = Callable[..., Any]
needs_emulator = pytest.mark.skipif(not available(), reason="no g++ 12 for x86-64")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without a kernel: it is loaded, and no more."""
    return write(tmp_path_factory.mktemp("gpu") / "m.llmc", "sm_80")


def write(path: Path, arch: str, runtime: bool = True) -> Path:
    manifest = toys.mlp_manifest(target=TargetSpec("cuda-" + arch, arch, ()))
    tensors = {f"t.{name}": w for name, w in toys.mlp_weights().items()}
    extras: dict[str, bytes | Path] = {DEVICE_KERNELS: b"{}"}
    write_artifact(path, manifest, lib=toys.mlp_library(), tensors=tensors, extras=extras, include_runtime=runtime)
    return path


@pytest.fixture(scope="module")
def gpu() -> Iterator[Call]:
    with emulated() as call:
        yield call


def test_the_runtime_for_cuda_travels_with_kernels(artifact: Path, tmp_path: Path) -> None:
    assert RUNTIME_CUDA in open_artifact(artifact).entries
    assert artifact.read_bytes() == write(tmp_path / "again.llmc", "sm_80").read_bytes()


@pytest.mark.skipif(compute_capability() is not None, reason="this machine has a GPU")
def test_no_driver(artifact: Path) -> None:
    with pytest.raises(ArtifactError, match=r"needs an NVIDIA GPU of sm_80 or later; .* no NVIDIA driver") as error:
        load(artifact)
    assert "--target native" in str(error.value.hint)


# What runs in the child process, which has an emulated GPU.


def weights_on_the_device(path: Path) -> None:
    model = load(path)
    for name, tensor in zip(model.main.spec.params, model.main._weights, strict=True):
        assert str(tensor.device).startswith("cuda")
        np.testing.assert_array_equal(model.memory.get(tensor, "float32"), toys.mlp_weights()[name])


def old_driver(path: Path) -> None:
    device._CUDA_VERSION = 14000  # type: ignore[attr-defined]
    try:
        load(path)
    finally:
        device._CUDA_VERSION = 13000  # type: ignore[attr-defined]


def small_gpu(size: int, run: Call, *arguments: Any) -> None:
    """With a GPU of so many bytes."""
    driver.install(memory=size)
    try:
        run(*arguments)
    finally:
        driver.install()


def caches(path: Path) -> None:
    decoder = open_artifact(path).manifest.decoder
    assert decoder is not None
    held = RowCaches(decoder, 2, gpu_memory())
    before = list(held.arrays)
    try:
        held.grow(np.zeros(2, np.int64), np.full(2, 2900))
    finally:
        assert held.capacity == 512 and all(x is y for x, y in zip(held.arrays, before, strict=True))


def pages(path: Path) -> None:
    decoder = open_artifact(path).manifest.decoder
    assert decoder is not None
    cache = CacheSpec(*(BufferSpec(("pages", 2, *sizes), "float32") for sizes in ((8, 64), (64, 8))))
    PagePool(dataclasses.replace(decoder, caches=(cache,), paged=True), None, gpu_memory()).take(100)


# What the tests say.


@needs_emulator
def test_weights_are_copied_to_the_device(gpu: Call, artifact: Path) -> None:
    gpu(weights_on_the_device, artifact)


@needs_emulator
def test_a_driver_that_is_too_old(gpu: Call, artifact: Path) -> None:
    with pytest.raises(ArtifactError, match=r"knows CUDA 13\.0 and nothing later\n  hint: .* 580 or later"):
        gpu(old_driver, artifact)


@needs_emulator
def test_a_gpu_that_is_too_old(gpu: Call, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"sm_90 or later; this machine's is sm_80\n  hint: .* --target cuda$"):
        gpu(load, write(tmp_path / "m.llmc", "sm_90", runtime=False))


@needs_emulator
def test_a_gpu_that_is_too_small(gpu: Call, artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"needs 0 MB for its weights, and the GPU has 0 MB left"):
        gpu(small_gpu, 1000, load, artifact)
    model = toys.write_decoder(tmp_path / "m.llmc")
    with pytest.raises(InputError, match=r"MB are needed for caches of 2 × 2944 tokens, and the GPU has"):
        gpu(small_gpu, 400_000, caches, model)
    with pytest.raises(InputError, match=r"MB are needed for caches of 100 pages of 64 tokens"):
        gpu(small_gpu, 400_000, pages, model)


_ALONE = """
import ctypes, sys
cuda, cudart, path = sys.argv[1:]
libcuda = ctypes.CDLL(cuda, ctypes.RTLD_GLOBAL)
libcuda.emu_driver_configure(8, 0, 108, 166912, 167936, 41943040, ctypes.c_uint64(1 << 30), ctypes.c_uint64(0))
ctypes.CDLL(cudart, ctypes.RTLD_GLOBAL)
import llmc.runtime.installed as installed
installed.installed_version = lambda: None
import llmc
model = llmc.load(path)
maps = open("/proc/self/maps").read()
assert "/llmc-" in next(line for line in maps.splitlines() if "libtvm_runtime_cuda" in line)
assert "libtvm_compiler" not in maps and "tvm" not in sys.modules
print(*(model.memory.get(model.main._weights[0], "float32")))
"""


@needs_emulator
def test_an_artifact_is_enough(artifact: Path) -> None:
    """Without apache-tvm, TVM's runtime for CUDA is the artifact's own."""
    folder = build_driver()
    arguments = [str(folder / CUDA), str(folder / CUDART), str(artifact)]
    done = subprocess.run([sys.executable, "-c", _ALONE, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose([float(x) for x in done.stdout.split()], toys.mlp_weights()["bias"], rtol=1e-6)


def test_without_a_cuda_runtime(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmc.runtime.device.CUDART", "libcudart.so.99")
    with pytest.raises(ArtifactError, match=r"libcudart\.so\.99.*neither") as error:
        device.load_cudart(str(artifact))
    assert error.value.hint == "pip install nvidia-cuda-runtime"
