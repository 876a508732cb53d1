"""Sessions without an end in bounded memory ("Efficient Streaming Language Models with Attention Sinks", Xiao et al.,
2024): the cache holds a text's first tokens, on which attention leans whatever they say, and its latest ones.

Tokens stand at their places in the cache, not in the text: the sinks right before the window. Attention with rotary
embeddings sees differences of positions alone, so that the newest token may go on counting, and its window with it;
what has to move are the sinks. When the cache is full, the oldest block of the window goes, 64 tokens, so that it
holds 0 to 63 fewer than it may. Blocks behind it move up: whole ones by a copy of memory, or, in pages, by striking
one out of the table. Then the sinks are read again, 64 positions further on. What a layer keeps of the first tokens
depends on them alone, so that this gives exactly their keys there, without knowing how a model rotates; it costs a
call of 4 tokens for every 64.

A text has as many positions as the model's tables, and as float32 tells apart. Where they end, the sinks and the window
are read anew from the beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llmc.errors import InputError
from llmc.runtime.caches import Caches
from llmc.runtime.calls import Outcome
from llmc.runtime.session import Lengths, Session

if TYPE_CHECKING:
    from llmc.runtime.model import Model

SINKS = 4
_POSITIONS = 1 << 16  # up to which angles in float32 are good to 2**-8


class StreamingSession(Session):
    """A session of one row that forgets what lies between its first `sinks` and its last `window` tokens.

    `lengths` counts the tokens that it holds; they never exceed the two together.
    """

    def __init__(
        self, model: Model, window: int, sinks: int = SINKS, pages: int | None = None, caches: Caches | None = None
    ) -> None:
        """Raises InputError for sizes that leave no room for whole blocks, or exceed the model's length."""
        super().__init__(model, 1, pages, caches)
        self.block = self.decoder.caches[0].block
        most = self.decoder.max_length
        if not 0 <= sinks < self.block:
            raise InputError(f"there cannot be {sinks} sinks", hint=f"0 to {self.block - 1}; 4 are usual")
        if window < 2 * self.block or (most is not None and sinks + window > most):
            upper = "" if most is None else f", and with the sinks at most the model's {most} positions"
            hint = f"the window has at least {2 * self.block} tokens{upper}"
            raise InputError(f"a window of {window} tokens and {sinks} sinks cannot be kept", hint=hint)
        self.sinks, self.window = sinks, window
        self._ids = np.zeros(sinks + window, np.int64)  # of the tokens that are held
        self._shift = 0  # how much further on each of them stands than its place says
        self._read_shift = 0  # the same, when the sinks were last read

    @property
    def max_length(self) -> int | None:
        """There is no end."""
        return None

    def _append(self, ids: Any, all: bool, outcome: Outcome) -> Any:
        """Piece by piece: a call that is interrupted may have read, and forgotten, some tokens."""
        tokens = self._check(ids)
        assert isinstance(tokens, np.ndarray)
        parts, done = [], 0
        while done < tokens.shape[1]:
            self._make_room(1)
            piece = tokens[:, done : done + len(self._ids) - self.length]
            parts.append(super()._append(piece, all, outcome))
            done += piece.shape[1]
            self._ids[self.length - piece.shape[1] : self.length] = piece[0]
        if not all:
            return parts[-1]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def accept(self, path: Sequence[int] | np.ndarray) -> None:
        tree, before = self._tree, self.length
        super().accept(path)
        if tree is not None and self.length > before:
            self._ids[before : self.length] = tree.tokens[np.asarray(path)]

    def reserve(self, tokens: int) -> None:
        super().reserve(min(tokens, len(self._ids)))

    def truncate(self, length: Lengths) -> None:
        super().truncate(length)
        if not self.length:
            self._shift = self._read_shift = 0

    def reset(self) -> None:
        super().reset()
        self._shift = self._read_shift = 0

    def fork(self, rows: Sequence[int] | None = None) -> StreamingSession:
        """As `Session.fork` does, for the one row that there is."""
        if rows is not None and list(rows) != [0]:
            raise InputError(f"a session with a window has one row, not {list(rows)}", hint="fork it several times")
        twin = StreamingSession(self.model, self.window, self.sinks, caches=self.caches.fork([0], self._lengths))
        twin._lengths[...] = self._lengths
        twin._ids[...] = self._ids
        twin._shift, twin._read_shift = self._shift, self._read_shift
        return twin

    def _positions(self, places: np.ndarray) -> np.ndarray:
        return places + self._shift

    def _make_room(self, count: int) -> None:
        """Forget blocks until `count` more tokens, at most a block, fit; then have the sinks where they belong."""
        while self.length + count > len(self._ids):
            most = min(self.decoder.max_length or _POSITIONS, _POSITIONS)
            if self._shift + self.block + len(self._ids) > most:
                self._read_anew()
            else:
                self._drop_block()
        if self._read_shift != self._shift:
            self._read_sinks()

    def _drop_block(self) -> None:
        length = self.length - self.block
        self.caches.drop_block(0, self.sinks, self._lengths - self.block)
        self._lengths[...] = length
        self._ids[self.sinks : length] = self._ids[self.sinks + self.block : length + self.block]
        self._shift += self.block
        self._tree = None

    def _read_sinks(self) -> None:
        """Keys and values of the first tokens at their present positions."""
        if self.sinks:
            length = self.length
            self._lengths[...] = 0
            try:
                self._read(slice(0, 1), self._ids[None, : self.sinks], None, False, self._logits)
            finally:
                self._lengths[...] = length
        self._read_shift = self._shift

    def _read_anew(self) -> None:
        """All that is held but the oldest block of the window, at the positions of a text that begins with it."""
        kept = np.delete(self._ids[: self.length], slice(self.sinks, self.sinks + self.block))
        self.truncate(0)
        super()._append(kept, False, self._logits)
        self._ids[: len(kept)] = kept
