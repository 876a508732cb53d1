"""Number formats of weights, and the one value that carries a quantised weight through the compiler."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight matrix of integers with scales per row and group: w[n, k] = (q[n, k] - zero[n, g]) * scale[n, g].

    `q` [N, K] uint8 holds unsigned codes below 2**bits. `scale` [N, ceil(K/group_size)] float32. `zero` is one number
    for the whole matrix (2**(bits-1) for symmetric formats) or float32 [N, ceil(K/group_size)]; it may be fractional.
    g = k // group_size. Nothing is ever rounded on the way in: a weight that arrives quantised stays what it was.
    """

    q: np.ndarray
    scale: np.ndarray
    zero: float | np.ndarray
    bits: int
    group_size: int

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

    def dequantize(self) -> np.ndarray:
        """[N, K] float32."""
        scale = np.repeat(self.scale, self.group_size, axis=1)[:, : self.K]
        zero = self.zero
        if isinstance(zero, np.ndarray):
            zero = np.repeat(zero, self.group_size, axis=1)[:, : self.K]
        return ((self.q.astype(np.float32) - zero) * scale).astype(np.float32)

    def rows(self, index: np.ndarray | slice) -> QuantizedWeight:
        """The same format, with only the output rows of `index`."""
        zero = self.zero[index] if isinstance(self.zero, np.ndarray) else self.zero
        return QuantizedWeight(self.q[index], self.scale[index], zero, self.bits, self.group_size)


def concat_rows(parts: list[QuantizedWeight]) -> QuantizedWeight:
    """Stack weights of one format along N. Raises ValueError if bits or group sizes differ."""
    first = parts[0]
    if any((p.bits, p.group_size, p.K) != (first.bits, first.group_size, first.K) for p in parts):
        raise ValueError("weights of different formats cannot share one matrix")
    zero: float | np.ndarray = first.zero
    if any(isinstance(p.zero, np.ndarray) or p.zero != first.zero for p in parts):
        zero = np.concatenate([np.broadcast_to(np.asarray(p.zero, np.float32), p.scale.shape) for p in parts])
    return QuantizedWeight(
        np.concatenate([p.q for p in parts]),
        np.concatenate([p.scale for p in parts]),
        zero,
        first.bits,
        first.group_size,
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
    scale = rng.uniform(0.01, 0.1, (N, groups)).astype(scale_dtype).astype(np.float32)
    if zero_dtype == "float16":
        zeros = ((zeros * scale).astype(np.float16) / scale).astype(np.float32)
    return QuantizedWeight(rng.integers(0, top, (N, K), np.uint8, endpoint=True), scale, zeros, bits, group_size)
