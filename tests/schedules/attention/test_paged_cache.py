"""Kernels on paged caches: what they compute without pages, wherever these lie and whoever shares them."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.errors import KernelError
from llmc.schedules.attention.attention import ATTENTION
from llmc.schedules.attention.kv_append import KV_APPEND
from llmc.schedules.attention.kv_format import KVCache
from llmc.schedules.attention.workloads import AttentionWorkload, KVAppendWorkload
from llmc.schedules.base import bind_dims
from llmc.targets.base import Target

from .harness import Run, compile_all

FORMATS: tuple[KVCache, ...] = ("float32", "int8", "int4")
ATTEND = {
    **{k: AttentionWorkload(9, 3, 64, 0.125, kv_cache=k, paged=True) for k in FORMATS},
    "window": AttentionWorkload(4, 2, 40, 0.15, window=70, paged=True),
    "tree": AttentionWorkload(4, 1, 7, 0.4, softcap=3.0, tree=True, paged=True),
}
APPEND = {k: KVAppendWorkload(4, 2, 40, in_place=True, kv_cache=k, paged=True) for k in FORMATS}
# (queries, lengths of the batch, leading blocks that all share)
CALLS = [
    (1, (65, 300, 64), 0),
    (1, (129, 300, 1000), 2),
    (1, tuple(range(321, 341)), 5),
    (1, (0, 70, 200), 1),
    (3, (201, 195, 700), 3),
    (4, (10, 4, 63), 0),
    (33, (97, 33), 0),
    (127, (333, 127), 0),
]


@pytest.fixture(scope="module")
def attend(target: Target) -> Run:
    return compile_all({name: (ATTENTION, w, {}) for name, w in ATTEND.items()}, target)


@pytest.fixture(scope="module")
def append(target: Target) -> Run:
    return compile_all({name: (KV_APPEND, w, {}) for name, w in APPEND.items()}, target)


@pytest.mark.parametrize("name", ATTEND)
def test_attention_matches_reference(attend: Run, name: str) -> None:
    w = ATTEND[name]
    for S, lengths, shared in CALLS:
        if w.tree and S > 64:
            continue
        dims = {"B": len(lengths), "S": S, "CB": -(-max(lengths) // 64)}
        inputs = ATTENTION.example_inputs(w, dims, np.random.default_rng(S))
        inputs["table"][:, :shared] = inputs["table"][0, :shared]
        inputs |= {"kv_len": np.array(lengths), "shared": np.array([shared])}
        expected = ATTENTION.reference(w, inputs, {})["out"]
        out = attend(name, inputs, {"out": expected.shape})["out"]
        there = np.array(lengths) > 0  # a row that pauses gives whatever it likes
        message = f"S={S}, lengths={lengths}, shared={shared}"
        np.testing.assert_allclose(out[there], expected[there], atol=5e-6, rtol=0, err_msg=message)


@pytest.mark.parametrize("name", APPEND)
@pytest.mark.parametrize("S", [1, 2, 63, 64, 65, 130])
def test_append_matches_reference(append: Run, name: str, S: int) -> None:
    """Tokens that were there stay, and so do pages of others."""
    w = APPEND[name]
    for kv_len in ((S,), (S + 1, S + 63, S + 64), (0, max(1, S - 2), min(S + 100, 256))):
        inputs = KV_APPEND.example_inputs(w, {"B": len(kv_len), "S": S, "CB": 4}, np.random.default_rng(S))
        inputs["kv_len"] = np.array(kv_len)
        expected = KV_APPEND.reference(w, inputs, {})
        dims = bind_dims(w.inputs(), inputs)
        shapes = {a.name: tuple(dims[d] if isinstance(d, str) else d for d in a.shape) for a in w.outputs()}
        actual = append(name, inputs, shapes)
        for key, value in expected.items():
            np.testing.assert_allclose(actual[key], value, atol=1e-6, err_msg=f"{key}, S={S}, kv_len={kv_len}")


def test_pages_are_appended_to_in_place_only() -> None:
    with pytest.raises(KernelError, match="in place only"):
        KVAppendWorkload(4, 2, 32, paged=True)


def test_keys_of_older_workloads_stay() -> None:
    """Records of what was tuned before there were pages still count."""
    assert "paged" not in AttentionWorkload(4, 2, 32, 0.1).key() + KVAppendWorkload(4, 2, 32, in_place=True).key()
    assert "paged=True" in ATTEND["int8"].key()
