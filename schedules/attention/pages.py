"""Paged caches in plain numpy: how caches with a row for each sequence lie in pages, and back.

A page is one block of 64 tokens: kp [pages, KV, D, 64], v [pages, KV, 64, D] and so on; table [B, CB] int32 names the
page of each block of a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from llmc.schedules.attention.layout import BLOCK
from llmc.schedules.base import Arrays

_BUFFERS = ("kp", "v", "planes")


def gather(inputs: Mapping[str, np.ndarray]) -> Arrays:
    """`inputs` with caches as they would be without a table."""
    table = inputs["table"]
    found = {name: inputs[name][table].swapaxes(1, 2) for name in _BUFFERS if name in inputs}
    if "planes" not in found:
        B, KV, CB, _, D = found["v"].shape
        found["v"] = found["v"].reshape(B, KV, CB * BLOCK, D)
    return {**inputs, **found}


def scatter(found: Mapping[str, np.ndarray], inputs: Mapping[str, np.ndarray]) -> Arrays:
    """What `gather` made of `inputs`, and a kernel changed, in pages again. Pages of no sequence stay as they are."""
    table, out = inputs["table"], dict(found)
    for name in (name for name in _BUFFERS if name in found):
        out[name] = inputs[name].astype(found[name].dtype)
        out[name][table] = blocks_of(found[name])
    return out


def blocks_of(rows: np.ndarray) -> np.ndarray:
    """A cache [B, KV, CB, ...], or float32 values [B, KV, CB*64, D], block by block: [B, CB, KV, ...]."""
    if rows.ndim == 4:
        B, KV, C, D = rows.shape
        rows = rows.reshape(B, KV, C // BLOCK, BLOCK, D)
    return rows.swapaxes(1, 2)


def in_pages(inputs: Mapping[str, np.ndarray], rng: np.random.Generator) -> Arrays:
    """`inputs` with their caches in pages, shuffled, and a page that no sequence has; the table among them."""
    B, _, CB = inputs["kp"].shape[:3]
    pages = rng.permutation(B * CB + 1)
    table = pages[: B * CB].astype(np.int32).reshape(B, CB)
    out = dict(inputs)
    for name in (name for name in _BUFFERS if name in inputs):
        blocks = blocks_of(inputs[name])
        out[name] = np.zeros((len(pages), *blocks.shape[2:]), blocks.dtype)
        out[name][table] = blocks
    return out | {"table": table}
