"""Codes in the packed form of files, against codes one a byte."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.schedules.formats import PackedCodes, QuantizedWeight, concat_rows


def packed(codes: np.ndarray) -> np.ndarray:
    """Two codes a byte, the first in the low half, by the definition: one byte after another."""
    rows = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
    return np.array([[row[k] + 16 * row[k + 1] for k in range(0, len(row), 2)] for row in rows], np.uint8)


@pytest.mark.parametrize("K", [1, 2, 31, 32, 33])
@pytest.mark.parametrize("rows", [(1,), (3, 1, 4)])
def test_numpy_sees_one_code_a_byte(K: int, rows: tuple[int, ...]) -> None:
    rng = np.random.default_rng(K)
    parts = [rng.integers(0, 16, (n, K), np.uint8) for n in rows]
    codes = PackedCodes(tuple(map(packed, parts)), K)
    assert codes.shape == (sum(rows), K)
    np.testing.assert_array_equal(np.asarray(codes), np.concatenate(parts))
    assert np.asarray(codes, np.float32).dtype == np.float32


@pytest.mark.parametrize("mixed", [False, True])
def test_stacked_weights_stay_packed_where_all_are(mixed: bool) -> None:
    rng = np.random.default_rng(0)
    weights, plain = [], []
    for i, n in enumerate((2, 5)):
        codes = rng.integers(0, 16, (n, 64), np.uint8)
        scale = rng.random((n, 2), np.float32)
        plain.append(((codes.astype(np.float32) - 8).reshape(n, 2, 32) * scale[..., None]).reshape(n, 64))
        weights.append(QuantizedWeight(codes if mixed and i else PackedCodes((packed(codes),), 64), scale, 8.0, 4, 32))
    stacked = concat_rows(weights)
    assert isinstance(stacked.q, np.ndarray if mixed else PackedCodes)
    np.testing.assert_array_equal(stacked.dequantize(), np.concatenate(plain))
