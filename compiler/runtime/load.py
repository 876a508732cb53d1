"""From a file to a model that can be called."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tvm_ffi

from llmc.package.reader import open_artifact
from llmc.runtime.arrays import to_numpy, view
from llmc.runtime.device import check_gpu, check_room, memory_of
from llmc.runtime.library import check_cpu, load_library
from llmc.runtime.model import Model


def load(path: str | Path, threads: int | None = None) -> Model:
    """Verify the artifact `path`, load its code and map its weights in place, or copy them to the GPU it is for.

    `threads` sizes the pool that runs kernels (None: TVM_NUM_THREADS, or all cores that the process may use).
    An artifact is code: load only what you would run as a program.
    Raises ArtifactError if the file is damaged, or built for another CPU, for a GPU that is not here or too small, or
    for another runtime; OptionError for bad `threads`.
    """
    artifact = open_artifact(path)
    check_cpu(artifact)
    check_gpu(artifact)
    machine = load_library(artifact, threads)
    # Every weight is a view into the mapped file, through bytes because numpy does not know all dtypes.
    file = np.frombuffer(artifact.data, np.uint8)
    stored = {
        key: view(tvm_ffi.from_dlpack(file[t.offset : t.offset + t.size]), t.dtype, t.shape)
        for key, t in artifact.tensors.items()
    }
    if (memory := memory_of(artifact)).on_device:
        check_room(artifact)
        stored = {key: memory.put(to_numpy(tensor)) for key, tensor in stored.items()}
    weights = {name: stored[param.tensor] for name, param in artifact.manifest.params.items()}
    return Model(artifact, machine, weights)
