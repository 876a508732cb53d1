"""Inputs on which the kernels of this folder are timed and checked: lengths and caches that fit together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from llmc.schedules.attention.kv_format import FORMATS, quantise
from llmc.schedules.attention.layout import BLOCK
from llmc.schedules.attention.pages import in_pages
from llmc.schedules.attention.reference import pack_cache
from llmc.schedules.attention.workloads import MOST_DRAFTED, AttentionWorkload, KVAppendWorkload
from llmc.schedules.base import Arrays, example


def attention_inputs(w: AttentionWorkload, dims: Mapping[str, int], rng: np.random.Generator) -> Arrays:
    """The first sequence fills the cache of C keys, each of the others is 13 keys shorter than the one before.

    Without C, which only float32 caches have, all blocks are full.
    """
    if w.paged:
        rows = attention_inputs(replace(w, paged=False), _in_rows(dims), rng)
        return in_pages(rows, rng) | {"shared": np.zeros(1, np.int64)}
    inputs = {arg.name: example(arg, dims, rng) for arg in w.inputs()}
    if w.kv_cache != "float32":
        inputs |= rounded_cache(w, dims, rng)
    B, S, keys = dims["B"], dims["S"], dims.get("C", dims["CB"] * BLOCK)
    inputs["kv_len"] = np.maximum(keys - 13 * np.arange(B), min(S, keys))
    if w.alibi:
        inputs["slopes"] = (2.0 ** (-8 * np.arange(1, w.n_heads + 1) / w.n_heads)).astype(np.float32)
    if w.prefix:
        inputs["prefix_len"] = np.full(B, prefix_of(keys))
    if w.documents:
        inputs["documents"] = np.broadcast_to(np.arange(dims["T"]) // DOCUMENT, (B, dims["T"])).copy()
    if w.tree:
        inputs["tree"] = np.broadcast_to(heap_tree(S), (B, S)).copy()
    return inputs


DOCUMENT = 100  # keys of a document


def prefix_of(keys: int) -> int:
    return keys // 4


def heap_tree(S: int) -> np.ndarray:
    """Masks uint64 [S] of a binary tree: token i follows token (i-1)//2."""
    masks = [1]
    for i in range(1, S):
        masks.append(masks[(i - 1) // 2] | 1 << i)
    return np.array([mask % 2**MOST_DRAFTED for mask in masks], np.uint64)


def keys_seen(w: AttentionWorkload, S: int, C: int) -> list[int]:
    """How many of C keys each of the last S sees, with the inputs of `attention_inputs`."""
    if w.tree:
        return [C - S + (i + 1).bit_length() for i in range(S)]
    counts = []
    for at in range(C - S, C):
        begin, end = max(at + 1 - w.window, 0) if w.window else 0, at + 1 if w.ordered else C
        if w.prefix:
            end = max(end, prefix_of(C))
        low = at // DOCUMENT * DOCUMENT if w.documents else 0
        high = low + DOCUMENT if w.documents else C
        sinks = max(min(w.sinks, begin, high) - low, 0)
        counts.append(max(min(end, high) - max(begin, low), 0) + sinks)
    return counts


def keys_read(w: AttentionWorkload, queries: int, C: int) -> int:
    """How many of C keys the task of some neighbouring queries reads, the last ones of a sequence."""
    if w.window:
        return min(C, w.window + w.sinks + queries - 1)
    return min(C, DOCUMENT + queries - 1) if w.documents else C


def _in_rows(dims: Mapping[str, int]) -> dict[str, int]:
    """Sizes of the same call on a cache without pages."""
    return {**dims, "C": dims["CB"] * BLOCK}


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
    if w.paged:
        return in_pages(append_inputs(replace(w, paged=False), _in_rows(dims), rng), rng)
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
