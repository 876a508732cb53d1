"""Controls: kernels as TVM writes them, each right as it stands, and each wrong in every way that `mutant` knows.

Every mutant must be refused by the emulator or give a wrong result, under every seed. Those that survive, and why:

| kernel | mutant | why it may survive |
| --- | --- | --- |
| pipeline | waits for the newest group too | correct, only slower: the wait is stronger than it must be |
"""

from __future__ import annotations

import numpy as np
import pytest

from llmc.emulator.emulator import EmulationError, Emulator, available, poisoned

pytestmark = pytest.mark.skipif(not available(), reason="no g++ 12 for x86-64")

TILED = r"""
extern "C" __global__ void __launch_bounds__(256) tiled(float* a, float* b, float* c, int K, int mutant) {
  __shared__ alignas(64) float sa[256];
  __shared__ alignas(64) float sb[256];
  float sum = 0;
  int tx = threadIdx.x & 15, ty = threadIdx.x >> 4;
  for (int k = 0; k < K; k += 16) {
    if (mutant != 1) __syncthreads();
    sa[ty * 16 + tx] = a[(blockIdx.y * 16 + ty) * K + k + tx + (mutant == 3)];
    sb[ty * 16 + tx] = b[(k + ty) * (gridDim.x * 16) + blockIdx.x * 16 + tx];
    if (mutant != 2) __syncthreads();
    for (int i = 0; i < 16 + (mutant == 7); ++i)
      sum += sa[ty * 16 + i + (mutant == 4)] * sb[(i + (mutant == 5)) * 16 + tx];
  }
  c[(blockIdx.y * 16 + ty) * (gridDim.x * 16) + blockIdx.x * 16 + tx + (mutant == 6)] = sum;
}
"""

REDUCTION = r"""
extern "C" __global__ void __launch_bounds__(128) reduction(float* x, float* out, int n, int mutant) {
  __shared__ float parts[4];
  float sum = 0;
  for (int i = threadIdx.x; i < n; i += 128 + (mutant == 5)) sum += x[blockIdx.x * n + i];
  uint mask = __activemask();
  for (int distance = mutant == 3 ? 8 : 16; distance > (mutant == 4); distance >>= 1)
    sum += __shfl_down_sync(mask, sum, distance, 32);
  if ((threadIdx.x & 31) == 0) parts[threadIdx.x >> 5] = sum;
  if (mutant != 1) __syncthreads();
  if (threadIdx.x < 4) {
    sum = parts[threadIdx.x + (mutant == 6)];
    for (int distance = 2; distance > 0; distance >>= 1)
      sum += __shfl_down_sync(mutant == 7 ? 3u : 15u, sum, distance, 4);
    if (threadIdx.x == 0) parts[0] = sum;
  }
  if (mutant != 2) __syncthreads();
  out[blockIdx.x * 128 + threadIdx.x] = parts[0];
}
"""

# c [M, N] float32 = a [M, K] float16, b [N, K] float16: a block of 4 warps makes 64 x 64, three stages of 32 deep.
PIPELINE = r"""
__device__ __forceinline__ uint32_t smem(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ __forceinline__ int swizzled(int row, int chunk, int off) {
  return row * 32 + ((chunk ^ ((row >> 1) & 3)) + off) % 4 * 8;
}
__device__ __forceinline__ void copy(half* to, const half* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" : : "r"(smem(to)), "l"(from), "r"(bytes) : "memory");
}
extern "C" __global__ void __launch_bounds__(128) pipeline(half* a, half* b, float* c, int K, int mutant) {
  extern __shared__ __align__(128) uchar memory[];
  half* sa = (half*)memory;
  half* sb = sa + 3 * 64 * 32;
  int t = threadIdx.x, lane = t & 31, warp = t >> 5, steps = K / 32;
  float acc[8][4];
  for (int i = 0; i < 8; ++i) for (int j = 0; j < 4; ++j) acc[i][j] = 0;
  for (int s = 0; s < 2; ++s) {
    for (int i = 0; i < 2; ++i) {
      int row = i * 32 + (t >> 2), chunk = t & 3, at = s * 2048 + swizzled(row, chunk, 0);
      copy(sa + at, a + (blockIdx.y * 64 + row) * K + s * 32 + chunk * 8, mutant == 8 ? 8 : 16);
      copy(sb + at, b + (blockIdx.x * 64 + row) * K + s * 32 + chunk * 8, 16);
    }
    if (mutant != 4) asm volatile("cp.async.commit_group;");
  }
  for (int k = 0; k < steps; ++k) {
    if (mutant == 9) asm volatile("cp.async.wait_group 0;" ::: "memory");
    else if (mutant == 2) asm volatile("cp.async.wait_group 2;" ::: "memory");
    else if (mutant != 1) asm volatile("cp.async.wait_group 1;" ::: "memory");
    if (mutant != 3) __syncthreads();
    int next = k + 2;
    if (next < steps) {
      int stage = (next + (mutant == 5)) % 3 * 2048;
      for (int i = 0; i < 2; ++i) {
        int row = i * 32 + (t >> 2), chunk = t & 3, at = stage + swizzled(row, chunk, mutant == 6);
        copy(sa + at, a + (blockIdx.y * 64 + row) * K + next * 32 + chunk * 8, 16);
        copy(sb + at, b + (blockIdx.x * 64 + row) * K + next * 32 + chunk * 8, 16);
      }
    }
    asm volatile("cp.async.commit_group;");
    half* pa = sa + k % 3 * 2048;
    half* pb = sb + k % 3 * 2048;
    for (int kk = 0; kk < 2; ++kk) {
      uint32_t fa[4], fb[2];
      int row = warp * 16 + (lane & 15), chunk = kk * 2 + (lane >> 4);
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(fa[0]), "=r"(fa[1]), "=r"(fa[2]), "=r"(fa[3])
        : "r"(smem(pa + swizzled(row, chunk, mutant == 7))) : "memory");
      for (int n = 0; n < 8; ++n) {
        int column = n * 8 + (lane & 7), part = kk * 2 + ((lane >> 3) & 1);
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
          : "=r"(fb[0]), "=r"(fb[1]) : "r"(smem(pb + swizzled(column, part, 0))) : "memory");
        if (mutant == 10) { uint32_t other = fa[1]; fa[1] = fa[2]; fa[2] = other; }
        if (mutant == 11) { uint32_t other = fb[0]; fb[0] = fb[1]; fb[1] = other; }
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
          "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
          : "+f"(acc[n][0]), "+f"(acc[n][1]), "+f"(acc[n][2]), "+f"(acc[n][3])
          : "r"(fa[0]), "r"(fa[1]), "r"(fa[2]), "r"(fa[3]), "r"(fb[0]), "r"(fb[1]));
        if (mutant == 10) { uint32_t other = fa[1]; fa[1] = fa[2]; fa[2] = other; }
      }
    }
  }
  for (int n = 0; n < 8; ++n)
    for (int i = 0; i < 4; ++i) {
      int row = blockIdx.y * 64 + warp * 16 + (lane >> 2) + (i >> 1) * 8;
      int column = blockIdx.x * 64 + n * 8 + (lane & 3) * 2 + (mutant == 12 ? !(i & 1) : i & 1);
      c[row * (gridDim.x * 64) + column] = acc[n][i];
    }
}
"""

# out [64, 32] = softmax(q k^T) v, one row of q a thread, keys and values by tiles of 32 in shared memory.
SOFTMAX = r"""
extern "C" __global__ void __launch_bounds__(64) attention(
    float* q, float* k, float* v, float* out, int keys, int mutant) {
  __shared__ alignas(16) float sk[1024];
  __shared__ alignas(16) float sv[1024];
  float mine[32], sum[32], scores[32], most = -1e30f, total = 0;
  for (int d = 0; d < 32; ++d) mine[d] = q[threadIdx.x * 32 + d], sum[d] = 0;
  for (int tile = 0; tile < keys; tile += 32) {
    if (mutant != 1) __syncthreads();
    for (int i = 0; i < 4; ++i) {
      int at = (i * 64 + threadIdx.x) * 4;
      *(float4*)(sk + at) = *(float4*)(k + tile * 32 + at);
      *(float4*)(sv + at) = *(float4*)(v + tile * 32 + at + (mutant == 7 ? 4 : 0));
    }
    if (mutant != 2) __syncthreads();
    float best = most;
    for (int j = 0; j < 32; ++j) {
      float score = 0;
      for (int d = 0; d < 32; ++d) score += mine[d] * sk[(j + (mutant == 3)) * 32 + d];
      scores[j] = score;
      best = max(best, score);
    }
    float scale = mutant == 4 ? 1 : __expf(most - best);
    for (int d = 0; d < 32; ++d) sum[d] *= scale;
    total *= mutant == 5 ? 1 : scale;
    for (int j = 0; j < 32 - (mutant == 6); ++j) {
      float p = __expf(scores[j] - best);
      total += p;
      for (int d = 0; d < 32; ++d) sum[d] += p * sv[j * 32 + d];
    }
    most = best;
  }
  for (int d = 0; d < 32; ++d) out[threadIdx.x * 32 + d] = sum[d] / total;
}
"""


@pytest.fixture(scope="module")
def kernels() -> Emulator:
    head = "#define uint unsigned\n#define uchar unsigned char\n"
    return Emulator(head + TILED + REDUCTION + PIPELINE + SOFTMAX)


def tiled(kernels: Emulator, mutant: int, seed: int) -> float:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((32, 48)).astype("f4"), rng.standard_normal((48, 32)).astype("f4")
    c = poisoned((32, 32), "f4")
    kernels.launch("tiled", (2, 2), (256,), [a, b, c, 48, mutant], seed=seed)
    return float(np.abs(c - a.astype("f8") @ b).max()) / 1e-5


def reduction(kernels: Emulator, mutant: int, seed: int) -> float:
    x = np.random.default_rng(0).standard_normal((3, 700)).astype("f4")
    out = poisoned((3, 128), "f4")
    kernels.launch("reduction", (3,), (128,), [x, out, 700, mutant], seed=seed)
    return float(np.abs(out - x.astype("f8").sum(1)[:, None]).max()) / 1e-4


def pipeline(kernels: Emulator, mutant: int, seed: int, size: int = 128) -> float:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((size, 128)).astype("f2") for _ in range(2))
    c = poisoned((size, size), "f4")
    grid = (size // 64, size // 64)
    kernels.launch("pipeline", grid, (128,), [a, b, c, 128, mutant], shared_bytes=6 * 64 * 32 * 2, seed=seed)
    return float(np.abs(c - a.astype("f8") @ b.T.astype("f8")).max()) / 1e-4


def attention(kernels: Emulator, mutant: int, seed: int) -> float:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((64, 32)), rng.standard_normal((96, 32)), rng.standard_normal((96, 32))
    out = poisoned((64, 32), "f4")
    args = [x.astype("f4") for x in (q, k, v)]
    kernels.launch("attention", (1,), (64,), [*args, out, 96, mutant], seed=seed)
    scores = np.exp(q @ k.T - (q @ k.T).max(1, keepdims=True))
    return float(np.abs(out - scores @ v / scores.sum(1, keepdims=True)).max()) / 1e-5


KERNELS = {"tiled": (tiled, 7), "reduction": (reduction, 7), "pipeline": (pipeline, 12), "attention": (attention, 7)}
SURVIVORS = {("pipeline", 9)}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", KERNELS)
def test_the_kernels_are_right(kernels: Emulator, name: str, seed: int) -> None:
    assert KERNELS[name][0](kernels, 0, seed) < 1  # in units of its tolerance


@pytest.mark.parametrize(
    "mutant", [(name, i) for name, (_, count) in KERNELS.items() for i in range(1, count + 1)], ids=str
)
def test_mutants_are_caught(kernels: Emulator, mutant: tuple[str, int]) -> None:
    for seed in range(2):
        try:
            error = KERNELS[mutant[0]][0](kernels, mutant[1], seed)
        except EmulationError:
            error = np.nan
        assert (error < 1) == (mutant in SURVIVORS)  # NaN is not less
