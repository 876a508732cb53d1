"""A decoder's state between calls: the key and value caches, which the compiled step functions update in place.

Positions beyond a row's length hold stale or zero data; the kernels mask them by `kv_len`, so rolling back is free.

Rows have lengths of their own. Where their new tokens differ in number, rows of the same number share a call, and the
others pause in it: with a `kv_len` of 0 nothing of theirs is written or read. So no row is padded. Long pieces that
only some rows have are read row by row: there a call for one row computes as fast as one for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llmc.errors import ArtifactError, InputError
from llmc.package.manifest import DecoderSpec
from llmc.runtime.arrays import view
from llmc.runtime.caches import Caches, RowCaches
from llmc.runtime.calls import Calls, Outcome, logits
from llmc.runtime.memory import Memory
from llmc.runtime.pages import PagedCaches
from llmc.runtime.rows import demand_room, demand_vocabulary, piece_of_each_row
from llmc.runtime.trees import DraftTree

if TYPE_CHECKING:
    from llmc.runtime.generate import Generation
    from llmc.runtime.model import Function, Model

CHUNK = 512  # tokens per call while reading a prompt: bounds the memory of activations, long enough for full speed
FEW = 8  # tokens up to which a call's time is that of reading the weights, whether rows pause in it or not

Tokens = Sequence[int] | np.ndarray
Lengths = int | Sequence[int] | np.ndarray


class Session:
    """One or more sequences (rows of a batch) being read and continued by a decoder.

    `lengths` counts the tokens that the caches hold of each row. Not to be shared between threads.
    """

    def __init__(self, model: Model, batch: int = 1, pages: int | None = None, caches: Caches | None = None) -> None:
        """`pages` bounds the pool of a paged cache. `caches`, where given, become the session's own."""
        decoder = model.manifest.decoder
        if decoder is None:
            raise ArtifactError("is not a decoder: it has no session", where=str(model.artifact.path))
        if batch < 1:
            raise InputError(f"batch is {batch}; it must be at least 1")
        self.model, self.decoder, self.batch = model, decoder, batch
        if pages is not None and not decoder.paged:
            hint = "compile the model with --kv-cache paged"
            raise InputError("the model's cache has no pages to count", where=str(model.artifact.path), hint=hint)
        self.caches: Caches = caches or caches_of(decoder, batch, pages, model.memory)
        self._lengths = np.zeros(batch, np.int64)
        self._calls = Calls(model, self.caches)
        self._logits = Outcome(logits, lambda count: np.full((count, decoder.vocab_size), np.nan, np.float32))
        self._tree: DraftTree | None = None  # that was verified last, and lies behind the row's tokens

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row."""
        return tuple(self._lengths.tolist())

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return int(self._lengths.max())

    @property
    def max_length(self) -> int | None:
        """Tokens that the model can see, None without a limit."""
        return self.decoder.max_length

    def append(self, ids: Tokens | Sequence[Tokens], *, all: bool = False) -> Any:
        """Read tokens: ids [S] (batch 1) or [B, S], or a list of B sequences of any lengths; an empty one's row pauses.

        Returns the logits that follow each row's last token, float32 [B, V]; those of a row that paused are NaN. With
        `all`, the logits after every token: [B, S, V], or a list of [S of the row, V] where rows differ in length.
        Long inputs are read in chunks of CHUNK tokens.
        Raises InputError if there are no ids, an id is outside the vocabulary, or the model's length is exceeded;
        the session is then as it was.
        """
        return self._append(ids, all, self._logits)

    def sample(self, ids: Tokens | Sequence[Tokens], **settings: np.ndarray) -> np.ndarray:
        """Read tokens as `append` does, and have the device choose the one that follows each row's last: int64 [B], of
        rows that paused -1.

        `settings` are the inputs of the artifact's function `sample` beside the logits, each [B]: temperature, top_k,
        top_p, and uniform, a number of [0, 1) that decides. Raises what `append` does.
        """

        def choose(_: Function, found: Any, rows: slice) -> np.ndarray:
            size, function = rows.stop - rows.start, self.model.functions["sample"]
            draws = self._calls.draws(function, rows)
            for name, array in draws.arrays.items():
                array[...] = settings[name][rows]
            draws.stage.send()
            last = view(found, "float32", (size, self.decoder.vocab_size))
            tokens = function.run(function.arguments((last, *draws.stage.tensors)))
            return function.memory.get(tokens, "int64")[:, None]

        chosen: np.ndarray = self._append(ids, False, Outcome(choose, lambda count: np.full(count, -1)))
        return chosen

    def _append(self, ids: Any, all: bool, outcome: Outcome) -> Any:
        """`append`, whatever is wanted of the steps."""
        tokens = self._check(ids)
        self._tree = None
        before = self._lengths.copy()
        everyone = slice(0, self.batch)
        try:
            if isinstance(tokens, np.ndarray):
                self.caches.grow(before, before + tokens.shape[1])
                found = self._read(everyone, tokens, None, all, outcome)
                return found if all else found[:, -1]
            self.caches.grow(before, before + [len(row) for row in tokens])
            parts = self._read_unequal(tokens, all, outcome)
        except BaseException:
            self._lengths[...] = before
            self.caches.shrink(before)
            raise
        return parts if all else np.stack([part[-1] for part in parts])

    def verify(self, tokens: Tokens, parents: Sequence[int] | np.ndarray) -> Any:
        """Read a tree of draft tokens [S] in one pass; returns the logits that follow each of them, float32 [1, S, V].

        `parents` [S] are the numbers of their parents, which stand before them; -1 for those that follow the session's
        last token. S is at most 64. Each token sees the text and the way to it: its logits are those that appending
        that way would give. The session's length stays: `accept` takes a way into it, and anything else that reads or
        forgets tokens forgets the tree.
        Raises InputError for a wrong tree, what `append` refuses, and sessions of several rows; ArtifactError if the
        model was not compiled for trees. The session is then as it was.
        """
        function = self.model.functions.get("verify")
        if function is None:
            hint = "compile the model with --draft-trees"
            raise ArtifactError("the model cannot read trees", where=str(self.model.artifact.path), hint=hint)
        if self.batch != 1:
            raise InputError(f"the session has {self.batch} rows; trees are verified for one")
        ids = self._check(tokens)
        assert isinstance(ids, np.ndarray)
        tree, count = DraftTree.of(ids[0], parents), ids.shape[1]
        self._make_room(count)
        self.caches.grow(self._lengths, self._lengths + count)
        self._tree = None
        call = self._calls.of(function, slice(0, 1), count)
        call.ids[...] = ids
        call.positions[...] = self._positions(self._lengths[:, None] + tree.depths)
        call.kv_len[...] = self._lengths + count
        call.tree[...] = tree.seen
        try:
            found = logits(function, call.run(), slice(0, 1))
        except BaseException:
            self.caches.shrink(self._lengths)
            raise
        self._tree = tree
        return found

    def accept(self, path: Sequence[int] | np.ndarray) -> None:
        """Take nodes of the tree that was verified last into the session, as if they had been appended.

        `path` [n] names a child of the session's last token, a child of that one, and so on; it may be empty. The rest
        of the tree is forgotten.

        Raises InputError for a path that is none, or where no tree was verified since.
        """
        if self._tree is None:
            raise InputError("there is no tree to accept from", hint="verify one, and append nothing in between")
        nodes = self._tree.check_path(path)
        self._tree = None
        length = self.length
        self.caches.move(0, length + nodes, length + np.arange(len(nodes)))
        self._lengths += len(nodes)
        self.caches.shrink(self._lengths)

    def generate(self, prompt: Tokens, max_new_tokens: int, **options: Any) -> Generation:
        """Read a prompt and stream what follows; `options` are those of `llmc.generate` (temperature, top_k, …)."""
        from llmc.runtime.generate import generate  # it needs this module

        return generate(self, prompt, max_new_tokens, **options)

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` a row in all, so that appending them moves no cache."""
        self.caches.grow(self._lengths, np.maximum(self._lengths, tokens))

    def truncate(self, length: Lengths) -> None:
        """Forget all tokens after the first `length`: of every row, or of each its own. A row of 0 is a new one."""
        lengths = np.asarray(length)
        fits = lengths.shape in ((), self._lengths.shape) and lengths.dtype.kind in "iu"
        if not fits or (lengths < 0).any() or (lengths > self._lengths).any():
            raise InputError(f"cannot truncate {_shown(self._lengths)} tokens to {_shown(lengths)}")
        self._tree = None
        self._lengths[...] = lengths
        self.caches.shrink(self._lengths)

    def reset(self) -> None:
        """Forget everything, as if newly made; the caches keep their room."""
        self._tree = None
        self._lengths[...] = 0
        self.caches.clear()

    def close(self) -> None:
        """Forget everything, and return the pages of a paged cache to those that share the pool."""
        self.reset()

    def fork(self, rows: Sequence[int] | None = None) -> Session:
        """An independent session that continues from the same tokens. Where the cache is paged, it shares their memory.

        With `rows`, of these rows, in this order and as often as they are named: `fork([0] * 8)` continues one prompt
        in eight ways, `fork([2, 5])` drops all rows but two. Raises InputError for rows that there are not.
        """
        rows = range(self.batch) if rows is None else rows
        if not rows or not 0 <= min(rows) <= max(rows) < self.batch:
            raise InputError(f"there are rows 0 to {self.batch - 1}, not {list(rows)}")
        twin = Session(self.model, len(rows), caches=self.caches.fork(rows, self._lengths))
        twin._lengths[...] = self._lengths[list(rows)]
        return twin

    def _read_unequal(self, tokens: list[np.ndarray], all: bool, outcome: Outcome) -> list[np.ndarray]:
        """The outcome of rows that differ in length: of each row [S, ...], or [1, ...] without `all`."""
        parts = [outcome.pause(0 if all else 1)] * self.batch
        counts = np.array([len(row) for row in tokens])
        for count in np.unique(counts[counts > 0]):
            reading = counts == count
            if count <= FEW:
                ids = np.zeros((self.batch, count), np.int64)
                ids[reading] = [tokens[b] for b in np.flatnonzero(reading)]
                found = self._read(slice(0, self.batch), ids, reading, all, outcome)
                for b in np.flatnonzero(reading):
                    parts[b] = found[b]
            else:
                for b in np.flatnonzero(reading):
                    parts[b] = self._read(slice(b, b + 1), tokens[b][None], None, all, outcome)[0]
        return parts

    def _read(
        self, rows: slice, tokens: np.ndarray, reading: np.ndarray | None, all: bool, outcome: Outcome
    ) -> np.ndarray:
        """The outcome [R, S, ...] of ids [R, S], or [R, 1, ...] of the last; only the rows that `reading` [R] names are
        read."""
        function = self._function(tokens.shape, all)
        count = tokens.shape[1]
        starts = range(0, count, CHUNK)
        if count <= CHUNK or not all:
            parts = [self._step(function, rows, tokens[:, start : start + CHUNK], reading, outcome) for start in starts]
            return parts[-1] if all else parts[-1][:, -1:]
        # 100 MB a chunk of a large vocabulary: copied one by one, the function's own memory is used again for the next.
        whole = np.empty((len(tokens), count, self.decoder.vocab_size), np.float32)
        for start in starts:
            part = tokens[:, start : start + CHUNK]
            whole[:, start : start + CHUNK] = self._step(function, rows, part, reading, outcome)
        return whole

    def _function(self, shape: tuple[int, ...], all: bool) -> Function:
        functions = self.model.functions
        if shape == (1, 1) and "decode" in functions:
            return functions["decode"]
        return functions["step" if all else "step_last"]

    def _step(
        self, function: Function, rows: slice, tokens: np.ndarray, reading: np.ndarray | None, outcome: Outcome
    ) -> np.ndarray:
        """The outcome [R, S, ...] (`step`) or [R, 1, ...] (`step_last`) of a chunk of ids [R, S]."""
        count = tokens.shape[1]
        call = self._calls.of(function, rows, count)
        ends = self._lengths[rows] + count
        if reading is not None:
            ends = np.where(reading, ends, 0)
        call.ids[...] = tokens
        call.positions[...] = self._positions(np.maximum(ends[:, None] + np.arange(-count, 0), 0))
        call.kv_len[...] = ends
        found = outcome.of(function, call.run(), rows)
        self._lengths[rows] = ends if reading is None else np.where(reading, ends, self._lengths[rows])
        return found

    def _make_room(self, count: int) -> None:
        """Goes before `count` tokens are read, at most a block of them."""

    def _positions(self, places: np.ndarray) -> np.ndarray:
        """Where tokens stand in the text that stand at `places` in their rows."""
        return places

    def _check(self, ids: Any) -> np.ndarray | list[np.ndarray]:
        """ids as [B, S], or as a list of B arrays where rows differ in length."""
        tokens = piece_of_each_row(ids, self.batch)
        demand_vocabulary(tokens, self.decoder.vocab_size)
        if self.max_length is not None:
            demand_room(tokens, self._lengths, self.max_length)
        return tokens


def caches_of(decoder: DecoderSpec, batch: int, pages: int | None, memory: Memory) -> Caches:
    """Empty caches in `memory`, as the artifact's functions want them. Raises InputError where it has no room."""
    return PagedCaches(decoder, batch, pages, memory) if decoder.paged else RowCaches(decoder, batch, memory)


def _shown(lengths: np.ndarray) -> str:
    return str(lengths[0] if lengths.shape == (1,) else lengths)
