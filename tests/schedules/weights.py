"""Random quantised weights for the kernel tests."""

from __future__ import annotations

import numpy as np

from llmc.schedules.formats import QuantizedWeight


def random_weight(
    rng: np.random.Generator, N: int, K: int, bits: int, group_size: int, zero: float | str, dtype: str = "float32"
) -> QuantizedWeight:
    """zero: one number, or zero points for each row and group: "whole", "fractional", or such that zero * scale is a
    float16 "minimum". Scales are values of `dtype`."""
    groups = -(-K // group_size)
    top = 2**bits - 1
    if zero == "whole":
        zeros = rng.integers(0, top, (N, groups), endpoint=True).astype(np.float32)
    elif zero == "fractional":
        zeros = rng.uniform(0, top, (N, groups)).astype(np.float32)
    scale = rng.uniform(0.01, 0.1, (N, groups)).astype(np.float32)
    if dtype == "bfloat16":
        scale.view(np.uint32)[:] &= np.uint32(0xFFFF0000)
    else:
        scale = scale.astype(dtype).astype(np.float32)
    if zero == "minimum":
        zeros = (rng.uniform(0, 1, (N, groups)).astype(np.float16) / scale).astype(np.float32)
    codes = rng.integers(0, top, (N, K), np.uint8, endpoint=True)
    return QuantizedWeight(codes, scale, zeros if isinstance(zero, str) else zero, bits, group_size)
