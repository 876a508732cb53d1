"""The build stage's second half for GPUs: host code becomes a library, kernels become files beside it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmc.gpu.binary import occupancy
from llmc.gpu.kernels import DeviceKernel, compile_kernels
from llmc.gpu.passes import lower
from llmc.package.layout import DEVICE, DEVICE_KERNELS
from llmc.targets.cuda import CudaTarget
from llmc.tvm_shim import IRModule, TvmTarget, vm_codegen, vm_link


def build(module: IRModule, target: CudaTarget, library: Path) -> None:
    """Compile a module of byte-code functions and scheduled PrimFuncs: `library` (.so) runs on the host, and beside it
    the folder DEVICE holds, of every kernel, its CUDA C, its module for the runtime, and what is known of it.

    Raises OptionError where NVIDIA's tools are not installed, KernelError where they refuse a kernel.
    """
    device = TvmTarget(target.tvm())
    builder, functions = vm_codegen(module)
    host, kernels = lower(functions, device)
    compiled = compile_kernels(kernels, target)
    vm_link(builder, host, device).export_library(str(library))
    folder = library.parent / DEVICE
    folder.mkdir()
    for kernel in compiled:
        (folder / f"{kernel.name}.cu").write_text(kernel.source, encoding="utf-8")
        (folder / f"{kernel.name}.bin").write_bytes(kernel.module)
    facts = {kernel.name: _facts(kernel, target) for kernel in compiled}
    (library.parent / DEVICE_KERNELS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _facts(kernel: DeviceKernel, target: CudaTarget) -> dict[str, Any]:
    launch, found = kernel.launch, kernel.resources
    dynamic = int(launch.shared) if launch.shared.isdecimal() else 0
    shared = found.shared_bytes + dynamic
    return {
        "arch": target.mcpu,
        "registers": found.registers,
        "spill_bytes": found.spill_bytes,
        "shared_bytes": shared,
        "hmma": found.hmma,
        "imma": found.imma,
        "occupancy": occupancy(target, launch.threads, found.registers, shared) if launch.threads else None,
        "predicted_us": None,
        "accesses": found.accesses,
        "launch": asdict(launch),
    }
