"""Caches in pages: a pool that sequences share, and a table that says which page holds each block of a row.

A page belongs to whoever counts on it: rows of forks, or of one session, that begin alike have the same pages until
one of them writes into a page that another has, too. Only the last, partly filled page of a row can be one; it is
copied then ("PagedAttention", Kwon et al., 2023).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from llmc.errors import InputError
from llmc.package.manifest import DecoderSpec
from llmc.runtime.arrays import aligned_zeros, numpy_dtype
from llmc.runtime.memory import HOST, Array, Memory
from llmc.runtime.tokens import move_tokens

_FIRST_PAGES = 16
_ALIGNED = 16  # entries: rows of a table begin at 64-byte boundaries


class PagePool:
    """Pages of all layers under one number each. It grows as needed, or holds at most `most` pages."""

    def __init__(self, decoder: DecoderSpec, most: int | None, memory: Memory) -> None:
        self.block = math.lcm(*(cache.block for cache in decoder.caches))
        self.memory, self.most, self.moves = memory, most, 0
        self._specs = [buffer for cache in decoder.caches for buffer in cache.buffers]
        self.arrays: list[Array] = []
        self._users: list[int] = []  # of each page
        self._free: list[int] = []
        self._resize(_FIRST_PAGES if most is None else min(most, _FIRST_PAGES))

    @property
    def used(self) -> int:
        """Pages that somebody counts on."""
        return len(self._users) - len(self._free)

    def take(self, count: int) -> list[int]:
        """So many pages for one user. Raises InputError where the pool is bounded and has not so many left."""
        if count > len(self._free):
            needed = self.used + count
            if self.most is not None and needed > self.most:
                raise InputError(
                    f"{needed} pages of {self.block} tokens are needed, and the pool has {self.most}",
                    hint="close or truncate sessions that share it, or give session() more pages",
                )
            doubled = max(needed, 2 * len(self._users))
            self._resize(doubled if self.most is None else min(doubled, self.most))
        pages = [self._free.pop() for _ in range(count)]
        self.share(pages)
        return pages

    def share(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._users[page] += 1

    def drop(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._users[page] -= 1
            if not self._users[page]:
                self._free.append(page)

    def shared(self, page: int) -> bool:
        return self._users[page] > 1

    def copy(self, source: int, target: int) -> None:
        for array in self.arrays:
            self.memory.copy(array[target], array[source])

    def _resize(self, count: int) -> None:
        """Move every array into a larger one; one after the other, so that only one is held twice."""
        old = len(self._users)
        each = sum(math.prod(map(int, spec.shape[1:])) * numpy_dtype(spec.dtype).itemsize for spec in self._specs)
        largest = max((array.nbytes for array in self.arrays), default=0)
        self.memory.demand((count - old) * each + largest, f"caches of {count} pages of {self.block} tokens")
        for i, spec in enumerate(self._specs):
            new = self.memory.zeros((count, *map(int, spec.shape[1:])), numpy_dtype(spec.dtype))
            if i < len(self.arrays):
                self.memory.copy(new[:old], self.arrays[i])
                self.arrays[i] = new
            else:
                self.arrays.append(new)
        self._users += [0] * (count - old)
        self._free = [*range(count - 1, old - 1, -1), *self._free]
        self.moves += 1


class PagedCaches:
    """The pages of a session's rows."""

    def __init__(
        self,
        decoder: DecoderSpec,
        batch: int,
        pages: int | None = None,
        memory: Memory = HOST,
        pool: PagePool | None = None,
    ) -> None:
        """In `pool`, or in one of its own in `memory` that holds at most `pages` (None: as many as it takes)."""
        self._rows: list[list[int]] = []
        if pages is not None and pages < 1:
            raise InputError(f"a pool of {pages} pages holds nothing")
        self.decoder, self.pool = decoder, pool or PagePool(decoder, pages, memory)
        self._rows = [[] for _ in range(batch)]
        self._moves = 0
        self._table = aligned_zeros((batch, _ALIGNED), np.int32)
        self._shared = aligned_zeros((1,), np.int64)

    @property
    def moves(self) -> int:
        return self._moves + self.pool.moves

    def grow(self, before: np.ndarray, after: np.ndarray) -> None:
        block = self.pool.block
        wanted: list[tuple[int, int]] = []  # row and block of each page that is new
        for b, (length, end) in enumerate(zip(before.tolist(), after.tolist(), strict=True)):
            pages, first = self._rows[b], length // block
            if end > length and first < len(pages) and self.pool.shared(pages[first]):
                wanted.append((b, first))
            wanted += [(b, i) for i in range(len(pages), -(-end // block))]
        if not wanted:
            return
        for (b, i), page in zip(wanted, self.pool.take(len(wanted)), strict=True):
            if i < len(self._rows[b]):
                self._replace(b, i, page)
            else:
                self._rows[b].append(page)
        self._update(before)

    def shrink(self, lengths: np.ndarray) -> None:
        for pages, length in zip(self._rows, lengths.tolist(), strict=True):
            kept = -(-length // self.pool.block)
            self.pool.drop(pages[kept:])
            del pages[kept:]
        self._update(lengths)

    def clear(self) -> None:
        self.shrink(np.zeros(len(self._rows), np.int64))

    def fork(self, rows: Sequence[int], lengths: np.ndarray) -> PagedCaches:
        twin = PagedCaches(self.decoder, len(rows), pool=self.pool)
        twin._rows = [self._rows[b][: -(-int(lengths[b]) // self.pool.block)] for b in rows]
        for pages in twin._rows:
            self.pool.share(pages)
        twin._update(lengths[list(rows)])
        return twin

    def move(self, row: int, sources: np.ndarray, targets: np.ndarray) -> None:
        pages, block = np.array(self._rows[row]), self.pool.block
        count, tokens = len(sources), np.concatenate([sources, targets])
        with self.pool.memory.edit_rows(self.pool.arrays, pages[tokens // block]) as (arrays, numbers):
            places = list(zip(np.split(numbers, [count]), np.split(tokens % block, [count]), strict=True))
            move_tokens(self.decoder, arrays, *places)

    def drop_block(self, row: int, sinks: int, lengths: np.ndarray) -> None:
        """The first page keeps its sinks, and gets what stands after so many tokens in the next one, which goes."""
        pages, kept = self._rows[row], np.arange(sinks, self.pool.block)
        if self.pool.shared(pages[0]):
            self._replace(row, 0, *self.pool.take(1))
        self.move(row, self.pool.block + kept, kept)
        self.pool.drop([pages.pop(1)])
        self._update(lengths)

    def inputs(self, rows: slice) -> dict[str, np.ndarray]:
        return {"block_table": self._table[rows], "shared_blocks": self._shared}

    def buffers(self, rows: slice) -> list[Array]:
        return self.pool.arrays

    def _replace(self, row: int, i: int, page: int) -> None:
        """Have a copy of a row's page for the row alone."""
        pages = self._rows[row]
        self.pool.copy(pages[i], page)
        self.pool.drop([pages[i]])
        pages[i] = page

    def _update(self, lengths: np.ndarray) -> None:
        """Write the table, and how many leading pages all rows share, full ones.

        An empty row stands in nobody's way: it gets the pages of another.
        """
        longest = max(self._rows, key=len)
        width = self._table.shape[1]
        if len(longest) > width:
            self._table = aligned_zeros(
                (len(self._rows), max(2 * width, -(-len(longest) // _ALIGNED) * _ALIGNED)), np.int32
            )
            self._moves += 1
        filled = [pages or longest for pages in self._rows]
        for b, pages in enumerate(filled):
            self._table[b, : len(pages)] = pages
        full = [length // self.pool.block for length, pages in zip(lengths.tolist(), self._rows, strict=True) if pages]
        least = min(full, default=0)
        alike = (self._table[:, :least] == self._table[0, :least]).all(axis=0)
        self._shared[0] = least if alike.all() else int(alike.argmin())

    def __del__(self) -> None:
        for pages in self._rows:
            self.pool.drop(pages)
