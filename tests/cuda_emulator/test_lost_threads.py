"""What a thread does to its own variables is not judged access by access: where it loses its way, the launch ends, and
this process does not."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.emulator.emulator import EmulationError, Emulator, available, poisoned

pytestmark = pytest.mark.skipif(not available(), reason="no g++ 12 for x86-64")

KERNELS = r"""
extern "C" __global__ void beyond(float* out, int n) {
  float few[4];
  float* at = few;
  for (int i = 0; i < n; ++i) at[i] = (float)i;
  out[threadIdx.x] = few[n & 3] + few[(n + 1) & 3];
}
extern "C" __global__ void much(float* out, int n) {
  float many[100000];
  for (int i = 0; i < n; ++i) many[i * 1000] = (float)i;
  out[threadIdx.x] = many[n & 3];
}
extern "C" __global__ void anothers(float* out, int who) {
  __shared__ int64_t shown[1];
  float mine[1] = {1.0f};
  if (threadIdx.x == who) shown[0] = (int64_t)mine;
  __syncthreads();
  ((float*)shown[0])[0] = 2.0f;
  out[threadIdx.x] = mine[0];
}
"""


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    return Emulator(KERNELS)


@pytest.mark.parametrize(
    ("kernel", "number", "reason"),
    [
        ("beyond", 24, r"thread \(\d+, 0, 0\) is lost, after a write beyond its own variables"),
        ("beyond", 1 << 24, r"thread \(\d+, 0, 0\) writes memory beyond its own variables \(line 5\)"),
        ("much", 3, r"thread \(\d+, 0, 0\) has more variables than the 256 KiB of its stack hold"),
        ("anothers", 5, r"thread \(\d+, 0, 0\) writes memory beyond its own variables \(line 18\)"),
    ],
)
def test_the_launch_ends_and_says_why(emulator: Emulator, kernel: str, number: int, reason: str) -> None:
    for seed in range(3):
        with pytest.raises(EmulationError, match=f"{kernel}, block .*: {reason}"):
            emulator.launch(kernel, (2,), (64,), [poisoned(64, "f4"), number], seed=seed)
        out = poisoned(64, "f4")
        emulator.launch("beyond", (1,), (64,), [out, 4])
        np.testing.assert_array_equal(out, np.full(64, 1, "f4"))
