"""GatherBlockQuantized, the lookup in a quantised table, against onnxruntime."""

import numpy as np
import pytest

from .harness import Compiled, case, check

rng = np.random.default_rng(0)
V, E, BLOCK = 20, 96, 32
IDS = rng.integers(0, V, (2, 3))
SCALE = rng.random((V, E // BLOCK), np.float32)
BYTES = rng.integers(0, 256, (V, E), np.uint8)
ATTRS = {"domain": "com.microsoft", "gather_axis": 0, "quantize_axis": 1, "block_size": BLOCK}

CASES = [
    case("GatherBlockQuantized", BYTES, IDS, SCALE, bits=8, const=[0, 2], **ATTRS),
    case("GatherBlockQuantized", BYTES, IDS, SCALE, bits=8, const=[0, 2], dims={1: ("b", "s")}, **ATTRS),
    case("GatherBlockQuantized", BYTES[:, : E // 2], IDS, SCALE, bits=4, const=[0, 2], label="nibbles", **ATTRS),
]


@pytest.fixture(scope="module")
def compiled():
    return Compiled(CASES)


@pytest.mark.parametrize("c", CASES, ids=str)
def test_rule(compiled, c):
    check(compiled, c)
