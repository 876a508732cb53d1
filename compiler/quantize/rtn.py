"""Round to nearest: the recipe that needs no calibration data."""

from __future__ import annotations

import numpy as np

from llmc.schedules.formats import QuantizedWeight

_ROWS = 4096  # rows a step: bounds the float scratch to a few times this many rows


def round_to_nearest(weight: np.ndarray, bits: int, group_size: int) -> QuantizedWeight:
    """Symmetric codes of a float [N, K] weight; `group_size` 0 takes the whole row.

    4 bits and fewer: the scale is (the element of largest magnitude, with its sign) / -2**(bits-1), so that this
    element is exact and all 2**bits codes are used (the scheme of GGML's Q4_0). 8 bits: max|w| / 127, codes 1..255.
    """
    N, K = weight.shape
    group = group_size or K
    groups, half = -(-K // group), 1 << (bits - 1)
    q = np.empty((N, K), np.uint8)
    scale = np.empty((N, groups), np.float32)
    for first in range(0, N, _ROWS):
        rows = np.asarray(weight[first : first + _ROWS], np.float32)
        padded = np.pad(rows, ((0, 0), (0, groups * group - K))).reshape(len(rows), groups, group)
        if bits == 8:
            s = np.abs(padded).max(-1) / np.float32(127)
        else:
            largest = np.take_along_axis(padded, np.abs(padded).argmax(-1)[..., None], -1)[..., 0]
            s = largest / np.float32(-half)
        inverse = np.divide(1, s, out=np.zeros_like(s), where=s != 0)
        codes = np.clip(np.rint(padded * inverse[..., None]) + half, 0, 2 * half - 1).astype(np.uint8)
        q[first : first + _ROWS] = codes.reshape(len(rows), -1)[:, :K]
        scale[first : first + _ROWS] = s
    return QuantizedWeight(q, scale, float(half), bits, group)
