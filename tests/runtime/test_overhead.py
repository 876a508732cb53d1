"""A token of a small model takes two milliseconds: what Python adds to it must stay out of sight."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from llmc.runtime import load
from tests.runtime import toys


def test_a_token_costs_little_python(tmp_path: Path) -> None:
    session = load(toys.write_decoder(tmp_path / "m.llmc")).session()
    session.append([1])
    token, least = np.array([2]), float("inf")
    for _ in range(500):
        session.truncate(1)
        start = time.perf_counter()
        session.append(token)
        least = min(least, time.perf_counter() - start)
    assert least < 200e-6  # 6 us on a free machine; this only catches a mistake of another order
