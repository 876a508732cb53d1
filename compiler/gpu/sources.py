"""The CUDA C of kernels, with how they are launched: what an emulator needs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from llmc.errors import ArtifactError
from llmc.gpu.launch import Argument, Launch
from llmc.gpu.passes import lower
from llmc.package.layout import DEVICE, DEVICE_KERNELS
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
    if DEVICE_KERNELS not in artifact.entries:
        target = artifact.manifest.target.name
        raise ArtifactError(f"was compiled for {target}: it holds no kernels for a GPU", where=str(model))
    facts = json.loads(artifact.read(DEVICE_KERNELS))
    return {
        name: Source(artifact.read(f"{DEVICE}/{name}.cu").decode(), _launch(known["launch"]))
        for name, known in facts.items()
    }


def template_sources(kernel: PrimFunc, target: CudaTarget) -> dict[str, Source]:
    """The kernels of one function that a template built; nothing is compiled."""
    device = TvmTarget(target.tvm())
    name = str(kernel.attrs["global_symbol"])
    _, kernels = lower(IRModule({name: mark_kernel(kernel)}), device)
    return {name: Source(cuda_source(name, func, device), launch) for name, (func, launch) in kernels.items()}


def _launch(known: dict) -> Launch:
    grid, block = (tuple(known[key]) for key in ("grid", "block"))
    arguments = tuple(Argument(**argument) for argument in known["arguments"])
    return Launch(arguments, grid, block, known["shared"], tuple(known["tags"]))
