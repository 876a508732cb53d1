"""An NVIDIA GPU that is not there: libraries of the driver's names, under which the real CUDA runtime of TVM works.

    driver.install((8, 0))                # once in a process, before anything looks for a GPU
    model = driver.load("model.llmc")     # llmc.load, and its kernels made known to the driver
    with driver.judged():                 # what the emulator finds, as EmulationError
        model(input_ids=ids)

The whole way from llmc.load to the launch of a kernel is the one that a machine with a GPU takes; kernels are run by
the emulator. What is judged, and where the driver is stricter or weaker than a real one, stands in README.md.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmc.emulator.build import CUDA, CUDART, BuildError, build
from llmc.emulator.build import driver as build_driver
from llmc.emulator.emulator import SCALARS, EmulationError, with_line
from llmc.emulator.translate import TranslationError, translate
from llmc.package.device import device_kernels
from llmc.package.layout import DEVICE
from llmc.package.reader import open_artifact
from llmc.runtime.load import load as load_artifact
from llmc.runtime.model import Model
from llmc.targets.cuda import newest

__all__ = ["cudart", "fault", "forgive", "install", "judged", "launches", "load", "register", "register_kernel"]

MEMORY = 80 << 30  # of the GPU, in bytes
_FATBIN = bytes.fromhex("50ed55ba01001000")  # how NVIDIA's container begins
_MOST_PARAMETERS = 64


class _Resolved(ctypes.Structure):
    _fields_ = [
        ("entry", ctypes.c_void_p),
        ("max_threads", ctypes.c_int),
        ("count", ctypes.c_int),
        ("bytes", ctypes.c_int * _MOST_PARAMETERS),
    ]


_RESOLVER = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_uint64, ctypes.c_char_p, ctypes.POINTER(_Resolved), ctypes.c_void_p, ctypes.c_size_t
)


class NotEmulated(EmulationError):
    """A kernel holds what the emulator does not know, or nobody made it known."""


_driver: ctypes.CDLL | None = None
_sources: dict[tuple[int, str], str] = {}  # CUDA C by the container's hash and the kernel's name
_libraries: list[ctypes.CDLL] = []  # of kernels that have run: never unloaded
_unknown: set[str] = set()  # kernels that could not be emulated


def install(capability: tuple[int, int] = (8, 0), seed: int = 0, memory: int = MEMORY) -> None:
    """Be the GPU of this process, of a compute capability and with the limits of the target of that name.

    `seed` decides the orders of threads and blocks, `memory` is in bytes. Raises BuildError where g++ cannot make the
    libraries, EmulationError where a real driver, or TVM's CUDA runtime, is loaded already.
    """
    global _driver
    if _driver is None:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
        if found := re.search(r"\S*/(libcuda\.so|libcudart\.so|libtvm_runtime_cuda\.so)\S*", maps):
            raise EmulationError(f"{found[0]} is loaded already: the emulated driver must come first")
        folder = build_driver()
        _driver = ctypes.CDLL(str(folder / CUDA), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(folder / CUDART), ctypes.RTLD_GLOBAL)
        _driver.emu_driver_message.restype = ctypes.c_char_p
        _driver.emu_driver_key.restype = _driver.emu_driver_launches.restype = ctypes.c_uint64
        _driver.emu_driver_resolver(_resolver)
    gpu = newest(capability)
    _driver.emu_driver_configure(
        *capability,
        gpu.multiprocessors,
        gpu.block_shared_bytes,
        gpu.shared_bytes,
        gpu.l2_bytes,
        ctypes.c_uint64(memory),
        ctypes.c_uint64(seed),
    )


def register(model: str | Path) -> None:
    """Make the kernels of an artifact known: by name and by what the driver is given to load.

    Raises ArtifactError if it is damaged, or was not compiled for a GPU.
    """
    artifact = open_artifact(model)
    for name in device_kernels(artifact):
        register_kernel(name, artifact.read(f"{DEVICE}/{name}.cu").decode(), artifact.read(f"{DEVICE}/{name}.bin"))


def register_kernel(name: str, source: str, module: bytes) -> None:
    """Make one kernel known: its CUDA C, and the module of TVM's kind "cuda" that holds its machine code."""
    image = module[module.index(_FATBIN) :]
    _sources[_loaded().emu_driver_key(image, ctypes.c_size_t(len(image))), name] = source


def load(model: str | Path) -> Model:
    """`llmc.load` of an artifact for a GPU, unchanged, its kernels made known before."""
    register(model)
    return load_artifact(model)


@contextmanager
def judged() -> Iterator[None]:
    """Inside, what kernels and copies do wrong raises EmulationError, in place of the error that a driver makes of it.

    Work that nobody has waited for is done when the block ends.
    """
    _loaded().emu_driver_quiet()
    _unknown.clear()
    try:
        yield
        cudart().cudaDeviceSynchronize()
    except Exception as error:
        if text := fault() or ("cuda" in str(error).lower() and _said()):
            raise (NotEmulated if _unknown else EmulationError)(text) from error
        raise
    if text := fault():
        raise EmulationError(text)


def fault() -> str:
    """What work on the GPU did wrong, since when all calls fail; empty if nothing."""
    return _said() if _loaded().emu_driver_fault() else ""


def _said() -> str:
    """The reason of the fault, or of the last call that was refused."""
    message = str(_loaded().emu_driver_message().decode())
    for library in _libraries:
        message = with_line(message, Path(library._name))
    return message


def forgive() -> None:
    """Go on after a fault, which a real GPU does not."""
    _loaded().emu_driver_forgive()


def launches(kernel: str | None = None) -> int:
    """How many kernels have run, of all names or of one."""
    return int(_loaded().emu_driver_launches(kernel.encode() if kernel else None))


def cudart() -> ctypes.CDLL:
    """The emulated runtime library, for calls that a test makes itself."""
    return ctypes.CDLL(CUDART)


def _loaded() -> ctypes.CDLL:
    if _driver is None:
        raise EmulationError("the emulated driver is not installed: call llmc.emulator.driver.install first")
    return _driver


def _resolve(image: int, name: bytes, out: ctypes._Pointer[_Resolved], error: int, error_bytes: int) -> int:
    """The driver asks for a kernel: compiled for the CPU now, unless it was before."""
    try:
        _fill(out.contents, _sources.get((image, name.decode())), name.decode())
    except (TranslationError, BuildError, EmulationError) as reason:
        _unknown.add(name.decode())
        text = str(reason).encode()[: error_bytes - 1]
        ctypes.memmove(error, text + b"\0", len(text) + 1)
        return 1
    return 0


_resolver = _RESOLVER(_resolve)  # as long as the driver may ask


def _fill(out: _Resolved, source: str | None, name: str) -> None:
    if source is None:
        raise EmulationError("no CUDA C is known for this name and machine code: register its artifact")
    code, kernels = translate(source)
    entry = kernels[name]
    for parameter in entry.parameters:
        if not parameter.pointer and parameter.type not in SCALARS:
            raise EmulationError(f"parameter {parameter.name} is of type {parameter.type}, which is unknown")
    library = ctypes.CDLL(str(build(code)))
    _libraries.append(library)
    out.entry = ctypes.cast(library[f"emu_entry_{name}"], ctypes.c_void_p).value
    out.max_threads, out.count = entry.max_threads, len(entry.parameters)
    for i, parameter in enumerate(entry.parameters):
        out.bytes[i] = 8 if parameter.pointer else ctypes.sizeof(SCALARS[parameter.type])
