"""Sampling draws from exactly the distribution that its parameters describe."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from llmc.errors import KernelError, LlmcError, OptionError
from llmc.runtime.sampling import Sampler, Sampling, candidates

LOGITS = hnp.arrays(np.float32, st.integers(1, 400), elements=st.floats(-30, 30, width=32), unique=True)


def reference(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Probability of every token: sort everything, in float64."""
    p = np.exp(logits.astype("float64") / sampling.temperature - logits.max() / sampling.temperature)
    order = np.argsort(-logits, kind="stable")
    if sampling.top_k:
        p[order[sampling.top_k :]] = 0
    p /= p.sum()
    if sampling.top_p < 1:
        count = np.searchsorted(np.cumsum(p[order]), sampling.top_p) + 1
        p[order[count:]] = 0
    return np.asarray(p / p.sum())


@settings(deadline=None, max_examples=200)
@example(np.array([-3.2834294e-25, 0], np.float32), 1.0, 0, 0.05)  # two that weigh the same
@given(LOGITS, st.floats(0.3, 3), st.integers(0, 450), st.sampled_from([0.05, 0.3, 0.9, 0.999, 1.0]))
def test_candidates(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> None:
    sampling = Sampling(temperature, top_k, top_p)
    tokens, weights = candidates(logits, sampling)
    expected = reference(logits, sampling)
    found = np.zeros(len(logits))
    found[tokens] = weights / weights.sum(dtype="float64")
    assert len(set(tokens.tolist())) == len(tokens)
    # Rounding may move a token across the edge of the nucleus, by as much as that token weighs.
    edge = expected[expected > 0].min() if top_p < 1 else 0
    near = 1e-4 + 3 * (edge if edge < 1e-4 else 0)
    assert np.abs(np.sort(found) - np.sort(expected)).sum() <= near
    # Of tokens that weigh the same in float32 any may stand at the edge; no other that was left out weighs more.
    left = np.delete(logits, tokens)
    assert not len(left) or logits[tokens].min() >= left.max() - 1e-5


def test_nucleus_is_exact_on_round_numbers() -> None:
    logits = np.log(np.array([0.1, 0.5, 0.25, 0.15], np.float32))
    for top_p, expected in ((0.4, {1}), (0.6, {1, 2}), (0.8, {1, 2, 3}), (0.95, {0, 1, 2, 3})):
        assert set(candidates(logits, Sampling(1, 0, top_p))[0].tolist()) == expected


def test_a_flat_nucleus_needs_more_than_the_first_candidates() -> None:
    logits = np.zeros(5000, np.float32)
    assert len(candidates(logits, Sampling(1, 0, 0.5))[0]) == 2500


@pytest.mark.parametrize("sampling", [Sampling(1), Sampling(0.7, 5), Sampling(1.3, 0, 0.8), Sampling(1, 6, 0.9)])
def test_draws_follow_the_distribution(sampling: Sampling) -> None:
    from scipy.stats import chisquare

    logits = np.random.default_rng(4).standard_normal(12).astype("float32")
    sampler, n = Sampler(Sampling(sampling.temperature, sampling.top_k, sampling.top_p, seed=11)), 20_000
    counts = np.bincount([sampler(logits) for _ in range(n)], minlength=12)
    expected = reference(logits, sampling)
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    assert chisquare(counts[kept], expected[kept] * n).pvalue > 1e-3


def test_seeds() -> None:
    logits = np.zeros(1000, np.float32)

    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(1, seed=seed))
        return [sampler(logits) for _ in range(8)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(None) != draw(None)


def test_greedy_takes_the_best() -> None:
    logits = np.random.default_rng(0).standard_normal(100).astype("float32")
    assert Sampler(Sampling())(logits) == logits.argmax()
    assert Sampler(Sampling(temperature=1, top_k=1))(logits) == logits.argmax()


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_logits_are_an_error(temperature: float, bad: float) -> None:
    with pytest.raises(KernelError, match="best logit"):
        Sampler(Sampling(temperature))(np.array([1, bad, 2], np.float32))


def test_masked_logits_are_never_drawn() -> None:
    sampler = Sampler(Sampling(1, seed=0))
    assert {sampler(np.array([-np.inf, 0, -np.inf, 0], np.float32)) for _ in range(100)} == {1, 3}


@pytest.mark.parametrize(
    "values", [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}]
)
def test_impossible_values(values: dict[str, float]) -> None:
    with pytest.raises(OptionError) as error:
        Sampling(**values)  # type: ignore[arg-type]
    assert isinstance(error.value, LlmcError) and next(iter(values)) in str(error.value)
