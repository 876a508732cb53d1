"""Round to nearest: the recipe that needs no calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from llmc.schedules.formats import E4M3, E4M3_MAX, TABLES, QuantizedWeight, to_e4m3

_HALF = np.finfo(np.float16)
_ROWS = 4096  # rows a step: bounds the float scratch to a few times this many rows


def round_to_nearest(weight: np.ndarray, bits: int, group_size: int) -> QuantizedWeight:
    """Symmetric codes of a float [N, K] weight; `group_size` 0 takes the whole row.

    4 bits and fewer: the scale is (the element of largest magnitude, with its sign) / -2**(bits-1), so that this
    element is exact and all 2**bits codes are used (the scheme of GGML's Q4_0). 8 bits: max|w| / 127, codes 1..255.
    """
    half = 1 << (bits - 1)

    def scales(groups: np.ndarray) -> np.ndarray:
        if bits == 8:
            return np.abs(groups).max(-1) / np.float32(127)
        largest = np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], -1)[..., 0]
        return largest / np.float32(-half)

    def codes(values: np.ndarray) -> np.ndarray:
        return np.clip(np.rint(values) + half, 0, 2 * half - 1)

    q, scale = _rounded(weight, group_size, scales, codes)
    return QuantizedWeight(q, scale, float(half), bits, group_size or weight.shape[1])


def round_to_table(weight: np.ndarray, table: str, group_size: int, *, powers: bool = False) -> QuantizedWeight:
    """The nearest value of a table (of `TABLES`) for every element of a float [N, K] weight.

    The scale makes the largest element of a group the largest value. With `powers` it is a power of two, such that the
    largest element is less than twice the largest power of two in the table, as the OCP's MX specification has it:
    what is then beyond the table takes its last value.
    """
    values = np.array(TABLES[table], np.float32)
    top = values.max()

    def scales(groups: np.ndarray) -> np.ndarray:
        largest = np.abs(groups).max(-1)
        if not powers:
            return largest / top
        exponent = np.floor(np.log2(np.where(largest > 0, largest, 1))) - np.floor(np.log2(top))
        return np.where(largest > 0, np.exp2(exponent), 0).astype(np.float32)

    order = np.argsort(values, kind="stable")
    middles = (values[order][1:] + values[order][:-1]) / 2

    def codes(scaled: np.ndarray) -> np.ndarray:
        return order[np.searchsorted(middles, scaled)]

    q, scale = _rounded(weight, group_size, scales, codes)
    return QuantizedWeight(q, scale, 0.0, 4, group_size or weight.shape[1], table)


def round_to_e4m3(weight: np.ndarray) -> QuantizedWeight:
    """The nearest 8-bit float for every element of a float [N, K] weight; the largest of a row becomes the largest."""
    q, scale = _rounded(weight, 0, lambda groups: np.abs(groups).max(-1) / np.float32(E4M3_MAX), to_e4m3)
    return QuantizedWeight(q, scale, 0.0, 8, weight.shape[1], E4M3)


def round_to_range(weight: np.ndarray, bits: int, group_size: int) -> QuantizedWeight:
    """Asymmetric codes of a float [N, K] weight: 0 is the smallest element of a group, 2**bits - 1 its largest.

    Zero points are such that -zero * scale is that smallest element as a float16, as in GGML's Q4_1: it is what kernels
    store, beside the scale, for each row and group.
    """
    (N, K), top = weight.shape, 2**bits - 1
    least, scale = (np.empty((N, -(-K // (group_size or K))), np.float32) for _ in range(2))
    for rows, values in _groups(weight, group_size):
        least[rows] = values.min(-1)
        scale[rows] = (values.max(-1) - least[rows]) / np.float32(top)
    scale = np.where(scale > 0, scale, np.abs(least))  # a group of one value is code 0 throughout
    if _fits_half(scale) and np.abs(least).max(initial=0) <= _HALF.max:
        scale, least = (v.astype(np.float16).astype(np.float32) for v in (scale, least))
    inverse = _inverse(scale)
    q = np.empty((N, K), np.uint8)
    for rows, values in _groups(weight, group_size):
        codes = np.clip(np.rint((values - least[rows][..., None]) * inverse[rows][..., None]), 0, top)
        q[rows] = codes.reshape(len(values), -1)[:, :K]
    zero = np.divide(-least, scale, out=np.zeros_like(scale), where=scale != 0)
    return QuantizedWeight(q, scale, zero, bits, group_size or K)


def _rounded(
    weight: np.ndarray,
    group_size: int,
    scales: Callable[[np.ndarray], np.ndarray],
    codes: Callable[[np.ndarray], np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """(codes uint8 [N, K], scales float32 [N, groups]): `scales` of groups [n, groups, group], `codes` of quotients.

    Scales are float16 values, which take half the memory and lose nothing: codes are made for them as they are. They
    stay float32 where one of them would be too large or too small.
    """
    N, K = weight.shape
    scale = np.empty((N, -(-K // (group_size or K))), np.float32)
    for rows, values in _groups(weight, group_size):
        scale[rows] = scales(values)
    if _fits_half(scale):
        scale = scale.astype(np.float16).astype(np.float32)
    inverse = _inverse(scale)
    q = np.empty((N, K), np.uint8)
    for rows, values in _groups(weight, group_size):
        q[rows] = codes(values * inverse[rows][..., None]).reshape(len(values), -1)[:, :K]
    return q, scale


def _groups(weight: np.ndarray, group_size: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Some rows at a time, as float32 [n, groups, group]; the last group is filled up with zeros."""
    N, K = weight.shape
    group = group_size or K
    groups = -(-K // group)
    for first in range(0, N, _ROWS):
        rows = np.asarray(weight[first : first + _ROWS], np.float32)
        padded = np.pad(rows, ((0, 0), (0, groups * group - K)))
        yield slice(first, first + len(rows)), padded.reshape(len(rows), groups, group)


def _fits_half(scale: np.ndarray) -> bool:
    """Can all scales be float16s without losing digits?"""
    used = np.abs(scale[scale != 0])
    return bool(used.size and used.min() >= _HALF.tiny and used.max() <= _HALF.max)


def _inverse(scale: np.ndarray) -> np.ndarray:
    return np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
