"""Number formats of weights, and the one value that carries a quantised weight through the compiler."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

# What a 4-bit code stands for where codes are no integers. nf4: the quantiles of a normal distribution, as QLoRA
# (Dettmers et al., arXiv:2305.14314) defines them. fp4: the float type E2M1 of the OCP's MX specification.
TABLES: dict[str, tuple[float, ...]] = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0),
}
# A table's values as whole numbers of one byte with sign, and how many of these make 1: exact for fp4; those of nf4
# are off by up to 0.4 % of the largest, where its own steps are 8 % and more.
STEPS = {"nf4": 127, "fp4": 2}


E4M3 = "e4m3"  # the table of 8-bit codes that are floats: sign, 4 bits of exponent, 3 of mantissa; no infinities
E4M3_MAX = 448.0


def to_e4m3(values: np.ndarray) -> np.ndarray:
    """uint8: the nearest E4M3, ties to even; what is too large becomes the largest."""
    return np.clip(values, -E4M3_MAX, E4M3_MAX).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def whole_table(name: str) -> np.ndarray:
    """int8 [16]: a table's values in STEPS."""
    return np.rint(np.array(TABLES[name]) * STEPS[name]).astype(np.int8)


@dataclass(frozen=True, eq=False)
class PackedCodes:
    """4-bit codes [N, K], two a byte as files hold them, the first in the low half; numpy gets them one a byte.

    `parts` uint8 [rows, ceil(K / 2)] lie over one another; they may be views of a mapped file. A model's codes are then
    in memory only while they are packed for a kernel, one matrix at a time.
    """

    parts: tuple[np.ndarray, ...]
    K: int

    @property
    def shape(self) -> tuple[int, int]:
        return sum(len(part) for part in self.parts), self.K

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        N, width = self.shape[0], self.parts[0].shape[1]
        codes = np.empty((N, 2 * width), np.uint8)
        first = 0
        for part in self.parts:
            rows = codes[first : first + len(part)]
            np.bitwise_and(part, 15, out=rows[:, 0::2])
            np.right_shift(part, 4, out=rows[:, 1::2])
            first += len(part)
        return np.asarray(codes[:, : self.K], dtype)


@dataclass(frozen=True, eq=False)
class Outliers:
    """Columns of a weight that are multiplied in float32: those of the few input channels whose values would decide
    the scale of all others. `channels` int32 [n], ascending; `columns` float32 [N, n]."""

    channels: np.ndarray
    columns: np.ndarray


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight matrix of integers with scales per row and group: w[n, k] = (q[n, k] - zero[n, g]) * scale[n, g].

    `q` [N, K] uint8 holds unsigned codes below 2**bits, or is their packed form. `scale` [N, ceil(K/group_size)]
    float32. `zero` is one number for the whole matrix (2**(bits-1) for symmetric formats) or float32
    [N, ceil(K/group_size)]; it may be fractional. g = k // group_size. Nothing is ever rounded on the way in: a weight
    that arrives quantised stays what it was. With a `table` of TABLES, or E4M3, w[n, k] = table[q[n, k]] * scale[n, g],
    and zero is 0. `outliers` replaces some columns, whose codes are then read by embeddings alone.
    """

    q: np.ndarray | PackedCodes
    scale: np.ndarray
    zero: float | np.ndarray
    bits: int
    group_size: int
    table: str = ""
    outliers: Outliers | None = None

    @property
    def N(self) -> int:
        return int(self.q.shape[0])

    @property
    def K(self) -> int:
        return int(self.q.shape[1])

    @property
    def symmetric(self) -> bool:
        """One zero point for all: the kernel then needs no array of them."""
        return not isinstance(self.zero, np.ndarray)

    @property
    def outlier_channels(self) -> tuple[int, ...]:
        return tuple(map(int, self.outliers.channels)) if self.outliers else ()

    def dequantize(self) -> np.ndarray:
        """[N, K] float32."""
        if self.outliers:
            value = replace(self, outliers=None).dequantize()
            value[:, self.outliers.channels] = self.outliers.columns
            return value
        scale = np.repeat(self.scale, self.group_size, axis=1)[:, : self.K]
        if self.table == E4M3:
            return np.asarray(self.q).view(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
        if self.table:
            return np.array(TABLES[self.table], np.float32)[np.asarray(self.q)] * scale
        zero = self.zero
        if isinstance(zero, np.ndarray):
            zero = np.repeat(zero, self.group_size, axis=1)[:, : self.K]
        return ((np.asarray(self.q, np.float32) - zero) * scale).astype(np.float32)


def concat_rows(parts: list[QuantizedWeight]) -> QuantizedWeight:
    """Stack weights of one format along N. Raises ValueError if bits, group sizes or outlying channels differ."""
    first = parts[0]
    if any((p.bits, p.group_size, p.K, p.table) != (first.bits, first.group_size, first.K, first.table) for p in parts):
        raise ValueError("weights of different formats cannot share one matrix")
    if any(p.outlier_channels != first.outlier_channels for p in parts):
        raise ValueError("weights with outliers in different channels cannot share one matrix")
    columns = [p.outliers.columns for p in parts if p.outliers]
    zero: float | np.ndarray = first.zero
    if any(isinstance(p.zero, np.ndarray) or p.zero != first.zero for p in parts):
        zero = np.concatenate([np.broadcast_to(np.asarray(p.zero, np.float32), p.scale.shape) for p in parts])
    packed = [p.q for p in parts if isinstance(p.q, PackedCodes)]
    stacked: np.ndarray | PackedCodes
    if len(packed) == len(parts):
        stacked = PackedCodes(tuple(part for q in packed for part in q.parts), first.K)
    else:
        stacked = np.concatenate([np.asarray(p.q) for p in parts])
    return QuantizedWeight(
        stacked,
        np.concatenate([p.scale for p in parts]),
        zero,
        first.bits,
        first.group_size,
        first.table,
        Outliers(first.outliers.channels, np.concatenate(columns)) if first.outliers else None,
    )


def random_weight(
    rng: np.random.Generator,
    shape: tuple[int, int],
    bits: int,
    group_size: int,
    zero: float | None,
    scale_dtype: str = "float32",
    zero_dtype: str = "float32",
) -> QuantizedWeight:
    """Random codes [N, K] with scales in 0.01 … 0.1 that are values of `scale_dtype`; zero None: zero points for each
    row and group, whole, or with zero_dtype "float16" such that zero * scale is a float16."""
    N, K = shape
    groups, top = -(-K // group_size), 2**bits - 1
    zeros = rng.integers(0, top, (N, groups), endpoint=True).astype(np.float32) if zero is None else zero
    scale = rng.uniform(0.01, 0.1, (N, groups)).astype(np.float32)
    if scale_dtype == "bfloat16":
        scale = (scale.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    else:
        scale = scale.astype(scale_dtype).astype(np.float32)
    if zero_dtype == "float16":
        zeros = ((zeros * scale).astype(np.float16) / scale).astype(np.float32)
    return QuantizedWeight(rng.integers(0, top, (N, K), np.uint8, endpoint=True), scale, zeros, bits, group_size)
