"""The entries of an artifact for a GPU, read: what is known of each kernel."""

from __future__ import annotations

import json
from typing import Any

from llmc.errors import ArtifactError
from llmc.package.layout import DEVICE, DEVICE_KERNELS
from llmc.package.reader import Artifact

KERNEL_FACTS = (
    *("arch", "registers", "spill_bytes", "shared_bytes", "hmma", "imma", "occupancy"),
    *("predicted_us", "predicted_at", "worst_conflict", "mean_conflict"),
)


def device_kernels(artifact: Artifact) -> dict[str, dict[str, Any]]:
    """What is known of every kernel, by name. Raises ArtifactError for an artifact that was made for a CPU."""
    where = str(artifact.path)
    if DEVICE_KERNELS not in artifact.entries:
        what = f"was compiled for {artifact.manifest.target.name}: it holds no kernels for a GPU"
        raise ArtifactError(what, where=where, hint="compile the model with --target cuda")
    facts = json.loads(artifact.read(DEVICE_KERNELS))
    files = [f"{DEVICE}/{name}.{kind}" for name in facts for kind in ("cu", "bin")]
    if missing := [name for name in files if name not in artifact.entries]:
        raise ArtifactError(f"{DEVICE_KERNELS} names {missing[0]}, which it does not hold", where=where)
    return dict(facts)
