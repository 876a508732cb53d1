"""What bench and check ask of an engine."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping

import numpy as np

from llmc.errors import OptionError

ROOM = 2048  # tokens of a sequence for which room is made where nobody says how many will come
_CHUNK = 512  # tokens of a prompt read at once while nobody measures: bounds the memory of logits and attention scores


class Engine(ABC):
    """A loaded model. A language model holds one or more sequences of equal length, which `step` continues."""

    inputs: Collection[str] = ()  # names of the plain signature, where the engine has one
    outputs: Collection[str] = ()

    def call(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The model's plain signature: named inputs to named outputs."""
        raise OptionError(f"{type(self).__name__} serves language models only", where="--against")

    @abstractmethod
    def reset(self, batch: int = 1, room: int = ROOM) -> None:
        """Forget all, and begin `batch` sequences of no more than `room` tokens each."""

    @abstractmethod
    def step(self, ids: np.ndarray) -> np.ndarray:
        """Append tokens, int64 [B, S], to the sequences; float32 logits [B, S, vocabulary] of all of them.

        The next step may overwrite them.
        """

    def read(self, ids: np.ndarray) -> None:
        """Append a prompt, int64 [B, S], and choose the likeliest token after it, logits of every position included."""
        self._next = self.step(ids)[:, -1:].argmax(-1)

    def decode(self, n: int) -> None:
        """Continue the sequences by `n` steps of one token each, the likeliest after the last."""
        for _ in range(n):
            self._next = self.step(self._next)[:, -1:].argmax(-1)

    def measure(self, prompt: np.ndarray, decode: int = 0) -> float:
        """Seconds to read `prompt`, int64 [B, S], from nothing; if `decode` is not 0, those of so many steps after it.

        Raises what `reset` and `step` raise.
        """
        batch, length = prompt.shape
        self.reset(batch, length + decode)
        if not decode:
            started = time.perf_counter()
            self.read(prompt)
            return time.perf_counter() - started
        # onnxruntime's GroupQueryAttention refuses several tokens after a past in a batch: batches are read at once.
        chunk = _CHUNK if batch == 1 else length
        for start in range(0, length, chunk):
            self.read(prompt[:, start : start + chunk])
        started = time.perf_counter()
        self.decode(decode)
        return time.perf_counter() - started


def decoder_inputs(ids: np.ndarray, past: int) -> dict[str, np.ndarray]:
    """The usual inputs of an exported decoder, for `ids` [B, S] after `past` tokens."""
    batch, end = len(ids), past + ids.shape[1]
    return {
        "input_ids": ids,
        "attention_mask": np.ones((batch, end), np.int64),
        "position_ids": np.tile(np.arange(past, end, dtype=np.int64), (batch, 1)),
    }
