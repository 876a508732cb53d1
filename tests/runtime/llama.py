"""What `tests.graphs.Decoder` computes, in plain numpy and float64, over a cache that can be looked into.

Keys are kept as they are before rotation, and rotated by their places in the cache whenever they are read: forgetting
some tokens moves the others.
"""

from __future__ import annotations

import numpy as np

from tests.graphs import Decoder


class Llama:
    """One sequence; `length` tokens of it are held."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, shape = decoder, decoder.shape
        empty = np.zeros((0, shape.kv_heads, shape.head_dim))
        self.keys, self.values = [empty] * shape.layers, [empty] * shape.layers

    @property
    def length(self) -> int:
        return len(self.keys[0])

    def forget(self, first: int, count: int) -> None:
        """`count` tokens from number `first` on."""
        for held in (self.keys, self.values):
            held[:] = [np.delete(rows, slice(first, first + count), axis=0) for rows in held]

    def read(self, tokens: np.ndarray) -> np.ndarray:
        """The logits that follow each token, [S, V]."""
        s, first = self.decoder.shape, self.length
        h = self.decoder.embed[tokens].astype(np.float64)
        for i, w in enumerate(self.decoder.blocks):
            x = self._norm(h, w["norm1"])
            q, k, v = ((x @ w[name].T).reshape(len(tokens), -1, s.head_dim) for name in "qkv")
            self.keys[i], self.values[i] = np.concatenate([self.keys[i], k]), np.concatenate([self.values[i], v])
            places = np.arange(self.length)
            k, v = (np.repeat(x, s.heads // s.kv_heads, axis=1) for x in (self.keys[i], self.values[i]))
            scores = np.einsum("qhd,khd->hqk", self._rotated(q, places[first:]), self._rotated(k, places))
            scores = np.where(places <= places[first:, None], scores * s.head_dim**-0.5, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            mixed = np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v)
            h = h + mixed.reshape(len(tokens), -1) @ w["o"].T
            x = self._norm(h, w["norm2"])
            gate = x @ w["gate"].T
            h = h + (gate / (1 + np.exp(-gate)) * (x @ w["up"].T)) @ w["down"].T
        return self._norm(h, self.decoder.final) @ self.decoder.embed.T.astype(np.float64)

    def _norm(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.decoder.shape.epsilon) * weight

    def _rotated(self, x: np.ndarray, places: np.ndarray) -> np.ndarray:
        """x [n, heads, D] of tokens at `places` [n]."""
        half = x.shape[-1] // 2
        angles = np.outer(places, 10000.0 ** (-np.arange(half) / half))[:, None]
        low, high = x[..., :half], x[..., half:]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def logits(decoder: Decoder, ids: np.ndarray) -> np.ndarray:
    """Those that follow each token of a text, [S, V]."""
    return Llama(decoder).read(np.asarray(ids))
