"""Perplexity as llama.cpp counts it: the text in chunks, each with an empty past, its second half scored."""

from __future__ import annotations

import numpy as np

from llmc.engines.base import Engine
from llmc.errors import InputError

CHUNK = 512


def demand_length(ids: np.ndarray, chunk: int = CHUNK) -> None:
    """Raises InputError for a text of less than one chunk."""
    if len(ids) < chunk:
        raise InputError(f"the text has {len(ids)} tokens; perplexity needs at least {chunk}", hint="give a longer one")


def perplexity(engine: Engine, ids: np.ndarray, chunk: int = CHUNK) -> float:
    """exp of the mean negative log-likelihood (nats) that `engine` gives to tokens int64 [n].

    The rest that fills no chunk is left out. Raises InputError for a text of less than one chunk.
    """
    demand_length(ids, chunk)
    losses = [score(engine, ids[i : i + chunk]) for i in range(0, len(ids) - chunk + 1, chunk)]
    return float(np.exp(np.mean(np.concatenate(losses))))


def score(engine: Engine, ids: np.ndarray) -> np.ndarray:
    """Negative log-likelihoods of the second half of `ids`, float64 [len(ids) - len(ids) // 2 - 1]."""
    engine.reset()
    half = len(ids) // 2
    logits = engine.step(ids[None])[0, half:-1].astype(np.float64)
    highest = logits.max(-1)
    total = np.log(np.exp(logits - highest[:, None]).sum(-1)) + highest
    return np.asarray(total - logits[np.arange(len(logits)), ids[half + 1 :]])
