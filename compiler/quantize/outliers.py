"""The recipe of LLM.int8() (Dettmers et al., arXiv:2208.07339), with the channels chosen when a model is compiled.

A channel is an outlier where its largest value in the calibration set is over six times that of the median channel of
its layer. LLM.int8() has 6.0 itself as the threshold, for hidden states of size one; relative, it means the same for
layers whose values are all large (in which every channel would be an outlier) or all small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from llmc.schedules.formats import Outliers, QuantizedWeight

_TIMES = 6.0
_COUNTS = (4, 8, 16, 32)  # of outliers in a layer: few different ones, so that layers share kernels


def outlier_channels(largest: Sequence[np.ndarray]) -> np.ndarray:
    """int32 [n], ascending, of the channels that are outliers in any of `largest`: max|x| of each channel, float32 [K],
    for each value that is multiplied with one weight.

    Where there are any, the next largest fill them up to a number that kernels are built for; of more than the greatest
    of these, the largest are taken.
    """
    if not largest:
        return np.zeros(0, np.int32)
    excess = np.max([row / max(float(np.median(row)), 1e-30) for row in largest], axis=0)
    found = int((excess > _TIMES).sum())
    count = min((n for n in _COUNTS if n >= found), default=_COUNTS[-1]) if found else 0
    return np.sort(np.argsort(-excess, kind="stable")[:count]).astype(np.int32)


def split(weight: np.ndarray, rounded: QuantizedWeight, channels: np.ndarray) -> QuantizedWeight:
    """`rounded`, with these channels' columns of the float [N, K] `weight` as they were."""
    if not channels.size:
        return rounded
    return replace(rounded, outliers=Outliers(channels, np.ascontiguousarray(weight[:, channels], np.float32)))
