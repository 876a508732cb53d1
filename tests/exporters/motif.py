"""What every exporter's graph here has: how it is written, what it is fed, and what has to become of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

Feeds = dict[str, np.ndarray]


@dataclass(frozen=True)
class Motif:
    """A small graph in an exporter's spelling.

    `write` saves it; `feeds` makes inputs, with another size of every dynamic dimension for each `run` of 0 and 1.
    `operators` counts the fused operators that it becomes, and `gone` are primitive ones of which none may be left.
    `cosine` bounds the direction of outputs where the model rounds activations, which engines do differently; all
    others are compared number by number, within `tolerance` of the largest. What is `slow` to build is compared by the
    slow tests.
    """

    name: str
    write: Callable[[Path], Path]
    feeds: Callable[[int], Feeds]
    operators: Mapping[str, int] = field(default_factory=dict)
    gone: tuple[str, ...] = ()
    tolerance: float = 2e-5
    cosine: float = 0.0
    slow: bool = False

    def __str__(self) -> str:
        return self.name


def weights(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """float32 of a size that keeps a layer's outputs near 1."""
    return (rng.standard_normal(shape) / np.sqrt(shape[-1] if len(shape) == 1 else shape[0])).astype(np.float32)


def decoder_feeds(run: int, *, vocabulary: int, kv_heads: int, head_dim: int, names: tuple[str, ...]) -> Feeds:
    """Ids, mask and positions of a batch with some padding, and a past; `names` are those of past keys and values."""
    rng = np.random.default_rng(run)
    batch, seq, past = ((2, 5, 3), (1, 1, 7))[run]
    mask = np.ones((batch, past + seq), np.int64)
    mask[-1, :2] = 0
    feeds = {
        "input_ids": rng.integers(0, vocabulary, (batch, seq)),
        "attention_mask": mask,
        "position_ids": np.broadcast_to(np.arange(past, past + seq), (batch, seq)).copy(),
    }
    return feeds | {n: rng.standard_normal((batch, kv_heads, past, head_dim)).astype(np.float32) for n in names}


def encoder_feeds(run: int, vocabulary: int, dtype: type = np.int64) -> Feeds:
    """Ids of a batch whose last row is padded at its end, and their mask."""
    rng = np.random.default_rng(run)
    batch, seq = ((2, 5), (3, 9))[run]
    mask = np.ones((batch, seq), dtype)
    mask[-1, 3:] = 0
    return {"input_ids": rng.integers(0, vocabulary, (batch, seq)).astype(dtype), "attention_mask": mask}
