"""Generating text: a stream of tokens from a session, and how long it took."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from llmc.errors import InputError, OptionError
from llmc.runtime.choosing import Chooser, chooser
from llmc.runtime.sampling import Sampling
from llmc.runtime.session import Session


class Generation(Iterator[int]):
    """New tokens one by one, as they are computed, without the one that ended them.

    `finish` says why it ended: at an end-of-sequence token, at `max_new_tokens`, or because the model can see no
    more; None while it runs. The figures are those so far. The last token given has not been read by the session:
    append it, and what follows, to continue.
    """

    def __init__(
        self, session: Session, prompt: Sequence[int] | np.ndarray, limit: int, choose: Chooser, eos: frozenset[int]
    ) -> None:
        self._session, self._choose, self._eos, self._limit = session, choose, eos, limit
        self._unread = np.asarray(prompt)
        self._start = time.perf_counter()
        self.finish: Literal["eos", "limit", "full"] | None = None
        self.prompt_tokens = len(self._unread)
        self.new_tokens = 0
        self.first_token_s = 0.0  # from the start to the first new token
        self.decode_s = 0.0  # from the first new token to the latest

    def __next__(self) -> int:
        if self.finish is None and self.new_tokens >= self._limit:
            self.finish = "limit"
        full = self._session.max_length
        if self.finish is None and self.new_tokens and full is not None and self._session.length >= full:
            self.finish = "full"
        if self.finish is not None:
            raise StopIteration
        (token,) = self._choose(self._unread, [False])
        assert token is not None
        elapsed = time.perf_counter() - self._start
        if self.new_tokens:
            self.decode_s = elapsed - self.first_token_s
        else:
            self.first_token_s = elapsed
        if token in self._eos:
            self.finish = "eos"
            raise StopIteration
        self.new_tokens += 1
        self._unread = np.array([token])
        return token

    @property
    def prompt_tokens_per_s(self) -> float:
        """Prompt tokens read per second; 0 before the first token."""
        return self.prompt_tokens / self.first_token_s if self.first_token_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens per second after the first; 0 before the second."""
        steps = self.new_tokens - 1 + (self.finish == "eos")
        return steps / self.decode_s if self.decode_s else 0.0


def generate(
    session: Session,
    prompt: Sequence[int] | np.ndarray,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    eos: Sequence[int] | None = None,
) -> Generation:
    """Continue the session with the tokens `prompt` [S], then with up to `max_new_tokens` of the model's own.

    Sampling as in `Sampling`; the default is greedy. `eos` are the tokens that end it (None: the model's own).
    Nothing is computed until the first token is asked for, which then raises InputError for an unusable prompt.
    Raises OptionError for sampling values out of range and InputError for a session of several rows.
    """
    if session.batch != 1:
        raise InputError(f"the session has {session.batch} rows; text is generated for one")
    if max_new_tokens < 0:
        raise OptionError(f"max_new_tokens is {max_new_tokens}; it must be 0 or more")
    if not len(prompt):
        raise InputError("the prompt is empty", hint="give at least one token")
    ends = session.decoder.eos if eos is None else eos
    choose = chooser(session, Sampling(temperature, top_k, top_p, seed))
    return Generation(session, prompt, max_new_tokens, choose, frozenset(ends))
