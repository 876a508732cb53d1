"""The memory of a session's keys and values: one array for each layer and kind, with a row for each sequence."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from llmc.package.manifest import BufferSpec, DecoderSpec
from llmc.runtime.arrays import aligned_zeros, numpy_dtype

_FIRST_CAPACITY = 512


class Caches(Protocol):
    """What a session asks of its memory, whose rows hold `lengths` [B] tokens."""

    @property
    def moves(self) -> int:
        """How often arrays were replaced: calls prepared before are void."""

    def grow(self, before: np.ndarray, after: np.ndarray) -> None:
        """Let rows of `before` [B] tokens be written until they are `after` [B] long.

        Raises InputError where there is no such room; nothing has changed then.
        """

    def shrink(self, lengths: np.ndarray) -> None:
        """Forget what lies beyond `lengths` [B] tokens."""

    def clear(self) -> None:
        """Forget everything; the room stays."""

    def fork(self, rows: Sequence[int], lengths: np.ndarray) -> Caches:
        """Memory of its own that begins as these rows do, some of which may be the same."""

    def inputs(self, rows: slice) -> dict[str, np.ndarray]:
        """Further inputs of a call for `rows`, by name."""

    def buffers(self, rows: slice) -> list[np.ndarray]:
        """k, v (and planes, where they are rounded) of each layer, as a call for `rows` takes them."""


class RowCaches:
    """Every row has the same room, `capacity` tokens, which doubles when one of them needs more."""

    def __init__(self, decoder: DecoderSpec, batch: int, capacity: int = _FIRST_CAPACITY) -> None:
        self.decoder, self.batch = decoder, batch
        self.moves, self.capacity = 0, 0
        self.arrays: list[np.ndarray] = []
        self._block = math.lcm(*(cache.block for cache in decoder.caches))
        self._resize(self._limit(capacity))

    def grow(self, before: np.ndarray, after: np.ndarray) -> None:
        tokens = int(after.max())
        if tokens > self.capacity:
            self._resize(self._limit(max(tokens, 2 * self.capacity)))

    def shrink(self, lengths: np.ndarray) -> None:
        """Nothing to do: kernels mask what lies beyond a row's length."""

    def clear(self) -> None:
        for array in self.arrays:
            array[...] = 0

    def fork(self, rows: Sequence[int], lengths: np.ndarray) -> RowCaches:
        twin = RowCaches(self.decoder, len(rows), self.capacity)
        for mine, its in zip(self.arrays, twin.arrays, strict=True):
            its[...] = mine[list(rows)]
        return twin

    def inputs(self, rows: slice) -> dict[str, np.ndarray]:
        return {}

    def buffers(self, rows: slice) -> list[np.ndarray]:
        return [array[rows] for array in self.arrays]

    def _limit(self, tokens: int) -> int:
        """A capacity of at least `tokens` (as far as the model's length allows), in whole blocks."""
        most = self.decoder.max_length
        tokens = tokens if most is None else min(tokens, most)
        return -(-tokens // self._block) * self._block

    def _resize(self, capacity: int) -> None:
        """Move every array into a larger one; one after the other, so that only one is held twice."""
        for i, (spec, axis2) in enumerate(self._shapes(capacity)):
            shape = (self.batch, int(spec.shape[1]), axis2, *map(int, spec.shape[3:]))
            new = aligned_zeros(shape, numpy_dtype(spec.dtype))
            if i < len(self.arrays):
                old = self.arrays[i]
                new[:, :, : old.shape[2]] = old
                self.arrays[i] = new
            else:
                self.arrays.append(new)
        self.capacity = capacity
        self.moves += 1

    def _shapes(self, capacity: int) -> Iterator[tuple[BufferSpec, int]]:
        """Each buffer, and the size of its third dimension: blocks, or tokens."""
        for cache in self.decoder.caches:
            for buffer in cache.buffers:
                yield buffer, capacity // (cache.block if buffer.shape[2] == cache.k.shape[2] else 1)
