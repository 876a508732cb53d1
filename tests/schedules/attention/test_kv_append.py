"""Rotary embedding and cache append against float64 numpy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from llmc.errors import KernelError
from llmc.schedules.attention.kv_append import KV_APPEND
from llmc.schedules.attention.reference import unpack_keys
from llmc.schedules.attention.workloads import KVAppendWorkload
from llmc.schedules.base import bind_dims
from llmc.targets.base import Target

from .harness import Run, compile_all

GQA = KVAppendWorkload(n_heads=9, n_kv_heads=3, head_dim=64)
WORKLOADS = {
    "plain": GQA,
    "past": dataclasses.replace(GQA, past=True, present=True),
    "in_place": dataclasses.replace(GQA, in_place=True),
    "interleaved": KVAppendWorkload(4, 2, 32, interleaved=True, past=True),
    "partial": KVAppendWorkload(4, 2, 80, rotary_dim=40, present=True),
    "partial_in_place": KVAppendWorkload(4, 2, 32, rotary_dim=12, interleaved=True, in_place=True, packed_qkv=False),
    "split": KVAppendWorkload(4, 4, 16, packed_qkv=False, past=True),
    "tiny": KVAppendWorkload(2, 1, 2, past=True),
    "no_rope": KVAppendWorkload(12, 12, 32, rope=False),
    "no_rope_split": KVAppendWorkload(12, 12, 32, packed_qkv=False, rope=False, past=True, present=True),
    "no_rope_in_place": KVAppendWorkload(4, 2, 32, rope=False, in_place=True),
}
LENGTHS = (1, 2, 3, 7, 31, 32, 33, 63, 64, 65, 130)


@pytest.fixture(scope="module")
def run(target: Target) -> Run:
    return compile_all({name: (KV_APPEND, w, {}) for name, w in WORKLOADS.items()}, target)


def make_inputs(w: KVAppendWorkload, dims: dict[str, int], kv_len: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(dims["S"])
    inputs = {
        arg.name: rng.standard_normal([dims[d] if isinstance(d, str) else d for d in arg.shape], dtype=np.float32)
        for arg in w.inputs()
        if arg.name != "kv_len"
    }
    if w.rope:
        angle = rng.uniform(0, 6, inputs["cos"].shape)
        inputs["cos"], inputs["sin"] = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    return inputs | ({"kv_len": np.array(kv_len)} if w.in_place else {})


def call(run: Run, name: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    w = WORKLOADS[name]
    dims = bind_dims(w.inputs(), inputs)
    dims["total"] = dims["S"] + dims.get("P", 0)
    dims["blocks"] = -(-dims["total"] // 64)
    shapes = {a.name: tuple(dims[d] if isinstance(d, str) else d for d in a.shape) for a in w.outputs()}
    return run(name, inputs, shapes)


@pytest.mark.parametrize("name", [n for n, w in WORKLOADS.items() if not w.in_place])
def test_functional_form(run: Run, name: str) -> None:
    w = WORKLOADS[name]
    for S in LENGTHS:
        for B, P in ((1, 0), (2, 5), (3, 64), (1, 127)) if w.past else ((1, 0), (3, 0)):
            inputs = make_inputs(w, {"B": B, "S": S, "P": P})
            actual, expected = call(run, name, inputs), KV_APPEND.reference(w, inputs, {})
            assert set(expected) == {a.name for a in w.outputs()}
            for key, value in expected.items():
                np.testing.assert_allclose(actual[key], value, atol=1e-6, err_msg=f"{key}, S={S}, B={B}, P={P}")


@pytest.mark.parametrize("name", [n for n, w in WORKLOADS.items() if w.in_place])
def test_in_place_form(run: Run, name: str) -> None:
    w = WORKLOADS[name]
    for S in LENGTHS:
        for kv_len in ((S,), (S + 1, S + 63, S + 64), (S + 100, 192)):
            inputs = make_inputs(w, {"B": len(kv_len), "S": S, "CB": 4, "C": 256}, kv_len)
            expected = KV_APPEND.reference(w, inputs, {})
            actual = call(run, name, inputs)
            for key, value in expected.items():
                np.testing.assert_allclose(actual[key], value, atol=1e-6, err_msg=f"{key}, S={S}, kv_len={kv_len}")


def test_left_padding_is_not_stored(run: Run) -> None:
    w = WORKLOADS["in_place"]
    inputs = make_inputs(w, {"B": 2, "S": 7, "CB": 2, "C": 128}, (3, 70))
    actual, expected = call(run, "in_place", inputs), KV_APPEND.reference(w, inputs, {})
    for key in ("kp", "v"):
        np.testing.assert_allclose(actual[key], expected[key], atol=1e-6)


def test_sequence_in_place_equals_functional_call(run: Run) -> None:
    """Tokens appended in pieces give the cache, and the queries, of one call with all of them."""
    whole = make_inputs(GQA, {"B": 2, "S": 150})
    expected = call(run, "plain", whole)
    cache = {"kp": np.zeros((2, 3, 3, 64, 64), np.float32), "v": np.zeros((2, 3, 192, 64), np.float32)}
    done, queries = 0, []
    for S in (70, 1, 1, 3, 64, 11):
        piece = {key: np.ascontiguousarray(x[:, done : done + S]) for key, x in whole.items()}
        done += S
        result = call(run, "in_place", cache | piece | {"kv_len": np.full(2, done)})
        cache = {key: result[key] for key in cache}
        queries.append(result["q"])
    np.testing.assert_array_equal(cache["kp"], expected["kp"])
    np.testing.assert_array_equal(cache["v"][:, :, :150], expected["v"])
    np.testing.assert_array_equal(np.concatenate(queries, axis=1), expected["q"])


def test_rotation_keeps_relative_angles(run: Run) -> None:
    """q(m) . k(n) depends on m - n alone: what a rotary embedding is for."""
    freq = 10000.0 ** -(np.arange(32) / 32)
    inputs = make_inputs(GQA, {"B": 1, "S": 20})
    inputs["qkv"][:] = inputs["qkv"][:, :1]
    angle = (np.arange(20)[:, None] * freq)[None]
    inputs["cos"], inputs["sin"] = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    out = call(run, "plain", inputs)
    q, k = out["q"].reshape(20, 9, 64)[:, 0], unpack_keys(out["kp"])[0, 0, :20]
    scores = q @ k.T
    for offset in (-7, 0, 4):
        np.testing.assert_allclose(np.diagonal(scores, offset), np.diagonal(scores, offset)[0], atol=2e-4)


def test_contradictions_are_refused() -> None:
    with pytest.raises(KernelError, match="in-place"):
        KVAppendWorkload(4, 2, 32, in_place=True, past=True)
    with pytest.raises(KernelError, match="rotary_dim"):
        KVAppendWorkload(4, 2, 32, rotary_dim=48)
