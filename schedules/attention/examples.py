"""Inputs on which the kernels of this folder are timed and checked: lengths and caches that fit together."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from llmc.schedules.attention.kv_format import FORMATS, quantise
from llmc.schedules.attention.layout import BLOCK
from llmc.schedules.attention.reference import pack_cache
from llmc.schedules.attention.workloads import AttentionWorkload, KVAppendWorkload
from llmc.schedules.base import Arrays, example


def attention_inputs(w: AttentionWorkload, dims: Mapping[str, int], rng: np.random.Generator) -> Arrays:
    """The first sequence fills the cache of C keys, each of the others is 13 keys shorter than the one before.

    Without C, which only float32 caches have, all blocks are full.
    """
    inputs = {arg.name: example(arg, dims, rng) for arg in w.inputs()}
    if w.kv_cache != "float32":
        inputs |= rounded_cache(w, dims, rng)
    keys = dims.get("C", dims["CB"] * BLOCK)
    return inputs | {"kv_len": np.maximum(keys - 13 * np.arange(dims["B"]), min(dims["S"], keys))}


def rounded_cache(w: AttentionWorkload, dims: Mapping[str, int], rng: np.random.Generator) -> Arrays:
    """kp, v and planes of random keys and values."""
    format, found, planes = FORMATS[w.kv_cache], {}, []
    for name, values in (("kp", False), ("v", True)):
        x = rng.standard_normal((dims["B"], w.n_kv_heads, dims["CB"] * BLOCK, w.head_dim), np.float32)
        found[name], half = pack_cache(*quantise(x, format), format, values)
        planes.append(half)
    return found | {"planes": np.ascontiguousarray(np.concatenate(planes, axis=3))}


def append_inputs(w: KVAppendWorkload, dims: Mapping[str, int], rng: np.random.Generator) -> Arrays:
    """In place, the first sequence ends 5 positions before the cache does, each of the others 3 earlier.

    What is to be rounded is a multiple of a small power of two, and so is its rotation: no order of operations moves it
    across the middle between two codes.
    """
    sizes = dict(dims) | ({"C": dims["CB"] * BLOCK} if w.in_place else {})
    inputs = {arg.name: example(arg, sizes, rng) for arg in w.inputs()}
    if w.in_place:
        lengths = sizes["C"] - 5 - 3 * np.arange(dims["B"])
        inputs["kv_len"] = np.maximum(lengths, min(dims["S"], sizes["C"]))
    if w.kv_cache != "float32":
        inputs |= {
            name: np.round(x * 16) / 16 for name, x in inputs.items() if x.dtype == np.float32 and name != "planes"
        }
    return inputs


def attention_corners(w: AttentionWorkload) -> list[dict[str, int]]:
    """One query and many, one key block and several, full blocks and broken ones."""
    sizes = [(1, 1, 1), (3, 1, 300), (2, 3, 130), (1, 7, 71), (1, 33, 97), (2, 65, 80), (1, 130, 333)]
    return [{"B": B, "S": S, "CB": -(-C // BLOCK), "C": C, "T": C} for B, S, C in sizes]


def append_corners(w: KVAppendWorkload) -> list[dict[str, int]]:
    if w.in_place:
        return [{"B": B, "S": S, "CB": CB} for B, S, CB in ((1, 1, 1), (3, 1, 2), (2, 7, 1), (1, 66, 3), (2, 130, 4))]
    return [{"B": B, "S": S, "P": P} for B, S, P in ((1, 1, 1), (3, 1, 63), (2, 7, 64), (1, 66, 5), (2, 130, 100))]
