"""The memory of a session's keys and values: one array for each layer and kind, with a row for each sequence."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np

from llmc.package.manifest import BufferSpec, DecoderSpec
from llmc.runtime.arrays import numpy_dtype
from llmc.runtime.memory import HOST, Array, Memory
from llmc.runtime.tokens import move_tokens

FIRST_CAPACITY = 512


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

    def move(self, row: int, sources: np.ndarray, targets: np.ndarray) -> None:
        """Write what is held of a row's tokens number `sources` [n] to places `targets` [n], which may be written."""

    def drop_block(self, row: int, sinks: int, lengths: np.ndarray) -> None:
        """Forget as many tokens as a block has after a row's first `sinks`, which are fewer; later ones move up.

        `lengths` [B] are those afterwards. The row's first block may then be written. Raises InputError as `grow` does.
        """

    def inputs(self, rows: slice) -> dict[str, np.ndarray]:
        """Further inputs of a call for `rows`, by name."""

    def buffers(self, rows: slice) -> list[Array]:
        """k, v (and planes, where they are rounded) of each layer, as a call for `rows` takes them."""


class RowCaches:
    """Every row has the same room, `capacity` tokens, which doubles when one of them needs more."""

    def __init__(self, decoder: DecoderSpec, batch: int, memory: Memory = HOST, capacity: int = FIRST_CAPACITY) -> None:
        """Raises InputError where `memory` has no room."""
        self.decoder, self.batch, self.memory = decoder, batch, memory
        self.moves, self.capacity = 0, 0
        self.arrays: list[Array] = []
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
            self.memory.clear(array)

    def fork(self, rows: Sequence[int], lengths: np.ndarray) -> RowCaches:
        twin = RowCaches(self.decoder, len(rows), self.memory, self.capacity)
        for mine, its in zip(self.arrays, twin.arrays, strict=True):
            for row, source in enumerate(rows):
                self.memory.copy(its[row], mine[source])
        return twin

    def move(self, row: int, sources: np.ndarray, targets: np.ndarray) -> None:
        if not len(sources):
            return
        first = min(sources.min(), targets.min()) // self._block
        last = max(sources.max(), targets.max()) // self._block + 1
        places = (np.divmod(tokens - first * self._block, self._block) for tokens in (sources, targets))
        with self._blocks(row, int(first), int(last)) as blocks:
            move_tokens(self.decoder, blocks, *places)

    def drop_block(self, row: int, sinks: int, lengths: np.ndarray) -> None:
        """The first block keeps its sinks, and gets what stands after so many tokens in the next one."""
        kept = np.arange(sinks, self._block)
        self.move(row, self._block + kept, kept)
        blocks = -(-int(lengths[row]) // self._block)
        if blocks > 1:
            for later, earlier in zip(self._views(row, 2, blocks + 1), self._views(row, 1, blocks), strict=True):
                self.memory.copy(earlier, later)

    def inputs(self, rows: slice) -> dict[str, np.ndarray]:
        return {}

    def buffers(self, rows: slice) -> list[Array]:
        return [array[rows] for array in self.arrays]

    def _views(self, row: int, first: int, last: int) -> list[Array]:
        """Blocks `first` to `last` of a row's buffers, [KV, blocks, ...] or [KV, tokens, D]."""
        each = (1 if array.ndim == 5 else self._block for array in self.arrays)
        return [array[row, :, first * n : last * n] for array, n in zip(self.arrays, each, strict=True)]

    @contextmanager
    def _blocks(self, row: int, first: int, last: int) -> Iterator[list[np.ndarray]]:
        """Some blocks of a row's buffers, to be written: [blocks, KV, ...]."""
        with self.memory.edit(self._views(row, first, last)) as arrays:
            yield [
                (x if x.ndim == 4 else x.reshape(len(x), -1, self._block, x.shape[-1])).swapaxes(0, 1) for x in arrays
            ]

    def _limit(self, tokens: int) -> int:
        """A capacity of at least `tokens` (as far as the model's length allows), in whole blocks."""
        most = self.decoder.max_length
        tokens = tokens if most is None else min(tokens, most)
        return -(-tokens // self._block) * self._block

    def _resize(self, capacity: int) -> None:
        """Move every array into a larger one; one after the other, so that only one is held twice."""
        size = self.batch * self.decoder.cache_bytes(capacity)
        held = sum(array.nbytes for array in self.arrays)
        largest = max((array.nbytes for array in self.arrays), default=0)
        self.memory.demand(size - held + largest, f"caches of {self.batch} × {capacity} tokens")
        for i, (spec, axis2) in enumerate(self._shapes(capacity)):
            shape = (self.batch, int(spec.shape[1]), axis2, *map(int, spec.shape[3:]))
            new = self.memory.zeros(shape, numpy_dtype(spec.dtype))
            if i < len(self.arrays):
                old = self.arrays[i]
                self.memory.copy(new[:, :, : old.shape[2]], old)
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
