"""Masks that are compiled into attention, against float64 numpy: alibi, sinks, prefix, documents, trees."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from llmc.errors import KernelError
from llmc.schedules.attention.attention import ATTENTION
from llmc.schedules.attention.reference import attention
from llmc.schedules.attention.workloads import AttentionWorkload
from llmc.targets.base import Target

from .harness import compile_all

CAUSAL = AttentionWorkload(n_heads=6, n_kv_heads=2, head_dim=32, scale=0.2)
MASKS = {
    "sinks": dataclasses.replace(CAUSAL, window=33, sinks=4, alibi=True),
    "prefix": dataclasses.replace(CAUSAL, prefix=True, alibi=True),
    "documents": dataclasses.replace(CAUSAL, documents=True),
    "tree": dataclasses.replace(CAUSAL, tree=True, kv_cache="int8"),
}
MORE = {
    "alibi": dataclasses.replace(CAUSAL, alibi=True),
    "alibi_both_ways": AttentionWorkload(4, 2, 32, 0.2, causal=False, alibi=True, softcap=20.0, bias=True),
    "sinks_many": AttentionWorkload(4, 2, 32, 0.2, window=20, sinks=70, key_bias=True),
    "sinks_both_ways": AttentionWorkload(3, 1, 16, 0.2, causal=False, window=70, sinks=5, kv_cache="int4"),
    "prefix_int8": AttentionWorkload(4, 4, 64, 0.125, prefix=True, kv_cache="int8"),
    "documents_both_ways": AttentionWorkload(4, 1, 32, 0.2, causal=False, documents=True, key_bias=True),
    "documents_window": AttentionWorkload(4, 2, 32, 0.2, documents=True, alibi=True, window=50),
    "tree": AttentionWorkload(4, 4, 80, 0.1, tree=True, softcap=3.0, bias=True),
}
# (queries, lengths of the batch): less, as many, and more keys than blocks, and than queries.
CALLS = [
    (1, (1,)),
    (1, (65, 300, 64)),
    (3, (200, 2)),
    (4, (10, 4, 64)),
    (5, (5, 127)),
    (31, (31, 95)),
    (64, (64, 128, 70, 40)),
    (65, (65, 80)),
    (130, (333, 130)),
]


def inputs_of(w: AttentionWorkload, S: int, lengths: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Random inputs, random masks among them."""
    rng, B, C = np.random.default_rng(S), len(lengths), max(lengths)
    inputs = ATTENTION.example_inputs(w, {"B": B, "S": S, "CB": -(-C // 64), "C": C, "T": C}, rng)
    inputs["kv_len"] = np.array(lengths)
    if w.alibi:  # scores of a hundred would themselves be rounded by 1e-5
        inputs["slopes"] = rng.uniform(0, 0.7 if w.causal and not w.prefix else 0.03, w.n_heads).astype(np.float32)
    if w.prefix:
        inputs["prefix_len"] = rng.integers(0, C + 2, B)
    if w.documents:
        inputs["documents"] = np.sort(rng.integers(-1, 1 + C // 40, (B, C)))
        inputs["documents"][0] = inputs["documents"][0, ::-1]
    if w.tree:
        inputs["tree"] = random_trees(rng, B, S)
    return inputs


def random_trees(rng: np.random.Generator, B: int, S: int) -> np.ndarray:
    """uint64 [B, S]: each token sees itself and what one of those before it sees; no more than 64 have a bit."""
    masks = np.zeros((B, S), np.uint64)
    for b in range(B):
        for i in range(S):
            parent = masks[b, rng.integers(0, i)] if i else np.uint64(0)
            masks[b, i] = parent | np.uint64(1 << i if i < 64 else 0)
    return masks


def compare(w: AttentionWorkload, target: Target) -> None:
    run = compile_all({"kernel": (ATTENTION, w, {})}, target)
    for S, lengths in CALLS:
        inputs = inputs_of(w, S, lengths)
        expected = attention(w, inputs)["out"]
        out = run("kernel", inputs, {"out": expected.shape})["out"]
        np.testing.assert_allclose(out, expected, atol=5e-6, rtol=0, err_msg=f"S={S}, lengths={lengths}")


@pytest.mark.parametrize("name", MASKS)
def test_matches_reference(target: Target, name: str) -> None:
    compare(MASKS[name], target)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_more_match_reference(target: Target, name: str) -> None:
    compare(MORE[name], target)


@pytest.mark.parametrize("w", [*MASKS.values(), *MORE.values()], ids=[*MASKS, *(f"more_{name}" for name in MORE)])
@pytest.mark.parametrize(("S", "C"), [(1, 250), (4, 250), (60, 60), (60, 190)])
def test_work_counts_what_the_reference_sees(w: AttentionWorkload, S: int, C: int) -> None:
    """With equal scores and the identity as values, what comes out of a key is not zero where it is seen."""
    w = dataclasses.replace(w, kv_cache="float32", head_dim=C, key_bias=False, bias=False)
    dims = {"B": 1, "S": S, "CB": -(-C // 64), "C": C, "T": C}
    inputs = ATTENTION.example_inputs(w, dims, np.random.default_rng(0))
    inputs |= {"q": np.zeros_like(inputs["q"]), "slopes": np.zeros(w.n_heads, np.float32)}
    inputs["v"] = np.broadcast_to(np.eye(C, dtype=np.float32), inputs["v"].shape)
    seen = np.count_nonzero(attention(w, inputs)["out"][..., :C])
    assert ATTENTION.work(w, dims).ops == 4 * w.n_heads * C * seen


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"sinks": 4}, "without a window"),
        ({"prefix": True, "window": 9}, "a prefix is what a causal mask"),
        ({"prefix": True, "causal": False}, "a prefix is what a causal mask"),
        ({"tree": True, "window": 9}, "takes the place of the causal mask"),
        ({"tree": True, "causal": False}, "takes the place of the causal mask"),
    ],
)
def test_masks_that_contradict_each_other_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(KernelError, match=said):
        dataclasses.replace(CAUSAL, **fields)


def test_younger_fields_leave_older_keys_as_they_were() -> None:
    """Records of the tuning database are found by them."""
    older = "bias=False,bias_batch=False,bias_heads=False,bias_rows=False,causal=True,head_dim=32,key_bias=False"
    older += ",n_heads=6,n_kv_heads=2,q_packed=False,scale=0.2,softcap=0.0,window=0"
    assert CAUSAL.key() == f"AttentionWorkload({older})"
    assert len({CAUSAL.key(), *(w.key() for w in (*MASKS.values(), *MORE.values()))}) == 1 + len(MASKS) + len(MORE)
