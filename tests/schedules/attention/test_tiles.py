"""Attention on AMX tiles: what rounding to bfloat16 allows, bit for bit what tiles compute, and they did it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from llmc.schedules.attention.attention import ATTENTION
from llmc.schedules.attention.examples import attention_inputs
from llmc.schedules.attention.flash import LOG2E
from llmc.schedules.attention.reference import cached
from llmc.schedules.attention.tile_flash import LEAST_DIM
from llmc.schedules.attention.workloads import AttentionWorkload
from llmc.schedules.gemm.bf16_packing import from_bf16, round_to_bf16
from llmc.targets.detect import machine
from llmc.targets.intrinsics import _TWO_TO_F
from llmc.targets.x86 import AMX, AVX2, AVX512
from llmc.tune.features_attention import attention as attention_features
from tests import amx_emulator

from .harness import Run, compile_all
from .test_attention import make_inputs

CAUSAL = AttentionWorkload(6, 2, 64, 0.125, bf16=True)
WORKLOADS = {
    "causal": CAUSAL,
    "d40": AttentionWorkload(4, 2, 40, 0.15, softcap=3.0, window=33, sinks=5, bf16=True),
    "d18": AttentionWorkload(2, 2, 18, 0.2, causal=False, key_bias=True, bias=True, bias_heads=True, bf16=True),
    "int8": AttentionWorkload(4, 1, 32, 0.2, alibi=True, kv_cache="int8", bf16=True),
    "int4": dataclasses.replace(CAUSAL, kv_cache="int4"),
    "prefix": AttentionWorkload(3, 1, 33, 0.2, prefix=True, bf16=True),
    "tree": AttentionWorkload(4, 2, 16, 0.2, tree=True, bf16=True),
    "documents": AttentionWorkload(4, 4, 128, 0.08, documents=True, bf16=True),
}
FAST = ("causal", "d40", "d18")
# (queries, lengths of the batch): one row of a tile and several tiles, one block of keys and several, tails of both
CALLS = ((5, (5,)), (17, (97, 17)), (33, (130,)), (50, (50, 64)))


def compiled(names: tuple[str, ...]) -> Run:
    if missing := machine().missing(AVX512):
        pytest.skip(f"CPU lacks {missing}")
    amx_emulator.enable()
    return compile_all({name: (ATTENTION, WORKLOADS[name], {"BQ": 32}) for name in names}, AMX)


@pytest.fixture(scope="module")
def run() -> Run:
    return compiled(FAST)


@pytest.fixture(scope="module")
def run_others() -> Run:
    return compiled(tuple(WORKLOADS.keys() - set(FAST)))


def inputs_of(w: AttentionWorkload, S: int, lengths: tuple[int, ...]) -> dict[str, np.ndarray]:
    """As the other attention tests have them; what no query may see is NaN in float32 caches."""
    longest = max(lengths)
    dims = {"B": len(lengths), "S": S, "CB": -(-longest // 64), "C": longest, "T": longest}
    given = attention_inputs(w, dims, np.random.default_rng(S))
    names = [arg.name for arg in w.inputs()]
    if w.kv_cache == "float32":
        given |= {k: x for k, x in make_inputs(w, S, lengths).items() if k in ("q", "kp", "v", "key_bias", "bias")}
    given["kv_len"] = np.array(lengths)
    return {name: given[name] for name in names}


def bound(w: AttentionWorkload, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """What four roundings of 2**-8 can change at most, [B, 1, H, 1]: of a query and a key, which move a score by
    2 * 2**-8 * sum |q k|, and so all weights by its exponential, over a sum that moves as well; of a weight; of a
    value. A tile's own sums, like the rest, are float32's."""
    u, B, D = 2.0**-8, inputs["q"].shape[0], w.head_dim
    k, v = cached(w.kv_cache, inputs)
    q = np.abs(inputs["q"].reshape(B, -1, w.n_heads, D)).astype(np.float64)
    bounds = np.zeros((B, 1, w.n_heads, 1))
    for b, length in enumerate(inputs["kv_len"]):
        for h in range(w.n_heads):
            keys, values = (np.abs(x[b, h // w.group, :length]) for x in (k, v))
            moved = (2 * u + u * u) * w.scale * (q[b, :, h] @ keys.T).max()
            bounds[b, 0, h, 0] = values.max() * (np.exp(2 * moved) * (1 + u) ** 2 - 1 + 1e-4)
    return bounds


def check(run: Run, name: str) -> None:
    w = WORKLOADS[name]
    for S, lengths in CALLS:
        inputs = inputs_of(w, S, lengths)
        seen = {key: np.nan_to_num(x) for key, x in inputs.items()}
        if "key_bias" in inputs:
            seen["key_bias"] = inputs["key_bias"]
        want = ATTENTION.reference(w, seen, {})["out"]
        got = run(name, inputs, {"out": want.shape})["out"]
        error = np.abs(got - want).reshape(*want.shape[:2], w.n_heads, w.head_dim)
        assert (error <= bound(w, seen)).all(), f"S={S}, lengths={lengths}"  # and no NaN
        # The bound is for the worst case; roundings that fall at random leave a tenth of it.
        assert np.sqrt((error**2).mean()) < 2.0**-8 * max(1, np.abs(want).max()), f"S={S}, lengths={lengths}"


@pytest.mark.parametrize("name", FAST)
def test_matches_reference(run: Run, name: str) -> None:
    check(run, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(WORKLOADS.keys() - set(FAST)))
def test_other_masks_and_caches(run_others: Run, name: str) -> None:
    check(run_others, name)


# -- bit for bit ------------------------------------------------------------------------------------------------------
def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of float32, rounded once: their product is exact in 64 bits, and a sum's error there too small."""
    return (a.astype(np.longdouble) * b + c).astype(np.float32)


def tiles_add(c: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """c [M, N] + a [M, K] b [K, N] as tdpbf16ps adds 32 k: even and odd ones apart, each step rounded."""
    for start in range(0, a.shape[1], 32):
        sums = [np.zeros_like(c), np.zeros_like(c)]
        for k in range(start, min(start + 32, a.shape[1])):
            sums[k % 2] = fma(a[:, k, None], b[None, k], sums[k % 2])
        c = c + (sums[0] + sums[1])
    return c


def bf16(x: np.ndarray) -> np.ndarray:
    return from_bf16(round_to_bf16(x))


def exp2(z: np.ndarray) -> np.ndarray:
    """`Simd.exp2`, operation by operation."""
    z = np.maximum(z, np.float32(-126))
    whole = np.rint(z)
    poly = np.full_like(z, _TWO_TO_F[0])
    for c in _TWO_TO_F[1:]:
        poly = fma(poly, z - whole, np.float32(c))
    return poly * np.ldexp(np.float32(1), whole.astype(np.int32))


def halves_summed(x: np.ndarray) -> np.ndarray:
    """The sum over the last axis, a power of two, by adding its halves."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


def stated(w: AttentionWorkload, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """What the kernel computes of a plain causal workload in float32, out [B, S, H, D]."""
    B, S, D = inputs["q"].shape[0], inputs["q"].shape[1], w.head_dim
    k, v = (x.astype(np.float32) for x in cached(w.kv_cache, inputs))
    q = inputs["q"].reshape(B, S, w.n_heads, D)
    out = np.zeros_like(q)
    for b, length in enumerate(inputs["kv_len"]):
        last = length - S + np.arange(S)  # the last key that each query sees
        for h in range(w.n_heads):
            rows = bf16(q[b, :, h] * np.float32(w.scale * LOG2E))
            keys, values = (np.zeros((-(-length // 64) * 64, D), np.float32) for _ in range(2))
            keys[:length], values[:length] = (bf16(x[b, h // w.group, :length]) for x in (k, v))
            top, total = np.full(S, -1e30, np.float32), np.zeros((S, 16), np.float32)
            acc = np.zeros((S, D), np.float32)
            for key0 in range(0, length, 64):
                p = tiles_add(np.zeros((S, 64), np.float32), rows, keys[key0 : key0 + 64].T)
                p = np.where(key0 + np.arange(64) <= last[:, None], p, np.float32(-3e38))
                new = np.maximum(top, p.max(1))
                decay, top = exp2(top - new), new
                p = exp2(p - new[:, None])
                first, second, third, fourth = p.reshape(S, 4, 16).swapaxes(0, 1)
                total = fma(total, decay[:, None], (first + second) + (third + fourth))
                acc = tiles_add(acc * decay[:, None], bf16(p), values[key0 : key0 + 64])
            out[b, :, h] = acc * (np.float32(1) / halves_summed(total))[:, None]
    return out


@pytest.mark.parametrize(("S", "lengths"), [(5, (5,)), (17, (97, 17)), (33, (130,))])
def test_bit_for_bit(run: Run, S: int, lengths: tuple[int, ...]) -> None:
    inputs = inputs_of(CAUSAL, S, lengths)
    want = stated(CAUSAL, {key: np.nan_to_num(x) for key, x in inputs.items()})
    got = run("causal", inputs, {"out": inputs["q"].shape})["out"].reshape(want.shape)
    np.testing.assert_array_equal(got, want)


# -- tiles did it -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("S", "length"), [(4, 300), (5, 5), (17, 100), (64, 64)])
def test_tiles_did_it(run: Run, S: int, length: int) -> None:
    """As many products as there are tiles to multiply, one configuration a task; none in decoding."""
    emulator, w, BQ = amx_emulator.emulator(), CAUSAL, 32
    inputs = inputs_of(w, S, (length,))
    emulator.reset()
    run("causal", inputs, {"out": inputs["q"].shape})
    counts = emulator.counts()
    if S <= 4:
        assert counts == {}
        return
    rows, dots = S * w.group, 0
    for row0 in range(0, rows, BQ):
        last_of_task = min(row0 + BQ, rows) - 1
        for key0 in range(0, length, 64):
            for tile in range(row0, last_of_task + 1, 16):
                last = length - S + min(tile + 15, last_of_task) // w.group  # key that the tile's last row sees
                if (columns := min(last + 1 - key0, 64)) > 0:
                    key_tiles, value_steps = (2, 1) if columns <= 32 else (4, 2)
                    dots += 2 * key_tiles + 4 * value_steps  # D = 64: two steps of 32, four vectors of 16
    tasks = w.n_kv_heads * -(-rows // BQ)
    assert counts["tdpbf16ps"] == dots * w.n_kv_heads
    assert counts["ldtilecfg"] == counts["tilerelease"] == tasks


def test_features_count_what_ran(run: Run) -> None:
    w, S, length = WORKLOADS["d18"], 33, 130
    inputs = inputs_of(w, S, (length,))
    emulator = amx_emulator.emulator()
    emulator.reset()
    run("d18", inputs, {"out": inputs["q"].shape})
    counts = emulator.counts()
    config = ATTENTION.default(w, AMX) | {"BQ": 32}
    told = attention_features(w, config, AMX, {"B": 1, "S": S, "C": length}, 2)
    # The features take the last block, of which 2 keys exist, for a whole one.
    rest = 3 * w.n_heads * (2 * 1 + 1 * 2)
    assert counts["tdpbf16ps"] == told["tile_dots"] - rest


def test_vectors_are_a_choice() -> None:
    """Only where a workload allows bfloat16 and the target has tiles: keys and knobs elsewhere stay what they were."""
    assert ATTENTION.default(CAUSAL, AMX)["body"] == "tiles"
    assert ATTENTION.default(CAUSAL, AMX) in ATTENTION.space(CAUSAL, AMX)
    assert set(ATTENTION.space(CAUSAL, AMX).knobs["body"]) == {"tiles", "vectors"}
    exact, narrow = (dataclasses.replace(CAUSAL, **change) for change in ({"bf16": False}, {"head_dim": LEAST_DIM - 1}))
    for w, target in ((exact, AMX), (narrow, AMX), (CAUSAL, AVX512), (CAUSAL, AVX2)):
        assert ATTENTION.space(w, target).knobs == ATTENTION.space(exact, AVX512).knobs
        assert ATTENTION.default(w, target) == ATTENTION.default(exact, AVX512)
    assert "bf16" not in exact.key() and "bf16=True" in CAUSAL.key()
