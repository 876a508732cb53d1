"""What bench and check ask of an engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping

import numpy as np

from llmc.errors import OptionError


class Engine(ABC):
    """A loaded model. A language model holds one sequence, which `step` continues."""

    inputs: Collection[str] = ()  # names of the plain signature, where the engine has one
    outputs: Collection[str] = ()

    def call(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The model's plain signature: named inputs to named outputs."""
        raise OptionError(f"{type(self).__name__} serves language models only", where="--against")

    @abstractmethod
    def reset(self) -> None:
        """Forget the sequence."""

    @abstractmethod
    def step(self, ids: np.ndarray) -> np.ndarray:
        """Append tokens, int64 [S], to the sequence; float32 logits [S, vocabulary] of all of them."""

    def prefill(self, ids: np.ndarray) -> None:
        """Start a sequence with `ids`, logits of every position included."""
        self.reset()
        self._next = int(self.step(ids)[-1].argmax())

    def decode(self, n: int) -> None:
        """Continue the sequence by `n` steps of one token, each the likeliest after the last."""
        for _ in range(n):
            self._next = int(self.step(np.array([self._next], np.int64))[-1].argmax())


def decoder_inputs(ids: np.ndarray, past: int) -> dict[str, np.ndarray]:
    """The usual inputs of an exported decoder, batch 1, for `ids` after `past` tokens."""
    end = past + len(ids)
    return {
        "input_ids": ids[None],
        "attention_mask": np.ones((1, end), np.int64),
        "position_ids": np.arange(past, end, dtype=np.int64)[None],
    }
