"""The CUDA C of kernels, with how they are launched: what an emulator needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmc.gpu.launch import Argument, Launch
from llmc.gpu.passes import lower
from llmc.package.device import device_kernels
from llmc.package.layout import DEVICE
from llmc.package.reader import open_artifact
from llmc.targets.cuda import CudaTarget
from llmc.tir_pipeline import mark_kernel
from llmc.tvm_shim import IRModule, PrimFunc, TvmTarget, cuda_source


@dataclass(frozen=True)
class Source:
    """One kernel: CUDA C that holds it alone, and its launch."""

    source: str
    launch: Launch


def cuda_sources(model: str | Path) -> dict[str, Source]:
    """Every kernel of an artifact, by name. Raises ArtifactError if it is damaged, or was not compiled for a GPU."""
    artifact = open_artifact(model)
    return {
        name: Source(artifact.read(f"{DEVICE}/{name}.cu").decode(), _launch(known["launch"]))
        for name, known in device_kernels(artifact).items()
    }


def template_sources(kernel: PrimFunc, target: CudaTarget) -> dict[str, Source]:
    """The kernels of one function that a template built; nothing is compiled."""
    device = TvmTarget(target.tvm())
    name = str(kernel.attrs["global_symbol"])
    _, kernels = lower(IRModule({name: mark_kernel(kernel)}), device)
    return {name: Source(cuda_source(name, func, device), launch) for name, (func, launch) in kernels.items()}


def _launch(known: Mapping[str, Any]) -> Launch:
    arguments = tuple(Argument(**argument) for argument in known["arguments"])
    return Launch(arguments, tuple(known["grid"]), tuple(known["block"]), known["shared"], tuple(known["tags"]))
