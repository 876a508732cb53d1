"""Which template serves on a GPU what another one serves on CPUs."""

from __future__ import annotations

from llmc.schedules.attention.attention import ATTENTION
from llmc.schedules.attention.cuda import CUDA_ATTENTION
from llmc.schedules.attention.cuda_append import CUDA_KV_APPEND
from llmc.schedules.attention.kv_append import KV_APPEND
from llmc.schedules.base import Kernel, Template
from llmc.schedules.embedding.cuda import CUDA_EMBEDDING, CUDA_LOWBIT_EMBEDDING
from llmc.schedules.embedding.dense import EMBEDDING_DENSE
from llmc.schedules.embedding.lowbit import LOWBIT_EMBEDDING
from llmc.schedules.gemm.cuda import CUDA_LINEAR
from llmc.schedules.gemm.dense import DENSE
from llmc.schedules.norm.cuda import CUDA_NORM
from llmc.schedules.norm.norm import NORM
from llmc.schedules.recurrent.cuda import CUDA_RECURRENT
from llmc.schedules.recurrent.recurrent import RECURRENT
from llmc.targets.base import Target

_ON_GPUS: dict[str, Template] = {
    ATTENTION.name: CUDA_ATTENTION,
    KV_APPEND.name: CUDA_KV_APPEND,
    EMBEDDING_DENSE.name: CUDA_EMBEDDING,
    LOWBIT_EMBEDDING.name: CUDA_LOWBIT_EMBEDDING,
    DENSE.name: CUDA_LINEAR,
    NORM.name: CUDA_NORM,
    RECURRENT.name: CUDA_RECURRENT,
}


def on(target: Target, kernel: Kernel) -> Kernel:
    """The kernel that serves this workload on `target`."""
    if target.kind != "cuda" or kernel.template.name not in _ON_GPUS:
        return kernel
    return Kernel(_ON_GPUS[kernel.template.name], kernel.workload)
