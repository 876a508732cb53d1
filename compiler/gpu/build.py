"""The build stage's second half for GPUs: host code becomes a library, kernels become files beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmc.errors import KernelError
from llmc.gpu.binary import occupancy
from llmc.gpu.kernels import DeviceKernel, compile_kernels
from llmc.gpu.passes import lower
from llmc.gpu.predict import LaunchPrediction, predict_call
from llmc.gpu.typical import FEW, Arguments, Point
from llmc.package.layout import DEVICE, DEVICE_KERNELS
from llmc.targets.cuda import CudaTarget
from llmc.tir_pipeline import KERNEL
from llmc.tvm_shim import IRModule, TvmTarget, vm_codegen, vm_link


def build(
    module: IRModule, target: CudaTarget, library: Path, calls: Mapping[str, Mapping[Point, Sequence[Arguments]]]
) -> None:
    """Compile a module of byte-code functions and scheduled PrimFuncs: `library` (.so) runs on the host, and beside it
    the folder DEVICE holds, of every kernel, its CUDA C, its module for the runtime, and what is known of it.

    `calls` are those of `typical_calls`, at which kernels' times are predicted.

    Raises OptionError where NVIDIA's tools are not installed, KernelError where they refuse a kernel, or a template's
    fails a gate: it is not shipped.
    """
    device = TvmTarget(target.tvm())
    builder, functions = vm_codegen(module)
    host, kernels = lower(functions, device)
    compiled = compile_kernels(kernels, target)
    _demand_no_spills(compiled, {n.name_hint for n, f in functions.functions.items() if f.attrs.get(KERNEL)}, target)
    vm_link(builder, host, device).export_library(str(library))
    folder = library.parent / DEVICE
    folder.mkdir()
    for kernel in compiled:
        (folder / f"{kernel.name}.cu").write_text(kernel.source, encoding="utf-8")
        (folder / f"{kernel.name}.bin").write_bytes(kernel.module)
    predictions = _predictions(host, {kernel.name: kernel for kernel in compiled}, calls, target)
    facts = {kernel.name: _facts(kernel, target, predictions.get(kernel.name, {})) for kernel in compiled}
    (library.parent / DEVICE_KERNELS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _demand_no_spills(kernels: Sequence[DeviceKernel], templates: Collection[str], target: CudaTarget) -> None:
    for kernel in kernels:
        spilled = kernel.resources.spill_bytes
        if spilled and re.sub(r"_kernel(_\d+)?$", "", kernel.name) in templates:
            hint = "let the tuner find a configuration that needs fewer (--tune quick), or choose another --quantize"
            what = f"{spilled} bytes of a thread do not fit into its registers: a kernel that spills is not shipped"
            raise KernelError(what, where=f"{kernel.name} for {target.name}", hint=hint)


def _predictions(
    host: IRModule,
    kernels: Mapping[str, DeviceKernel],
    calls: Mapping[str, Mapping[Point, Sequence[Arguments]]],
    target: CudaTarget,
) -> dict[str, dict[Point, LaunchPrediction]]:
    """Of every kernel, at the typical calls that launch it: of several calls, the longest launch."""
    found: dict[str, dict[Point, LaunchPrediction]] = {}
    for name, func in host.functions.items():
        points = calls.get(name.name_hint, {})
        each = [(point, call) for point, many in points.items() for call in many]
        for point, arguments in each:
            wanted = set(kernels) if point is not FEW else set(kernels) - set(found)
            try:
                call = predict_call(func, kernels, arguments, point.keys, target, wanted)
            except KernelError:  # what is launched depends on more than sizes, or the kernel is beyond `demand`
                continue
            for launch in call.launches:
                at = found.setdefault(launch.kernel, {})
                at[point] = max(launch, at.get(point, launch), key=lambda launch: launch.seconds)
    return found


def _facts(kernel: DeviceKernel, target: CudaTarget, predictions: Mapping[Point, LaunchPrediction]) -> dict[str, Any]:
    launch, found = kernel.launch, kernel.resources
    dynamic = int(launch.shared) if launch.shared.isdecimal() else 0
    shared = found.shared_bytes + dynamic
    point, first = next(iter(predictions.items()), (None, None))
    worst, mean = (round(ways, 3) for ways in first.demand.ways) if first else (None, None)
    return {
        "arch": target.mcpu,
        "registers": found.registers,
        "spill_bytes": found.spill_bytes,
        "shared_bytes": shared,
        "hmma": found.hmma,
        "imma": found.imma,
        "occupancy": occupancy(target, launch.threads, found.registers, shared) if launch.threads else None,
        "predicted_us": round(first.seconds * 1e6, 3) if first else None,
        "predicted_at": point.name if point else "not predicted: never launched by a call whose sizes are known",
        "predicted_limit": first.limit if first else None,
        "worst_conflict": worst,
        "mean_conflict": mean,
        "predictions": {at.name: round(each.seconds * 1e6, 3) for at, each in predictions.items()},
        "accesses": found.accesses,
        "launch": asdict(launch),
    }
