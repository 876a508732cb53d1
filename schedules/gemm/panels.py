"""The packed layout of dense weights: panels of NR rows side by side, [ceil(N/NR), K, NR]."""

from __future__ import annotations

import numpy as np

_CHUNK_BYTES = 4 << 20  # of a transposed weight read at a time: few enough pages that they stay mapped and cached


def pack_panels(weight: np.ndarray, NR: int, halves: int = 1) -> np.ndarray:
    """[N, K] of any strides -> [ceil(N/NR), K, NR], C-contiguous, missing rows zero.

    With halves = 2 every panel takes NR/2 rows from the first half of the weight, then the NR/2 rows of the second
    half with the same numbers. Memory: the result alone; a memory-mapped weight is read once, front to back.
    """
    N, K = weight.shape
    rows, width = N // halves, NR // halves
    packed = np.empty((-(-rows // width), K, NR), weight.dtype)
    for half in range(halves):
        _fill(weight[half * rows : (half + 1) * rows], packed[:, :, half * width : (half + 1) * width])
    return packed


def _fill(rows: np.ndarray, panels: np.ndarray) -> None:
    """rows [n, K] -> panels [ceil(n/width), K, width]."""
    (n, K), width = rows.shape, panels.shape[2]
    full = n // width
    if n % width:
        panels[-1, :, : n % width] = rows[full * width :].T
        panels[-1, :, n % width :] = 0
    # A weight stored [N, K] is taken panel by panel: its rows fit the cache together. A transposed one is followed
    # along its memory, a few k at a time.
    step = K if rows.strides[0] >= rows.strides[1] else max(1, _CHUNK_BYTES // max(1, n * rows.itemsize))
    source = rows[: full * width].reshape(full, width, K).transpose(0, 2, 1)
    for k in range(0, K, step):
        panels[:full, k : k + step] = source[:, k : k + step]
