"""The emulated driver, called as TVM calls it: what it refuses, what it finds, and how late it does things."""

from __future__ import annotations

import ctypes
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.emulator import driver
from llmc.emulator.emulator import EmulationError, available
from llmc.gpu import toolchain
from llmc.gpu.binary import resources
from llmc.gpu.fatbin import fatbin
from tests.cuda_emulator.child import emulated
from tests.gpu.tools import needs_compiler

pytestmark = pytest.mark.skipif(not available(), reason="no g++ 12 for x86-64")
Call = Callable[..., Any]
SOURCE = """extern "C" __global__ void __launch_bounds__(64) scale(float* x, float factor, int n) {
  int i = blockIdx.x * 64 + threadIdx.x;
  if (i < n) x[i] = x[i] * factor;
}
extern "C" __global__ void turn(float* x) {
  __shared__ float fixed[64];
  extern __shared__ float tile[];
  fixed[threadIdx.x] = x[threadIdx.x];
  tile[threadIdx.x] = fixed[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = tile[63 - threadIdx.x];
}
"""
TO_GPU, TO_HOST, ON_GPU = 1, 2, 3  # cudaMemcpyKind
GLOBAL, RELAXED = 0, 2  # cudaStreamCaptureMode
INVALID_VALUE, OUT_OF_MEMORY, INVALID_DIRECTION, INVALID_IMAGE, NO_BINARY = 1, 2, 21, 200, 209
INVALID_SOURCE, INVALID_HANDLE, NOT_FOUND, NOT_READY, ILLEGAL_ADDRESS, LAUNCH_FAILURE = 300, 400, 500, 600, 700, 719
CAPTURE_UNSUPPORTED, CAPTURE_INVALIDATED, CAPTURE_IMPLICIT = 900, 901, 906


@pytest.fixture(scope="module")
def gpu() -> Iterator[Call]:
    with emulated() as call:
        yield call


@pytest.fixture(scope="module")
def image() -> bytes:
    binary = toolchain.find_toolchain().compile(SOURCE, "sm_80")
    return fatbin(80, binary.cubin, binary.ptx)


# What runs in the child process.


def malloc(nbytes: int) -> ctypes.c_void_p:
    at = ctypes.c_void_p()
    assert driver.cudart().cudaMalloc(ctypes.byref(at), ctypes.c_size_t(nbytes)) == 0
    return at


def pinned(count: int) -> np.ndarray:
    """float32 [count] in pinned memory."""
    at = ctypes.c_void_p()
    assert driver.cudart().cudaMallocHost(ctypes.byref(at), ctypes.c_size_t(4 * count)) == 0
    return np.ctypeslib.as_array(ctypes.cast(at, ctypes.POINTER(ctypes.c_float)), (count,))


def address(place: np.ndarray | ctypes.c_void_p) -> ctypes.c_void_p:
    return ctypes.c_void_p(place.ctypes.data) if isinstance(place, np.ndarray) else place


def copy(to: Any, source: Any, nbytes: int, kind: int, stream: Any = None) -> int:
    arguments = address(to), address(source), ctypes.c_size_t(nbytes), kind, stream
    return int(driver.cudart().cudaMemcpyAsync(*arguments))


def stream(flags: int = 0) -> ctypes.c_void_p:
    made = ctypes.c_void_p()
    assert driver.cudart().cudaStreamCreateWithFlags(ctypes.byref(made), flags) == 0
    return made


def wait(on: Any = None) -> int:
    return int(driver.cudart().cudaStreamSynchronize(on))


def uploaded(array: np.ndarray) -> ctypes.c_void_p:
    at = malloc(array.nbytes)
    assert copy(at, array, array.nbytes, TO_GPU) == wait() == 0
    return at


def downloaded(at: ctypes.c_void_p, count: int) -> np.ndarray:
    array = np.zeros(count, np.float32)
    assert copy(array, at, array.nbytes, TO_HOST) == wait() == 0
    return array


def said() -> str:
    """The reason of the last refusal."""
    text = ctypes.c_char_p()
    ctypes.CDLL("libcuda.so.1").cuGetErrorString(1, ctypes.byref(text))
    return (text.value or b"").decode()


def function(image: bytes, name: str) -> ctypes.c_void_p:
    driver.register_kernel(name, SOURCE, image)
    cuda, module, found = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(), ctypes.c_void_p()
    assert cuda.cuModuleLoadData(ctypes.byref(module), image) == 0
    assert cuda.cuModuleGetFunction(ctypes.byref(found), module, name.encode()) == 0
    return found


def launch(
    kernel: ctypes.c_void_p, grid: tuple[int, ...], block: tuple[int, ...], shared: int, on: Any, *values: Any
) -> int:
    """cuLaunchKernelEx: `values` are of ctypes."""
    config = struct.pack("<7I4xQQI4x", *grid, *[1] * (3 - len(grid)), *block, *[1] * (3 - len(block)), shared,
                         getattr(on, "value", on) or 0, 0, 0)  # fmt: skip
    arguments = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
    return int(ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx(config, kernel, arguments, None))


@contextmanager
def faults(code: int, text: str) -> Iterator[None]:
    """What is done inside, and waiting for it, ends in a fault that names its reason; the GPU then goes on."""
    yield
    assert wait() == code
    assert text in driver.fault(), driver.fault()
    assert driver.cudart().cudaDeviceSynchronize() == code  # and so do all later calls
    driver.forgive()


# Memory.


def allocations() -> None:
    at = malloc(64)
    assert at.value is not None and at.value % 256 == 0
    assert np.isnan(downloaded(at, 16)).all()  # poisoned
    host = np.arange(17, dtype=np.float32)
    assert copy(at, host, 68, TO_GPU) == INVALID_VALUE and "68 bytes, at byte 0 of an allocation of 64" in said()
    assert copy(host, ctypes.c_void_p(at.value + 32), 36, TO_HOST) == INVALID_VALUE
    assert copy(at, host, 64, TO_HOST) == INVALID_DIRECTION
    cudart = driver.cudart()
    assert cudart.cudaFree(at) == 0
    assert cudart.cudaFree(at) == INVALID_VALUE and "which was freed" in said()
    assert copy(at, host, 4, TO_GPU) == INVALID_VALUE
    assert cudart.cudaFree(address(host)) == INVALID_VALUE
    assert cudart.cudaMalloc(ctypes.byref(at), ctypes.c_size_t(81 << 30)) == OUT_OF_MEMORY
    assert cudart.cudaGetLastError() == OUT_OF_MEMORY and cudart.cudaGetLastError() == 0


def test_memory_is_poisoned_and_bounded(gpu: Call) -> None:
    gpu(allocations)


def touching(read: bool) -> None:
    driver.install()
    at = malloc(64)
    ctypes.memmove(ctypes.create_string_buffer(8), at, 4) if read else ctypes.memset(at, 0, 4)


@pytest.mark.parametrize("read", [True, False])
def test_the_host_cannot_touch_it(read: bool) -> None:
    code = f"from tests.cuda_emulator.test_driver import touching; touching({read})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == -11
    assert "the host touches memory of the GPU: byte 0 of an allocation of 64" in done.stderr


# Copies.


def late_copies() -> None:
    own = stream()
    source, target = pinned(4), pinned(4)
    source[:], target[:] = 7, 1
    at = malloc(16)
    assert copy(at, source, 16, TO_GPU, own) == 0 and copy(target, at, 16, TO_HOST, own) == 0
    assert np.isnan(target).all()  # nobody has waited
    assert driver.cudart().cudaStreamQuery(own) == NOT_READY
    assert wait(own) == 0 and (target == 7).all() and driver.cudart().cudaStreamQuery(own) == 0

    assert copy(at, source, 16, TO_GPU, own) == 0
    source[2] = 8
    with faults(LAUNCH_FAILURE, "the host wrote to the source of a copy of 16 bytes under way"):
        pass
    assert copy(target, at, 16, TO_HOST, own) == 0
    assert driver.cudart().cudaFreeHost(address(target)) == 0
    with faults(ILLEGAL_ADDRESS, "which is the host's, no longer pinned"):
        pass

    room = np.zeros(1 << 20, np.float32)
    large = malloc(room.nbytes)
    assert copy(large, room, room.nbytes, TO_GPU, own) == 0
    del room  # given back to the system
    with faults(ILLEGAL_ADDRESS, "the host freed the source of a copy under way"):
        pass


def test_copies_happen_when_somebody_waits(gpu: Call) -> None:
    gpu(late_copies)


# Streams and events.


def stream_orders(image: bytes) -> None:
    scale = function(image, "scale")
    for flags, ordered in ((0, True), (1, False)):  # cudaStreamNonBlocking
        own, host = stream(flags), pinned(64)
        at = uploaded(np.ones(64, np.float32))
        assert launch(scale, (1,), (64,), 0, own, at, ctypes.c_float(3), ctypes.c_int(64)) == 0
        assert copy(host, at, 256, TO_HOST) == wait() == 0
        assert (host == (3 if ordered else 1)).all()  # the default stream waits for blocking ones alone
        assert wait(own) == 0

    first, second, event, host = stream(1), stream(1), ctypes.c_void_p(), pinned(64)
    cudart = driver.cudart()
    assert cudart.cudaEventCreate(ctypes.byref(event)) == 0
    at = uploaded(np.ones(64, np.float32))
    assert launch(scale, (1,), (64,), 0, first, at, ctypes.c_float(5), ctypes.c_int(64)) == 0
    assert cudart.cudaEventRecord(event, first) == 0
    assert cudart.cudaEventQuery(event) == NOT_READY
    assert cudart.cudaStreamWaitEvent(second, event, 0) == 0
    assert copy(host, at, 256, TO_HOST, second) == wait(second) == 0
    assert (host == 5).all() and cudart.cudaEventQuery(event) == 0

    end, elapsed = ctypes.c_void_p(), ctypes.c_float()
    assert cudart.cudaEventCreate(ctypes.byref(end)) == cudart.cudaEventRecord(end, first) == 0
    assert cudart.cudaEventElapsedTime(ctypes.byref(elapsed), event, end) == NOT_READY
    assert cudart.cudaEventSynchronize(end) == 0
    assert cudart.cudaEventElapsedTime(ctypes.byref(elapsed), event, end) == 0 and elapsed.value >= 0
    assert cudart.cudaStreamDestroy(first) == 0 and wait(first) == INVALID_HANDLE


@needs_compiler
def test_streams_are_ordered_by_what_orders_them(gpu: Call, image: bytes) -> None:
    gpu(stream_orders, image)


# Capture and graphs.


def graphs(image: bytes) -> None:
    cudart, own, graph, ready = driver.cudart(), stream(), ctypes.c_void_p(), ctypes.c_void_p()
    scale, at = function(image, "scale"), uploaded(np.ones(64, np.float32))
    source, target = pinned(64), pinned(64)
    source[:] = 1
    ran = driver.launches("scale")
    assert cudart.cudaStreamBeginCapture(own, GLOBAL) == 0
    assert copy(at, source, 256, TO_GPU, own) == 0
    assert launch(scale, (1,), (64,), 0, own, at, ctypes.c_float(2), ctypes.c_int(64)) == 0
    assert copy(target, at, 256, TO_HOST, own) == 0
    assert cudart.cudaStreamEndCapture(own, ctypes.byref(graph)) == 0
    assert cudart.cudaGraphInstantiate(ctypes.byref(ready), graph, ctypes.c_ulonglong(0)) == 0
    assert cudart.cudaGraphDestroy(graph) == 0
    assert wait(own) == 0 and driver.launches("scale") == ran  # recorded, not run
    for value in (1, 4):
        source[:] = value
        assert cudart.cudaGraphLaunch(ready, own) == wait(own) == 0
        assert (target == 2 * value).all()
    assert driver.launches("scale") == ran + 2
    assert cudart.cudaFree(at) == 0
    assert cudart.cudaGraphLaunch(ready, own) == 0
    with faults(ILLEGAL_ADDRESS, "byte 0 of an allocation of 256, which was freed"):
        pass
    assert cudart.cudaGraphExecDestroy(ready) == 0
    assert cudart.cudaGraphLaunch(ready, own) == INVALID_HANDLE


@needs_compiler
def test_a_graph_does_again_what_was_captured(gpu: Call, image: bytes) -> None:
    gpu(graphs, image)


def illegal_captures() -> None:
    cudart, own, graph, at = driver.cudart(), stream(), ctypes.c_void_p(), malloc(64)
    host, free = np.ones(16, np.float32), ctypes.c_void_p()

    def broken(call: Callable[[], int], code: int, mode: int = GLOBAL) -> None:
        assert cudart.cudaStreamBeginCapture(own, mode) == 0
        assert call() == code
        assert cudart.cudaStreamEndCapture(own, ctypes.byref(graph)) == CAPTURE_INVALIDATED and not graph.value

    def malloc_again() -> int:
        return int(cudart.cudaMalloc(ctypes.byref(free), ctypes.c_size_t(4)))

    assert cudart.cudaStreamBeginCapture(None, GLOBAL) == CAPTURE_UNSUPPORTED
    broken(lambda: wait(own), CAPTURE_UNSUPPORTED)
    broken(lambda: wait(own), CAPTURE_UNSUPPORTED, RELAXED)
    broken(malloc_again, CAPTURE_UNSUPPORTED)
    broken(lambda: copy(at, host, 64, TO_GPU, None), CAPTURE_IMPLICIT)
    broken(lambda: copy(at, host, 64, TO_GPU, own), CAPTURE_UNSUPPORTED)  # pageable
    broken(cudart.cudaDeviceSynchronize, CAPTURE_UNSUPPORTED, RELAXED)
    assert cudart.cudaStreamBeginCapture(own, RELAXED) == malloc_again() == cudart.cudaFree(free) == 0
    assert cudart.cudaStreamEndCapture(own, ctypes.byref(graph)) == 0
    assert cudart.cudaStreamEndCapture(own, ctypes.byref(graph)) != 0


def test_what_a_capture_does_not_allow_ends_it(gpu: Call) -> None:
    gpu(illegal_captures)


# Modules and launches.


def load_module(image: bytes) -> int:
    return int(ctypes.CDLL("libcuda.so.1").cuModuleLoadData(ctypes.byref(ctypes.c_void_p()), image))


def modules(image: bytes, later: bytes) -> None:
    cuda, module, found = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(), ctypes.c_void_p()
    assert load_module(b"no fatbin".ljust(64, b"\0")) == INVALID_IMAGE
    assert load_module(later) == NO_BINARY and "code for sm_90, PTX of compute_90, and none that sm_80 runs" in said()
    damaged = image.replace(b"\x7fELF", b"\x7fELV")
    assert load_module(damaged) == INVALID_IMAGE
    other = image[:-1] + bytes([image[-1] ^ 1])  # the same kernels, but not what anybody made known
    assert cuda.cuModuleLoadData(ctypes.byref(module), other) == 0
    assert cuda.cuModuleGetFunction(ctypes.byref(found), module, b"missing") == NOT_FOUND
    assert cuda.cuModuleGetFunction(ctypes.byref(found), module, b"scale") == INVALID_SOURCE
    assert "kernel scale cannot be emulated: no CUDA C is known" in said()
    kernel = function(image, "scale")
    assert cuda.cuModuleLoadData(ctypes.byref(module), image) == 0
    assert cuda.cuModuleGetFunction(ctypes.byref(found), module, b"scale") == 0
    assert cuda.cuModuleUnload(module) == 0
    at = malloc(256)
    assert launch(found, (1,), (64,), 0, None, at, ctypes.c_float(1), ctypes.c_int(0)) == INVALID_HANDLE
    assert launch(kernel, (1,), (64,), 0, None, at, ctypes.c_float(1), ctypes.c_int(0)) == wait() == 0


@needs_compiler
def test_modules_are_what_a_driver_takes(gpu: Call, image: bytes) -> None:
    binary = toolchain.find_toolchain().compile(SOURCE, "sm_90")
    gpu(modules, image, fatbin(90, binary.cubin, binary.ptx))


def launches(image: bytes) -> None:
    scale, turn, at = function(image, "scale"), function(image, "turn"), uploaded(np.arange(64, dtype=np.float32))
    sizes = at, ctypes.c_float(1), ctypes.c_int(64)
    assert launch(scale, (0,), (64,), 0, None, *sizes) == INVALID_VALUE and "a grid of (0, 1, 1) blocks" in said()
    assert launch(scale, (1, 65536), (64,), 0, None, *sizes) == INVALID_VALUE
    assert launch(scale, (1,), (1, 1, 65), 0, None, *sizes) == INVALID_VALUE
    assert launch(scale, (1,), (96,), 0, None, *sizes) == INVALID_VALUE and "compiled for 64" in said()
    static = 256
    assert launch(turn, (1,), (64,), 48 << 10, None, at) == INVALID_VALUE
    assert f"{48 << 10} bytes of dynamic shared memory, where {(48 << 10) - static} were asked for" in said()
    limit = ctypes.CDLL("libcuda.so.1").cuFuncSetAttribute
    assert limit(turn, 8, (163 << 10) - static + 1) == INVALID_VALUE
    assert limit(turn, 8, (163 << 10) - static) == 0
    assert launch(turn, (1,), (64,), 100 << 10, None, at) == wait() == 0
    np.testing.assert_array_equal(downloaded(at, 64), np.arange(64)[::-1])


@needs_compiler
def test_launches_are_what_hardware_takes(gpu: Call, image: bytes) -> None:
    gpu(launches, image)


def wrong_accesses(image: bytes) -> None:
    scale, cudart = function(image, "scale"), driver.cudart()

    def run(x: ctypes.c_void_p, n: int) -> None:
        assert launch(scale, (2,), (64,), 0, None, x, ctypes.c_float(1), ctypes.c_int(n)) == 0

    at, freed, host = malloc(256), malloc(256), np.zeros(64, np.float32)
    with faults(ILLEGAL_ADDRESS, "reads byte 256 of an allocation of 256 (line 3)"):
        run(at, 65)
    assert cudart.cudaFree(freed) == 0
    with faults(ILLEGAL_ADDRESS, "of an allocation of 256, which was freed"):
        run(freed, 64)
    with faults(ILLEGAL_ADDRESS, "which is the host's (line 3)"):
        run(address(host), 64)
    with faults(ILLEGAL_ADDRESS, "which is the host's, pinned"):
        run(address(pinned(64)), 64)
    run(at, 65)
    try:
        with driver.judged():
            pass
    except EmulationError as error:
        assert "scale, block (1, 0, 0): thread (0, 0, 0) reads byte 256" in str(error)
    else:
        raise AssertionError("not judged")
    assert cudart.cudaFree(at) == 0  # even then: destructors must not fail
    driver.forgive()


@needs_compiler
def test_every_access_is_judged(gpu: Call, image: bytes) -> None:
    gpu(wrong_accesses, image)


def translated(image: bytes) -> None:
    """sm_80's machine code does not run on sm_90, whose driver translates the PTX beside it."""
    scale = function(image, "scale")
    at = uploaded(np.ones(64, np.float32))
    assert launch(scale, (1,), (64,), 0, None, at, ctypes.c_float(2), ctypes.c_int(64)) == wait() == 0
    assert (downloaded(at, 64) == 2).all()
    (start,) = (i for i in range(len(image)) if image.startswith(b".version", i))
    alone = image[:start] + b"#" + image[start + 1 :]
    assert load_module(alone) == 0
    cubin_only = image[:8] + struct.pack("<Q", 64 + struct.unpack_from("<Q", image, 24)[0]) + image[16:]
    assert load_module(cubin_only) == NO_BINARY


@needs_compiler
def test_later_gpus_translate_ptx(image: bytes) -> None:
    with emulated((9, 0)) as gpu:
        gpu(translated, image)


# What it is made of.


@needs_compiler
def test_registers_are_read_from_the_machine_code(gpu: Call, image: bytes) -> None:
    source = SOURCE.partition('extern "C" __global__ void turn')[0]
    binary = toolchain.find_toolchain().compile(source, "sm_80")
    registers = resources(binary).registers
    assert gpu(known_registers, fatbin(80, binary.cubin, binary.ptx)) == registers > 0


def known_registers(image: bytes) -> int:
    return int(ctypes.CDLL("libcuda.so.1").emu_driver_registers(function(image, "scale")))


def test_layouts_are_those_of_nvidias_headers(tmp_path: Path) -> None:
    import importlib.util

    nvidia = importlib.util.find_spec("nvidia")
    folders = nvidia.submodule_search_locations if nvidia else None
    headers = [header.parent for folder in folders or [] for header in Path(folder).glob("cu*/include/cuda.h")]
    if not headers:
        pytest.skip("NVIDIA's headers are not installed: llmc[cuda]")
    same = {
        "uuid": "uuid", "luidDeviceNodeMask": "luid_mask", "totalGlobalMem": "memory", "warpSize": "warp",
        "sharedMemPerBlock": "shared_per_block", "regsPerBlock": "registers_per_block", "memPitch": "pitch",
        "maxThreadsPerBlock": "threads_per_block", "maxThreadsDim": "block_size", "maxGridSize": "grid_size",
        "totalConstMem": "constant_memory", "major": "major", "minor": "minor",
        "multiProcessorCount": "multiprocessors", "canMapHostMemory": "can_map_host_memory",
        "concurrentKernels": "concurrent_kernels", "asyncEngineCount": "copy_engines",
        "unifiedAddressing": "unified_addressing", "l2CacheSize": "l2_bytes",
        "maxThreadsPerMultiProcessor": "threads_per_multiprocessor",
        "sharedMemPerMultiprocessor": "shared_per_multiprocessor",
        "regsPerMultiprocessor": "registers_per_multiprocessor", "sharedMemPerBlockOptin": "shared_opt_in",
        "maxBlocksPerMultiProcessor": "blocks_per_multiprocessor",
    }  # fmt: skip
    config = {"gridDimX": "grid", "blockDimX": "block", "sharedMemBytes": "shared_bytes", "hStream": "stream",
              "attrs": "attributes", "numAttrs": "attribute_count"}  # fmt: skip
    pairs = (("cudaDeviceProp", "DeviceProp", same), ("CUlaunchConfig", "LaunchConfig", config))
    lines = ["#include <cuda.h>", "#include <cuda_runtime_api.h>", '#include "driver_abi.h"']
    for theirs, ours, fields in pairs:
        lines.append(f"static_assert(sizeof({theirs}) == sizeof(emu::{ours}));")
        lines += [f"static_assert(offsetof({theirs}, {a}) == offsetof(emu::{ours}, {b}));" for a, b in fields.items()]
    (tmp_path / "layouts.cpp").write_text("\n".join(lines))
    runtime = Path(driver.__file__).parent / "runtime"
    command = ["g++", "-std=c++17", "-fsyntax-only", "-I", str(runtime), "-I", str(headers[0])]
    done = subprocess.run([*command, str(tmp_path / "layouts.cpp")], capture_output=True, text=True)
    assert not done.returncode, done.stderr


def real_runtime_first() -> str:
    import importlib.util

    nvidia = importlib.util.find_spec("nvidia")
    (folder,) = nvidia.submodule_search_locations if nvidia else [""]  # type: ignore[misc]
    ctypes.CDLL(str(next(Path(folder).glob("cu*/lib/libcudart.so.*"))))
    try:
        driver.install()
    except EmulationError as error:
        return str(error)
    return ""


@needs_compiler
def test_a_real_library_that_is_loaded_stays() -> None:
    code = "from tests.cuda_emulator.test_driver import real_runtime_first; print(real_runtime_first())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert "libcudart.so.13 is loaded already" in done.stdout
