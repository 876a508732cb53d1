"""Attention kernels against float64 numpy."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from llmc.errors import KernelError
from llmc.schedules.attention.attention import ATTENTION
from llmc.schedules.attention.layout import pack_keys, vectors
from llmc.schedules.attention.reference import unpack_keys
from llmc.schedules.attention.workloads import AttentionWorkload
from llmc.targets.base import Target
from llmc.targets.x86 import TARGETS

from .harness import Run, compile_all

CAUSAL = AttentionWorkload(n_heads=9, n_kv_heads=3, head_dim=64, scale=0.125)
ENCODER = AttentionWorkload(n_heads=12, n_kv_heads=12, head_dim=32, scale=0.2, causal=False, key_bias=True)
FULL_BIAS = {"bias": True, "bias_batch": True, "bias_heads": True, "bias_rows": True}
WORKLOADS = {
    "causal": CAUSAL,
    "encoder": ENCODER,
    "d16": AttentionWorkload(4, 1, 16, 0.25),
    "d80": AttentionWorkload(4, 2, 80, 0.1),
    "d128": AttentionWorkload(8, 8, 128, 0.08),
    "d6": AttentionWorkload(3, 1, 6, 0.4),
    "mqa": AttentionWorkload(14, 1, 16, 0.25, window=40),
    "window": dataclasses.replace(CAUSAL, window=33),
    "window_both": AttentionWorkload(4, 2, 32, 0.2, causal=False, window=50),
    "softcap": dataclasses.replace(CAUSAL, softcap=3.0, window=70),
    "bias": AttentionWorkload(4, 2, 32, 0.2, causal=False, **FULL_BIAS),
    "bias_one": AttentionWorkload(4, 4, 32, 0.2, causal=False, bias=True, q_packed=True),
    "both": AttentionWorkload(4, 2, 32, 0.2, key_bias=True, bias=True, bias_heads=True, softcap=20.0),
}
# Other tiles than the default's, on the same workloads: a tuner may choose any.
TUNED = {
    "causal/tuned": ("causal", {"BQ": 64, "MR": 4, "NR": 1, "chunk": 8, "serial_kib": 256}),
}
# (queries, lengths of the batch)
CALLS = [
    (1, (1,)),
    (1, (65, 300, 64)),
    (2, (2, 130)),
    (3, (200,)),
    (4, (10, 4, 64)),
    (5, (5,)),
    (7, (7, 71)),
    (31, (31,)),
    (32, (32, 40)),
    (33, (97, 33)),
    (64, (64,)),
    (65, (65, 80)),
    (130, (130,)),
    (130, (333, 130)),
]


@pytest.fixture(scope="module")
def run(target: Target) -> Run:
    kernels = {name: (ATTENTION, w, {}) for name, w in WORKLOADS.items()}
    kernels |= {name: (ATTENTION, WORKLOADS[base], changes) for name, (base, changes) in TUNED.items()}
    return compile_all(kernels, target)


def make_inputs(w: AttentionWorkload, S: int, lengths: tuple[int, ...], size: float = 1.0) -> dict[str, np.ndarray]:
    """Random inputs; what no query may see (keys and values beyond the lengths) is NaN."""
    rng = np.random.default_rng(S)
    B, C = len(lengths), max(lengths)
    draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32)  # noqa: E731
    heads = w.n_heads + 2 * w.n_kv_heads if w.q_packed else w.n_heads
    k, v = draw(B, w.n_kv_heads, C, w.head_dim), draw(B, w.n_kv_heads, C, w.head_dim)
    kp = pack_keys(k)
    keys = unpack_keys(kp)
    for b, length in enumerate(lengths):
        keys[b, :, length:] = np.nan
        v[b, :, length:] = np.nan
    inputs = {
        "q": draw(B, S, heads * w.head_dim) * np.float32(size),
        "kp": pack_keys(keys),
        "v": v,
        "kv_len": np.array(lengths),
        "key_bias": np.where(rng.random((B, C)) < 0.3, -np.inf, draw(B, C)).astype(np.float32),
    }
    full = (w.bias_batch, w.bias_heads, w.bias_rows)
    inputs["bias"] = draw(*(n if f else 1 for n, f in zip((B, w.n_heads, S), full, strict=True)), C)
    return inputs


def check(run: Run, name: str, w: AttentionWorkload, inputs: dict[str, np.ndarray], tolerance: float = 5e-6) -> None:
    B, S = inputs["q"].shape[:2]
    out = run(name, inputs, {"out": (B, S, w.n_heads * w.head_dim)})["out"]
    expected = ATTENTION.reference(w, inputs, {})["out"]
    np.testing.assert_allclose(out, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", [*WORKLOADS, *TUNED])
def test_matches_reference(run: Run, name: str) -> None:
    w = WORKLOADS[TUNED[name][0] if name in TUNED else name]
    for S, lengths in CALLS:
        check(run, name, w, make_inputs(w, S, lengths))


@pytest.mark.parametrize("S", [1, 70])
def test_large_scores_stay_stable(run: Run, S: int) -> None:
    """Scores of ±1000: exp without the running maximum would overflow."""
    inputs = make_inputs(CAUSAL, S, (300,), size=1000.0)
    assert np.abs(inputs["q"]).max() > 1000
    # The weights are nearly one-hot: an error of 1e-4 in a score of 1000 (float32) moves them by as much.
    check(run, "causal", CAUSAL, inputs, tolerance=2e-3)


@pytest.mark.parametrize("S", [2, 40])
@pytest.mark.parametrize("masked", [-np.inf, np.finfo(np.float32).min])
def test_rows_that_see_nothing_are_zero(run: Run, S: int, masked: float) -> None:
    inputs = make_inputs(ENCODER, S, (150, 70))
    inputs["key_bias"][0] = masked
    out = run("encoder", inputs, {"out": inputs["q"].shape})["out"]
    assert not out[0].any()
    assert np.isfinite(out[1]).all() and out[1].any()


@pytest.mark.parametrize("S", [3, 40])
def test_left_padding_is_zero(run: Run, S: int) -> None:
    """Queries at negative positions see no key."""
    inputs = make_inputs(CAUSAL, S, (S - 2, S))
    out = run("causal", inputs, {"out": inputs["q"].shape})["out"]
    assert not out[0, :2].any()
    np.testing.assert_allclose(out, ATTENTION.reference(CAUSAL, inputs, {})["out"], atol=5e-6)


def test_reference_equals_plain_softmax() -> None:
    """The reference itself, on the case that numpy says in three lines."""
    inputs = make_inputs(CAUSAL, 5, (5,))
    q = inputs["q"].reshape(5, 9, 64).swapaxes(0, 1).astype(np.float64)
    k, v = (np.repeat(x[0, :, :5], 3, axis=0).astype(np.float64) for x in (unpack_keys(inputs["kp"]), inputs["v"]))
    scores = q @ k.swapaxes(1, 2) / 8 + np.triu(np.full((5, 5), -np.inf), 1)
    p = np.exp(scores)
    expected = (p / p.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(1, 5, 576)
    np.testing.assert_allclose(ATTENTION.reference(CAUSAL, inputs, {})["out"], expected, atol=1e-12)


@pytest.mark.parametrize(("n", "lanes"), list(itertools.product((2, 3, 6, 8, 16, 40, 64, 72, 80), (8, 16))))
def test_vectors_cover_every_column_and_no_more(n: int, lanes: int) -> None:
    width, starts = vectors(n, lanes)
    assert {c + i for c in starts for i in range(width)} == set(range(n))


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_default_is_in_the_space(name: str) -> None:
    for w in WORKLOADS.values():
        assert ATTENTION.default(w, TARGETS[name]) in ATTENTION.space(w, TARGETS[name])


def test_unequal_groups_are_refused() -> None:
    with pytest.raises(KernelError, match="cannot share"):
        AttentionWorkload(9, 2, 64, 0.125)


def test_work_counts_only_what_is_seen() -> None:
    dims = {"B": 1, "S": 4, "CB": 1, "C": 4}
    assert ATTENTION.work(CAUSAL, dims).ops == 4 * 9 * 64 * (1 + 2 + 3 + 4)
