"""From a device function to what the artifact keeps of it: its source, its binary, and what is known of both."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from llmc.errors import KernelError
from llmc.gpu.binary import Resources, resources
from llmc.gpu.fatbin import fatbin
from llmc.gpu.image import module_bytes
from llmc.gpu.launch import Launch
from llmc.gpu.toolchain import Toolchain, find_toolchain
from llmc.targets.cuda import CudaTarget, arch_number
from llmc.tvm_shim import PrimFunc, TvmTarget, cuda_source


@dataclass(frozen=True)
class DeviceKernel:
    """One kernel: its device function, CUDA C, how it is launched, what it takes, and `module`, the bytes that TVM's
    runtime loads."""

    name: str
    function: PrimFunc
    source: str
    launch: Launch
    resources: Resources
    module: bytes


def compile_kernels(kernels: Mapping[str, tuple[PrimFunc, Launch]], target: CudaTarget) -> list[DeviceKernel]:
    """Device functions as machine code for `target` and, unless it is `exact`, PTX for later architectures.

    Each is a source of its own: what was compiled before, in any model, comes from the cache. NVIDIA's tools run on all
    cores; they may be called from several threads (NVRTC's documentation, "Thread Safety"). Raises OptionError where
    they are not installed, KernelError where they refuse a kernel or it cannot be launched.
    """
    tools, device = find_toolchain(), TvmTarget(target.tvm())
    sources = {name: cuda_source(name, func, device) for name, (func, _) in kernels.items()}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda name: _compile(name, *kernels[name], sources[name], target, tools), kernels))


def _compile(
    name: str, func: PrimFunc, launch: Launch, source: str, target: CudaTarget, tools: Toolchain
) -> DeviceKernel:
    binary = tools.compile(source, target.mcpu)
    if not binary.cubin.startswith(b"\x7fELF"):
        raise KernelError("the CUDA compiler made no machine code", where=f"{name} for {target.mcpu}")
    found = resources(binary)
    _demand_launchable(name, launch, found, target)
    code = fatbin(arch_number(target), binary.cubin, None if target.exact else binary.ptx)
    return DeviceKernel(name, func, source, launch, found, module_bytes(name, launch, code))


def _demand_launchable(name: str, launch: Launch, found: Resources, target: CudaTarget) -> None:
    """Raises KernelError for what the driver would refuse."""
    threads, dynamic = launch.threads or 1, int(launch.shared) if launch.shared.isdecimal() else 0
    wrong = [
        f"{what} {has}, of which there are {most}"
        for what, has, most in (
            ("threads of a block:", threads, target.block_threads),
            ("registers of a block:", threads * found.registers, target.registers),
            ("bytes of shared memory:", dynamic + found.shared_bytes, target.block_shared_bytes),
        )
        if has > most
    ]
    if wrong:
        hint = "this is a fault of its template, or of its configuration"
        raise KernelError(f"cannot be launched: {'; '.join(wrong)}", where=f"{name} for {target.name}", hint=hint)
