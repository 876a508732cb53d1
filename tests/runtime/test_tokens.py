"""Tokens moved inside of caches of every kind are where a plain reading of the layout expects them."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.package.manifest import BufferSpec, CacheSpec, DecoderSpec
from llmc.runtime.caches import Caches, RowCaches
from llmc.runtime.pages import PagedCaches
from llmc.schedules.attention.kv_format import KVCache
from llmc.schedules.attention.workloads import cache_arguments

KV, D, TOKENS = 2, 8, 256


def caches(kv_cache: KVCache, paged: bool) -> Caches:
    """Two layers, two rows, 200 and 256 tokens of noise."""
    arguments = cache_arguments(kv_cache, KV, D, "blocks", "capacity", paged)
    cache = CacheSpec(*(BufferSpec(tuple(arg.shape), arg.dtype) for arg in arguments))
    decoder = DecoderSpec(10, 2, (cache, cache), (), kv_cache=kv_cache, paged=paged)
    made = PagedCaches(decoder, 2) if paged else RowCaches(decoder, 2)
    made.grow(np.zeros(2, np.int64), np.array([200, TOKENS]))
    rng = np.random.default_rng(0)
    for array in made.buffers(slice(0, 2)):
        array.reshape(-1).view(np.uint8)[...] = rng.integers(0, 120, array.nbytes, np.uint8)
    return made


def held(caches: Caches, row: int, kv_cache: KVCache) -> list[list[np.ndarray]]:
    """Of each buffer what it holds of each token, [KV, ...]."""
    found = []
    for i, array in enumerate(caches.buffers(slice(0, 2))):
        if isinstance(caches, PagedCaches):
            blocks = [array[page] for page in caches.inputs(slice(0, 2))["block_table"][row]]
        elif array.ndim == 4:
            blocks = np.split(array[row], array.shape[2] // 64, axis=1)
        else:
            blocks = list(array[row].swapaxes(0, 1))
        values = i % (2 if kv_cache == "float32" else 3) == 1
        tokens = []
        for token in range(TOKENS):
            block, j = blocks[token // 64], token % 64
            if kv_cache == "int4" and block.dtype == np.uint8:
                codes = block[:, j % 32] if values else block[:, :, j % 32]
                tokens.append(codes >> 4 if j >= 32 else codes & 15)
            else:
                tokens.append((block[:, j] if values else block[:, :, j]).copy())
        found.append(tokens)
    return found


KINDS = pytest.mark.parametrize("paged", [False, True], ids=["rows", "paged"])
FORMATS = pytest.mark.parametrize("kv_cache", ["float32", "int8", "int4"])


@KINDS
@FORMATS
@pytest.mark.parametrize(
    ("sources", "targets"),
    [([70, 75, 133], [70, 71, 72]), ([60, 70, 100, 161], [59, 60, 61, 62]), (range(1, 90), range(89)), ([5], [37])],
)
def test_moves(kv_cache: KVCache, paged: bool, sources: list[int], targets: list[int]) -> None:
    it = caches(kv_cache, paged)
    before = [held(it, row, kv_cache) for row in range(2)]
    it.move(0, np.array(sources), np.array(targets))
    wanted = [[tokens[dict(zip(targets, sources, strict=True)).get(t, t)] for t in range(200)] for tokens in before[0]]
    for found, tokens in zip(held(it, 0, kv_cache), wanted, strict=True):
        np.testing.assert_array_equal(found[:200], tokens)
    for found, tokens in zip(held(it, 1, kv_cache), before[1], strict=True):
        np.testing.assert_array_equal(found, tokens)


@KINDS
@FORMATS
@pytest.mark.parametrize("sinks", [0, 4, 33])
def test_a_block_goes(kv_cache: KVCache, paged: bool, sinks: int) -> None:
    it = caches(kv_cache, paged)
    twin = it.fork([0, 1], np.array([200, TOKENS])) if paged else it
    before = [held(it, row, kv_cache) for row in range(2)]
    it.drop_block(0, sinks, np.array([136, TOKENS]))
    for found, tokens in zip(held(it, 0, kv_cache), before[0], strict=True):
        np.testing.assert_array_equal(found[:136], tokens[:sinks] + tokens[sinks + 64 : 200])
    for found, tokens in zip(held(it, 1, kv_cache), before[1], strict=True):
        np.testing.assert_array_equal(found, tokens)
    if twin is not it:
        for found, tokens in zip(held(twin, 0, kv_cache), before[0], strict=True):
            np.testing.assert_array_equal(found[:200], tokens[:200])
