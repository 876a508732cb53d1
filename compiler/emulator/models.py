"""A whole artifact for a GPU on the CPU: its own host code runs, and calls kernels that are emulated."""

from __future__ import annotations

import ctypes
import re
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

from llmc.emulator.build import build
from llmc.emulator.translate import Entry, translate
from llmc.gpu.sources import Source, cuda_sources
from llmc.package.reader import Artifact
from llmc.runtime.memory import HOST
from llmc.runtime.load import load as load_artifact
from llmc.runtime.model import Model
from llmc.tvm_shim import tvm_ffi

# TVM's convention: values of 16 bytes, a type and a union. Launches come on the thread that calls the model.
_HEAD = """
struct EmuValue { int32_t type; uint32_t padding; union { int64_t integer; double number; void* pointer; }; };
extern "C" void TVMFFIErrorSetRaisedFromCStr(const char*, const char*);
extern "C" int __tvm_ffi___tvm_set_device(void*, const EmuValue*, int32_t, EmuValue*) { return 0; }
extern "C" void* emu_AllocWorkspace(int, int, uint64_t bytes, int, int) {
  return aligned_alloc(256, (bytes + 255) / 256 * 256);
}
extern "C" int emu_FreeWorkspace(int, int, void* memory) { free(memory); return 0; }
"""
_CPU = 1  # DLPack's device type
_AXES = [f"{what}Idx.{axis}" for what in ("block", "thread") for axis in "xyz"]


def load(path: Path, seed: int = 0) -> Model:
    """`llmc.load` of an artifact for a GPU, with its kernels emulated and its arrays in the host's memory.

    Raises TranslationError, BuildError for a kernel that cannot be emulated; calls raise InputError with what the
    emulator finds. Kernels do not know how large tensors are: accesses outside of them are not found here.
    """
    kernels = build_kernels(cuda_sources(path), seed)
    emulated = tvm_ffi.load_module(str(kernels))

    def import_emulated(library: Any, artifact: Artifact) -> None:
        host = next(module for module in library.imports if module.kind == "library")
        host.import_module(emulated)
        _emulate_workspaces(kernels)

    with ExitStack() as stack:
        for module in ("load", "model"):
            stack.enter_context(patch(f"llmc.runtime.{module}.memory_of", lambda artifact: HOST))
        stack.enter_context(patch("llmc.runtime.load.check_gpu", lambda artifact: None))
        stack.enter_context(patch("llmc.runtime.library.import_kernels", import_emulated))
        stack.enter_context(patch("llmc.runtime.library.CUDA", _CPU))
        return load_artifact(path)


def _emulate_workspaces(kernels: Path) -> None:
    """Host functions ask the GPU's allocator for what goes from one kernel to the next, through pointers in their
    library. The library has just been loaded: it is the one whose file still exists."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    host = next(path for path in re.findall(r"/\S*/llmc-\S*/lib\.so", maps) if Path(path).exists())
    loaded, emulated = ctypes.CDLL(host), ctypes.CDLL(str(kernels))
    for name in ("AllocWorkspace", "FreeWorkspace"):
        with suppress(ValueError):  # it needs none
            place = ctypes.c_void_p.in_dll(loaded, f"__TVMBackend{name}")
            place.value = ctypes.cast(emulated[f"emu_{name}"], ctypes.c_void_p).value


def build_kernels(sources: dict[str, Source], seed: int) -> Path:
    """A library with a function __tvm_ffi_NAME for every kernel, each in a namespace of its own."""
    parts = [_HEAD]
    for name, source in sources.items():
        code, entries = translate(source.source)
        parts += [f"namespace kernel_{name} {{\n{code}\n}}", _function(entries[name], source, seed)]
    return build("\n".join(parts))


def _function(entry: Entry, source: Source, seed: int) -> str:
    cells, name = [], entry.name
    for i, p in enumerate(entry.parameters):
        field = "pointer" if p.pointer else "number" if p.type in ("float", "double", "half") else "integer"
        type_ = f"{p.type}*" if p.pointer else p.type
        cells.append(f"{type_} c{i} = ({type_})v[{i}].{field};")
    sizes = dict.fromkeys(_AXES, "1")
    shared = "0"
    for i, tag in enumerate(source.launch.tags, len(entry.parameters)):
        if tag in sizes:
            sizes[tag] = f"unsigned(v[{i}].integer)"
        else:
            shared = f"uint64_t(v[{i}].integer)"
    addresses = ", ".join(f"&c{i}" for i in range(len(entry.parameters)))
    grid, block = (", ".join(sizes[axis] for axis in _AXES[n : n + 3]) for n in (0, 3))
    return f"""
extern "C" __attribute__((no_sanitize("thread", "undefined")))
int __tvm_ffi_{name}(void*, const EmuValue* v, int32_t, EmuValue*) {{
  {" ".join(cells)}
  void* arguments[] = {{{addresses}}};
  EmuLaunch launch{{kernel_{name}::emu_entry_{name}, arguments, {{{grid}}}, {{{block}}}, {shared}, {seed},
                   {entry.max_threads}, nullptr, 0, "{name}"}};
  static char error[4096];
  if (!emu_launch(&launch, error, sizeof error)) return 0;
  TVMFFIErrorSetRaisedFromCStr("RuntimeError", error);
  return -1;
}}"""
