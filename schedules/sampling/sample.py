"""What a sampling kernel computes: one token a row of logits, by the rules of `llmc.runtime.sampling`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from llmc.schedules.base import Arg, Arrays, Workload

ONE = 2.0**40  # the best token's weight: weights are integers, whose sums are the same in any order
MOST_TOKENS = 1 << 23  # of which the sum of weights fits into 63 bits


@dataclass(frozen=True)
class SampleWorkload(Workload):
    """logits [R, V] float32, and for each row temperature float32, top_k int64, top_p float32, uniform float32 in
    [0, 1) -> token [R] int64.

    Temperature 0 takes the largest logit, of equals the first. Otherwise a token's weight is
    exp((logit - largest) / temperature). Only the top_k largest logits stay (0: all), and of these the fewest whose
    weights add up to at least top_p of the sum; of equal logits the first ones. The token is the first whose weight,
    added to those of the tokens with lower numbers, exceeds `uniform` of the sum. A row whose largest logit is not
    finite, or which holds NaN, gives -1.

    The sampler on the host orders candidates otherwise: it draws other tokens, from the same distribution.
    """

    V: int

    def inputs(self) -> tuple[Arg, ...]:
        of_row = (("temperature", "float32"), ("top_k", "int64"), ("top_p", "float32"), ("uniform", "float32"))
        return (Arg("logits", ("R", self.V), "float32"), *(Arg(name, ("R",), dtype) for name, dtype in of_row))

    def outputs(self) -> tuple[Arg, ...]:
        return (Arg("token", ("R",), "int64"),)


def reference(inputs: Mapping[str, np.ndarray]) -> Arrays:
    """By sorting. Weights in float32, rounded down to multiples of 1 / ONE, as kernels make them."""
    rows = zip(*(inputs[name] for name in ("logits", "temperature", "top_k", "top_p", "uniform")), strict=True)
    return {"token": np.array([_token(*row) for row in rows], np.int64)}


def _token(logits: np.ndarray, temperature: np.float32, top_k: np.int64, top_p: np.float32, uniform: np.float32) -> int:
    best = logits.max()
    if not np.isfinite(best):
        return -1
    if temperature == 0:
        return int(logits.argmax())
    tokens = np.argsort(-logits, kind="stable")
    if 0 < top_k < len(logits):
        tokens = tokens[:top_k]
    weights = (np.exp((logits - best) / temperature) * np.float32(ONE)).astype(np.int64)
    if top_p < 1:
        sums = np.cumsum(weights[tokens])
        wanted = min(max(int(np.ceil(float(top_p) * float(sums[-1]))), 1), int(sums[-1]))
        tokens = tokens[: np.searchsorted(sums, wanted) + 1]
    tokens = np.sort(tokens)
    sums = np.cumsum(weights[tokens])
    wanted = min(int(float(uniform) * float(sums[-1])), int(sums[-1]) - 1)
    return int(tokens[np.searchsorted(sums, wanted, side="right")])
