"""Kernels on rounded caches: codes equal the reference's, attention over them is as exact as over float32."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from llmc.schedules.attention.attention import ATTENTION
from llmc.schedules.attention.examples import rounded_cache
from llmc.schedules.attention.kv_append import KV_APPEND
from llmc.schedules.attention.kv_format import KVCache
from llmc.schedules.attention.reference import cached
from llmc.schedules.attention.workloads import AttentionWorkload, KVAppendWorkload
from llmc.schedules.base import bind_dims
from llmc.targets.base import Target

from .harness import Run, compile_all

FORMATS: tuple[KVCache, ...] = ("int8", "fp8", "int4")
ATTEND = {
    "gqa": AttentionWorkload(9, 3, 64, 0.125),
    "mha": AttentionWorkload(4, 4, 32, 0.2, causal=False, key_bias=True, window=50),
    "d128": AttentionWorkload(4, 2, 128, 0.08, softcap=3.0, window=70),
    "d40": AttentionWorkload(4, 1, 40, 0.15, bias=True, bias_heads=True),
    "d7": AttentionWorkload(3, 1, 7, 0.4),
}
APPEND = {
    "gqa": KVAppendWorkload(9, 3, 64, in_place=True),
    "partial": KVAppendWorkload(4, 2, 40, rotary_dim=12, interleaved=True, in_place=True, packed_qkv=False),
    "d7": KVAppendWorkload(3, 1, 7, rope=False, in_place=True),
}
# (queries, lengths of the batch)
CALLS = [
    (1, (1,)),
    (1, (65, 300, 64)),
    (2, (2, 130)),
    (4, (10, 4, 63)),
    (5, (5,)),
    (31, (31,)),
    (32, (32, 40)),
    (33, (97, 33)),
    (127, (333, 127)),
]


def of_both(workloads: dict[str, Any]) -> dict[str, Any]:
    """fp8 differs from int8 in its codes alone: whole vectors of them, and tails."""
    return {
        f"{name}/{kind}": dataclasses.replace(w, kv_cache=kind)
        for name, w in workloads.items()
        for kind in FORMATS
        if kind != "fp8" or name in ("gqa", "d7")
    }


ATTENDS, APPENDS = of_both(ATTEND), of_both(APPEND)


@pytest.fixture(scope="module")
def attend(target: Target) -> Run:
    return compile_all({name: (ATTENTION, w, {}) for name, w in ATTENDS.items()}, target)


@pytest.fixture(scope="module")
def append(target: Target) -> Run:
    return compile_all({name: (KV_APPEND, w, {}) for name, w in APPENDS.items()}, target)


@pytest.mark.parametrize("name", ATTENDS)
def test_attention_matches_reference(attend: Run, name: str) -> None:
    w = ATTENDS[name]
    for S, lengths in CALLS:
        rng = np.random.default_rng(S)
        longest = max(lengths)
        dims = {"B": len(lengths), "S": S, "CB": -(-longest // 64), "T": longest}
        inputs = ATTENTION.example_inputs(w, dims, rng) | {"kv_len": np.array(lengths)}
        for b, length in enumerate(lengths):  # what no query may see
            planes = inputs["planes"][b].swapaxes(1, 2).reshape(w.n_kv_heads, -1, dims["CB"] * 64)
            planes[..., length:] = np.nan
            inputs["planes"][b] = planes.reshape(w.n_kv_heads, -1, dims["CB"], 64).swapaxes(1, 2)
        seen = {key: np.nan_to_num(x) if key == "planes" else x for key, x in inputs.items()}
        expected = ATTENTION.reference(w, seen, {})["out"]
        out = attend(name, inputs, {"out": expected.shape})["out"]
        np.testing.assert_allclose(out, expected, atol=5e-6, rtol=0, err_msg=f"S={S}, lengths={lengths}")


def append_inputs(w: KVAppendWorkload, S: int, kv_len: tuple[int, ...], CB: int = 4) -> dict[str, np.ndarray]:
    """Onto a cache that is full of other tokens."""
    rng, B = np.random.default_rng(S), len(kv_len)
    attend = AttentionWorkload(w.n_heads, w.n_kv_heads, w.head_dim, 1.0, kv_cache=w.kv_cache)
    inputs = KV_APPEND.example_inputs(w, {"B": B, "S": S, "CB": CB}, rng)
    return inputs | rounded_cache(attend, {"B": B, "CB": CB}, rng) | {"kv_len": np.array(kv_len)}


def appended(run: Run, name: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    w = APPENDS[name]
    dims = bind_dims(w.inputs(), inputs)
    shapes = {a.name: tuple(dims[d] if isinstance(d, str) else d for d in a.shape) for a in w.outputs()}
    return run(name, inputs, shapes)


@pytest.mark.parametrize("name", APPENDS)
@pytest.mark.parametrize("S", [1, 2, 31, 32, 33, 63, 64, 65, 130])
def test_append_rounds_as_the_reference(append: Run, name: str, S: int) -> None:
    """Codes and scales, bit by bit; the tokens that were there stay."""
    w = APPENDS[name]
    for kv_len in ((S,), (S + 1, S + 63, S + 64), (max(1, S - 2), min(S + 100, 256))):
        inputs = append_inputs(w, S, kv_len)
        expected, actual = KV_APPEND.reference(w, inputs, {}), appended(append, name, inputs)
        for key, value in expected.items():
            np.testing.assert_array_equal(actual[key], value, err_msg=f"{key}, S={S}, kv_len={kv_len}")


@pytest.mark.parametrize("name", APPENDS)
def test_any_numbers_are_rounded_to_one_of_the_two_nearest(append: Run, name: str) -> None:
    """With random angles, whose products are rounded before the codes are."""
    w, S, rng = APPENDS[name], 70, np.random.default_rng(0)
    inputs = append_inputs(w, S, (S, S + 9))
    angle = rng.uniform(0, 6, (2, S, w.rotary // 2))
    for key in inputs.keys() & {"qkv", "q_in", "k_in", "v_in"}:
        inputs[key] = rng.standard_normal(inputs[key].shape, np.float32)
    if w.rope:
        inputs |= {"cos": np.cos(angle).astype(np.float32), "sin": np.sin(angle).astype(np.float32)}
    got, want = (
        cached(w.kv_cache, inputs | result)
        for result in (appended(append, name, inputs), KV_APPEND.reference(w, inputs, {}))
    )
    for x, y in zip(got, want, strict=True):
        error = np.abs(x - y)
        assert error.max() <= {"int8": 0.05, "fp8": 0.5, "int4": 0.7}[w.kv_cache]  # one step
        assert (error > 1e-5).mean() < 1e-3


@pytest.mark.parametrize("name", [n for n in APPENDS if n.startswith("gqa")])
def test_pieces_equal_one_call(append: Run, name: str) -> None:
    w, total = APPENDS[name], 150
    whole = append_inputs(w, total, (total, total), CB=3)
    expected = appended(append, name, whole)
    cache = {key: whole[key] for key in ("kp", "v", "planes")}
    done, queries = 0, []
    for S in (70, 1, 1, 3, 64, 11):
        piece = {key: np.ascontiguousarray(whole[key][:, done : done + S]) for key in ("qkv", "cos", "sin")}
        done += S
        result = appended(append, name, cache | piece | {"kv_len": np.full(2, done)})
        cache = {key: result[key] for key in cache}
        queries.append(result["q"])
    for key, x in cache.items():
        np.testing.assert_array_equal(x, expected[key])
    np.testing.assert_array_equal(np.concatenate(queries, axis=1), expected["q"])
