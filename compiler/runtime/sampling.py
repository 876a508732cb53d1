"""Choosing the next token from logits: greedy, or a draw from the softmax cut to its top k or top p."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmc.errors import KernelError, OptionError

_FIRST_CANDIDATES = 64  # enough for top_p on most steps: sorting a whole vocabulary costs more than a small model


@dataclass(frozen=True)
class Sampling:
    """How to choose. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 keep every token.

    The logits are divided by the temperature, cut to the `top_k` largest, and of those the smallest set is kept whose
    probabilities add up to at least `top_p` (nucleus sampling, Holtzman et al., https://arxiv.org/abs/1904.09751).
    Equal `seed`s give equal choices; None draws a fresh one. Raises OptionError for values out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise OptionError(f"temperature is {self.temperature}; it must be 0 or more")
        if self.top_k < 0:
            raise OptionError(f"top_k is {self.top_k}; it must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise OptionError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.seed is not None and self.seed < 0:
            raise OptionError(f"seed is {self.seed}; it must be 0 or more")


class Sampler:
    """Draws tokens by one `Sampling`; holds the random state."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    def __call__(self, logits: np.ndarray) -> int:
        """The chosen index into `logits` [V]. Raises KernelError if the best logit is not a finite number."""
        best = int(logits.argmax())
        if not np.isfinite(logits[best]):
            raise not_finite(f"the model's best logit is {logits[best]}")
        if self.sampling.temperature == 0:
            return best
        tokens, weights = candidates(logits, self.sampling)
        cumulative = np.cumsum(weights, dtype=np.float64)
        drawn = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
        return int(tokens[min(int(drawn), len(tokens) - 1)])


def not_finite(what: str) -> KernelError:
    """What is raised where there is nothing to choose from."""
    return KernelError(what, hint="run llmc check to find where it goes wrong")


def candidates(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that may be drawn [C], and their unnormalised probabilities [C] (the best token's is 1)."""
    weights = np.exp((logits - logits.max()) / np.float32(sampling.temperature))
    tokens = np.arange(len(logits))
    if 0 < sampling.top_k < len(logits):
        tokens = np.argpartition(logits, -sampling.top_k)[-sampling.top_k :]
        weights = weights[tokens]
    if sampling.top_p < 1:
        kept = _nucleus(weights, sampling.top_p)
        tokens, weights = tokens[kept], weights[kept]
    return tokens, weights


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Indices of the fewest weights that hold at least `top_p` of the sum; only as many are sorted as needed."""
    wanted = top_p * weights.sum(dtype=np.float64)
    count = min(_FIRST_CANDIDATES, len(weights))
    while True:
        largest = np.argpartition(weights, -count)[-count:]
        if count == len(weights) or weights[largest].sum(dtype=np.float64) >= wanted:
            break
        count = min(8 * count, len(weights))
    order = largest[np.argsort(-weights[largest], kind="stable")]
    needed = np.searchsorted(np.cumsum(weights[order], dtype=np.float64), wanted) + 1
    return order[:needed]
