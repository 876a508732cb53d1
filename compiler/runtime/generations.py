"""Generating several texts at once: a row of a session each, so that a step reads the weights once for all of them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from llmc.errors import InputError, OptionError
from llmc.runtime.choosing import Chooser, chooser
from llmc.runtime.sampling import Sampling
from llmc.runtime.session import Session


class Generations(Iterator[list[int | None]]):
    """The next token of every row, step by step; None for a row that has ended.

    `finish` says of each row why it ended, as `Generation.finish` does. The figures are those so far, of all rows.
    """

    def __init__(
        self,
        session: Session,
        prompts: Sequence[Sequence[int] | np.ndarray],
        limit: int,
        choose: Chooser,
        eos: frozenset[int],
    ) -> None:
        self._session, self._choose, self._limit, self._eos = session, choose, limit, eos
        self._unread = [np.asarray(prompt) for prompt in prompts]
        self._start = time.perf_counter()
        self.finish: list[Literal["eos", "limit", "full"] | None] = [None] * len(prompts)
        self.prompt_tokens = sum(map(len, prompts))
        self.new_tokens = [0] * len(prompts)
        self.first_token_s = 0.0  # from the start to the first tokens
        self.decode_s = 0.0  # from the first tokens to the latest

    def __next__(self) -> list[int | None]:
        full = self._session.max_length
        for b, length in enumerate(self._session.lengths):
            if self.finish[b] is None and self.new_tokens[b] >= self._limit:
                self.finish[b] = "limit"
            if self.finish[b] is None and self.new_tokens[b] and full is not None and length >= full:
                self.finish[b] = "full"
        unread: list[Sequence[int] | np.ndarray] = [
            [] if ended else ids for ids, ended in zip(self._unread, self.finish, strict=True)
        ]
        if all(self.finish):
            raise StopIteration
        found = self._choose(unread, [why is not None for why in self.finish])
        elapsed = time.perf_counter() - self._start
        if self.first_token_s:
            self.decode_s = elapsed - self.first_token_s
        else:
            self.first_token_s = elapsed
        for b, token in enumerate(found):
            if token in self._eos:
                self.finish[b], found[b] = "eos", None
            elif token is not None:
                self.new_tokens[b] += 1
                self._unread[b] = np.array([token])
        return found

    @property
    def prompt_tokens_per_s(self) -> float:
        """Prompt tokens of all rows read per second; 0 before the first token."""
        return self.prompt_tokens / self.first_token_s if self.first_token_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens of all rows per second after the first ones; 0 before the second."""
        steps = sum(n - 1 + (why == "eos") for n, why in zip(self.new_tokens, self.finish, strict=True))
        return steps / self.decode_s if self.decode_s else 0.0


def generate_all(
    session: Session,
    prompts: Sequence[Sequence[int] | np.ndarray],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    eos: Sequence[int] | None = None,
) -> Generations:
    """Continue each row of the session with its prompt, then with up to `max_new_tokens` of the model's own.

    Options as `generate` has them. Every row draws as it would alone, with the same `seed`.
    Raises OptionError for values out of range, and InputError where prompts are not one for each row, or one is empty.
    """
    if len(prompts) != session.batch:
        raise InputError(f"there are {len(prompts)} prompts for a session of {session.batch} rows")
    if max_new_tokens < 0:
        raise OptionError(f"max_new_tokens is {max_new_tokens}; it must be 0 or more")
    for b, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError("the prompt is empty", where=f"prompt {b + 1}", hint="give at least one token")
    ends = session.decoder.eos if eos is None else eos
    choose = chooser(session, Sampling(temperature, top_k, top_p, seed))
    return Generations(session, prompts, max_new_tokens, choose, frozenset(ends))
