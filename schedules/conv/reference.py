"""What convolutions and windows must compute, in numpy and float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from llmc.schedules import epilogue
from llmc.schedules.conv.workloads import WindowWorkload


def taps(
    x: np.ndarray, size: tuple[int, int], strides: tuple[int, int], dilations: tuple[int, int], out: tuple[int, int]
) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
    """For each tap (kh, kw), what it reads of x [B, H, W, C] for all outputs: a view [B, OH, OW, C]."""
    for kh in range(size[0]):
        for kw in range(size[1]):
            top, left = kh * dilations[0], kw * dilations[1]
            rows = x[:, top : top + (out[0] - 1) * strides[0] + 1 : strides[0]]
            yield (kh, kw), rows[:, :, left : left + (out[1] - 1) * strides[1] + 1 : strides[1]]


def convolve(
    x: np.ndarray, weight: np.ndarray, strides: tuple[int, int], dilations: tuple[int, int], groups: int
) -> np.ndarray:
    """x [B, H, W, C] (padded already), weight [N, C / groups, KH, KW] -> float64 [B, OH, OW, N]."""
    B, H, W, _ = x.shape
    N, _, KH, KW = weight.shape
    out = ((H - (KH - 1) * dilations[0] - 1) // strides[0] + 1, (W - (KW - 1) * dilations[1] - 1) // strides[1] + 1)
    y = np.zeros((B, *out, groups, N // groups))
    kernel = weight.astype(np.float64).reshape(groups, N // groups, -1, KH, KW)
    for (kh, kw), seen in taps(x.astype(np.float64), (KH, KW), strides, dilations, out):
        y += np.einsum("bhwgc,gnc->bhwgn", seen.reshape(B, *out, groups, -1), kernel[:, :, :, kh, kw])
    return y.reshape(B, *out, N)


def slide(w: WindowWorkload, x: np.ndarray, weights: Mapping[str, Any]) -> np.ndarray:
    """x [B, H, W, C] -> float64 [B, OH, OW, C], as the workload's kind says."""
    B, H, W, _ = x.shape
    OH, OW = w.out(H, W)
    below = max(0, (OH - 1) * w.SH + (w.KH - 1) * w.DH + 1 - w.top - H)
    right = max(0, (OW - 1) * w.SW + (w.KW - 1) * w.DW + 1 - w.left - W)
    pads = ((0, 0), (w.top, below), (w.left, right), (0, 0))
    padded = np.pad(x.astype(np.float64), pads, constant_values=-np.inf if w.kind == "max" else 0)
    inside = np.pad(np.ones((B, H, W, 1)), pads)
    shape = ((w.KH, w.KW), (w.SH, w.SW), (w.DH, w.DW), (OH, OW))
    seen = list(taps(padded, *shape))
    if w.kind == "max":
        return epilogue.reference(w.activation, np.max([part for _, part in seen], axis=0))
    if w.kind == "average":
        count = w.KH * w.KW if w.count_pad else sum(part for _, part in taps(inside, *shape))
        return epilogue.reference(w.activation, np.sum([part for _, part in seen], axis=0) / count)
    kernel = np.asarray(weights["weight"], np.float64)
    y = np.sum([part * kernel[:, 0, kh, kw] for (kh, kw), part in seen], axis=0)
    return epilogue.reference(w.activation, y + weights["bias"] if w.bias else y)
