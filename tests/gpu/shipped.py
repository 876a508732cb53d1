"""The kernels of the models that llmc is measured by, as `llmc compile` chooses them for a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llmc.schedules.attention.cuda import CUDA_ATTENTION
from llmc.schedules.attention.cuda_append import CUDA_KV_APPEND
from llmc.schedules.attention.workloads import AttentionWorkload, KVAppendWorkload
from llmc.schedules.base import Kernel
from llmc.schedules.embedding.cuda import CUDA_EMBEDDING
from llmc.schedules.embedding.dense import EmbeddingDenseWorkload
from llmc.schedules.gemm.bf16 import Bf16LinearWorkload
from llmc.schedules.gemm.cuda import CUDA_LINEAR
from llmc.schedules.gemm.cuda_mma import MMA_BF16, MMA_INT8, MMA_LOWBIT, HalfLinearWorkload
from llmc.schedules.gemm.dense import DenseLinearWorkload
from llmc.schedules.gemm.lowbit import LowBitLinearWorkload
from llmc.schedules.norm.cuda import CUDA_NORM
from llmc.schedules.norm.norm import NormWorkload

# (N, K, what follows): queries with keys and values, attention's output, gate with up, down.
SMOLLM2: tuple[tuple[int, int, dict[str, Any]], ...] = (
    (960, 576, {}),
    (576, 576, {"residual": True}),
    (3072, 576, {"activation": "silu_mul"}),
    (576, 1536, {"residual": True}),
)
LLAMA: tuple[tuple[int, int, dict[str, Any]], ...] = (
    (6144, 4096, {}),
    (4096, 4096, {"residual": True}),
    (28672, 4096, {"activation": "silu_mul"}),
    (4096, 14336, {"residual": True}),
)
MINILM: tuple[tuple[int, int, dict[str, Any]], ...] = (
    (1152, 384, {"bias": True}),
    (384, 384, {"bias": True, "residual": True}),
    (1536, 384, {"bias": True, "activation": "gelu"}),
    (384, 1536, {"bias": True, "residual": True}),
)
FORMATS = ("w4a16", "w4a8-g32", "w8a8", "bf16", "float32")


def linear(format: str, N: int, K: int, more: dict[str, Any]) -> Kernel:
    """A linear layer in one of `FORMATS`."""
    if format == "w4a16":
        return Kernel(MMA_LOWBIT, HalfLinearWorkload(N, K, 4, 32, True, 8.0, "float16", activations="a32", **more))
    if format == "w4a8-g32":
        return Kernel(MMA_INT8, LowBitLinearWorkload(N, K, 4, 32, True, 8.0, "float16", **more))
    if format == "w8a8":
        return Kernel(MMA_INT8, LowBitLinearWorkload(N, K, 8, 128, True, 128.0, "float16", **more))
    if format == "bf16":
        return Kernel(MMA_BF16, Bf16LinearWorkload(N, K, **more, activations="bf16"))
    return Kernel(CUDA_LINEAR, DenseLinearWorkload(N, K, **more))


def decoder(heads: int, kv_heads: int, head_dim: int, vocabulary: int, bf16: bool) -> Iterator[Kernel]:
    """What a decoder has besides linear layers."""
    sizes = heads, kv_heads, head_dim
    hidden = heads * head_dim
    yield Kernel(CUDA_ATTENTION, AttentionWorkload(*sizes, head_dim**-0.5, bf16=bf16))
    yield Kernel(CUDA_KV_APPEND, KVAppendWorkload(*sizes, in_place=True))
    yield Kernel(CUDA_KV_APPEND, KVAppendWorkload(*sizes, past=True, present=True))
    yield Kernel(CUDA_NORM, NormWorkload(hidden, "rms", 1e-5))
    yield Kernel(CUDA_EMBEDDING, EmbeddingDenseWorkload(vocabulary, hidden, 0))


def shipped() -> dict[str, Kernel]:
    """All of them, by a name for tests."""
    found = {
        f"{model} {format} {N}x{K}": linear(format, N, K, more)
        for model, layers in (("SmolLM2", SMOLLM2), ("Llama", LLAMA), ("MiniLM", MINILM))
        for format in FORMATS
        for N, K, more in layers
    }
    found["SmolLM2 w4a16 head"] = linear("w4a16", 49152, 576, {})
    for name, kernels in (
        ("SmolLM2", decoder(9, 3, 64, 49152, False)),
        ("SmolLM2 bf16", decoder(9, 3, 64, 49152, True)),
        ("Llama bf16", decoder(32, 8, 128, 128256, True)),
        ("Llama", decoder(32, 8, 128, 128256, False)),
    ):
        found |= {f"{name} {kernel.template.name} {i}": kernel for i, kernel in enumerate(kernels)}
    encoder = AttentionWorkload(12, 12, 32, 32**-0.5, causal=False, key_bias=True)
    found["MiniLM attention"] = Kernel(CUDA_ATTENTION, encoder)
    found["MiniLM norm"] = Kernel(CUDA_NORM, NormWorkload(384, "layer", 1e-12, bias=True, residual=True))
    return found
