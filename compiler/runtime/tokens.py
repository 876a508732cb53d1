"""Tokens inside of a cache's blocks: moving them to other places."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from llmc.package.manifest import DecoderSpec

Places = tuple[np.ndarray, np.ndarray]  # of tokens: blocks [n], and where in them [n]


def move_tokens(decoder: DecoderSpec, buffers: Sequence[np.ndarray], sources: Places, targets: Places) -> None:
    """Write what the caches hold of the tokens at `sources` to `targets`, which may overlap.

    `buffers` are those of all caches, block by block: keys [blocks, KV, D, 64/n] with n codes a byte, values
    [blocks, KV, 64/n, D], planes [blocks, KV, rows, 64].
    """
    for buffer, block in _by_token(decoder, buffers):
        width = buffer.shape[1]
        codes = buffer[sources[0], sources[1] % width]
        if width == block:
            buffer[targets] = codes
            continue
        # Two codes a byte: token j of a block in the low half, token j + 32 in the high half.
        codes >>= _beside(sources[1] // width * 4, codes)
        for half, (kept, shift) in enumerate(((0xF0, 0), (0x0F, 4))):
            here = targets[1] // width == half
            at = targets[0][here], targets[1][here] % width
            buffer[at] = buffer[at] & kept | (codes[here] & 15) << shift


def _by_token(decoder: DecoderSpec, buffers: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, int]]:
    """Views [blocks, 64/n, ...] of the buffers, and the tokens of a block."""
    rest = iter(buffers)
    for cache in decoder.caches:
        for spec in cache.buffers:
            yield np.moveaxis(next(rest), 2 if spec is cache.v else 3, 1), cache.block


def _beside(shifts: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """[n] as [n, 1, ...], of the codes' dtype."""
    return shifts.reshape(-1, *[1] * (codes.ndim - 1)).astype(codes.dtype)
