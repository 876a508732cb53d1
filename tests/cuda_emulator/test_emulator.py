"""What the emulator runs, and what it refuses: one small kernel for each."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.emulator.build import BuildError
from llmc.emulator.emulator import EmulationError, Emulator, available, poisoned
from llmc.emulator.translate import TranslationError

pytestmark = pytest.mark.skipif(not available(), reason="no g++ 12 for x86-64")

KERNELS = r"""
extern "C" __global__ void __launch_bounds__(64) indices(int* out) {
  int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  out[block * 24 + thread] = 1000 * block + thread;
}
extern "C" __global__ void reversed(float* x, int barriers) {
  __shared__ float s[64];
  s[threadIdx.x] = x[threadIdx.x];
  if (barriers > 0) __syncthreads();
  float y = s[63 - threadIdx.x];
  if (barriers > 1) __syncthreads();
  s[threadIdx.x] = y + 1;
  x[threadIdx.x] = s[threadIdx.x];
}
extern "C" __global__ void dynamic(float* x, int bytes) {
  extern __shared__ __align__(64) unsigned char memory[];
  float* s = (float*)memory;
  if (threadIdx.x == 0) s[bytes / 4 - 1] = x[0];
  __syncthreads();
  x[threadIdx.x] = s[bytes / 4 - 1];
}
extern "C" __global__ void unwritten(float* x) {
  __shared__ float s[32];
  if (threadIdx.x > 0) s[threadIdx.x] = 1;
  __syncthreads();
  x[threadIdx.x] = s[threadIdx.x];
}
extern "C" __global__ void outside(float* x, float* y, int at) {
  __shared__ float s[32];
  s[threadIdx.x] = 1;
  if (at >= 1000) x[0] = ((float*)s)[at - 1000];
  else x[0] = y[at];
}
extern "C" __global__ void too_far(float* x, int at) {
  float own[4] = {1, 2, 3, 4};
  x[0] = own[at];
}
extern "C" __global__ void misaligned(float* x, int at) { *(float4*)(x + at) = make_float4(1, 2, 3, 4); }
extern "C" __global__ void divergent(int* x, int how) {
  if (how == 0) { if (threadIdx.x < 40) return; __syncthreads(); }
  if (how == 1 && threadIdx.x < 40) __syncthreads();
  if (how == 1 && threadIdx.x >= 40) __syncthreads();
  if (how == 2) {
    if (threadIdx.x < 40) __syncthreads();
  }
  if (how == 3 && threadIdx.x < 8) x[0] = __shfl_sync(0xffffffff, 1, 0);
  if (how == 3 && threadIdx.x >= 8) __syncthreads();
  if (how == 4) x[threadIdx.x] = __shfl_sync(1u, 1, 0);
  if (how == 5) { for (int i = 0; i <= (int)threadIdx.x / 32; ++i) __syncthreads(); }
}
extern "C" __global__ void shuffles(int* out) {
  int t = threadIdx.x, *o = out + 12 * t;
  o[0] = __shfl_sync(0xffffffff, t, 5);
  o[1] = __shfl_sync(0xffffffff, t, 3, 8);
  o[2] = __shfl_up_sync(0xffffffff, t, 3);
  o[3] = __shfl_down_sync(0xffffffff, t, 3, 16);
  o[4] = __shfl_xor_sync(0xffffffff, t, 9);
  o[5] = t % 2 ? __shfl_xor_sync(0xaaaaaaaa, t, 4) : __shfl_xor_sync(0x55555555, 100 + t, 4);
  o[6] = __ballot_sync(0xffffffff, t % 3 == 0);
  o[7] = __any_sync(0xffffffff, t == 40) + 2 * __all_sync(0xffffffff, t >= 32);
  o[8] = t < 20 ? __activemask() : 0;
  o[9] = __reduce_add_sync(0xffffffff, t);
  o[10] = (int)__shfl_xor_sync(0xffffffff, (double)t, 1);
  o[11] = __reduce_max_sync(0xffffffff, -t);
}
extern "C" __global__ void warps(int* x, int mask) {
  __shared__ int s[64];
  s[threadIdx.x] = threadIdx.x;
  if (mask) __syncwarp(mask > 0 ? 0xffffffff : threadIdx.x % 2 ? 0xaaaaaaaa : 0x55555555);
  x[threadIdx.x] = s[threadIdx.x ^ 1];
}
extern "C" __global__ void counts(int* histogram, float* sum, int plain) {
  atomicAdd(&histogram[(blockIdx.x + threadIdx.x) % 4], 1);
  if (plain) *sum += 1; else atomicAdd(sum, 0.5f);
  atomicMax(&histogram[4], (int)threadIdx.x);
}
extern "C" __global__ void blocks(float* x, int shift) { x[(blockIdx.x + shift) / 2] = 1; }
extern "C" __global__ void halves(half* a, half* b, half* out, nv_bfloat16* c, nv_bfloat16* d) {
  int t = threadIdx.x;
  half2 v = __hmul2(__halves2half2(a[t], b[t]), half2(b[t], b[t]));
  out[5 * t] = a[t] + b[t];
  out[5 * t + 1] = __hfma(a[t], b[t], a[t]);
  out[5 * t + 2] = v.x;
  out[5 * t + 3] = v.y;
  out[5 * t + 4] = half((float)a[t] / (float)b[t]);
  d[t] = nv_bfloat16((float)a[t]) * c[t];
}
extern "C" __global__ void bytes(float* in, unsigned char* e4m3, unsigned char* e5m2, float* out) {
  int t = threadIdx.x;
  __nv_fp8_e4m3 x(in[t]);
  __nv_fp8_e5m2 y(in[t]);
  e4m3[t] = x.__x;
  e5m2[t] = y.__x;
  out[2 * t] = float(x);
  out[2 * t + 1] = float(y);
}
extern "C" __global__ void assembly(unsigned* x, float* f, unsigned* out) {
  unsigned p, q, r, s; float e;
  asm("lop3.b32 %0, %1, %2, %3, 0xe8;" : "=r"(p) : "r"(x[0]), "r"(x[1]), "r"(x[2]));
  asm("prmt.b32 %0, %1, %2, 0x5410;" : "=r"(q) : "r"(x[0]), "r"(x[1]));
  asm("{ .reg .pred p; setp.ne.b32 p, %1, 0; mov.u32 %0, 7; @p mov.u32 %0, 9; }" : "=r"(r) : "r"(x[3]));
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(s) : "f"(f[0]), "f"(f[1]));
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(f[2]));
  out[0] = p; out[1] = q; out[2] = r; out[3] = s; out[4] = __float_as_uint(e);
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2+8];" : "=r"(p), "=r"(q) : "l"(x));
  out[5] = p; out[6] = q;
}
"""


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    return Emulator(KERNELS)


def test_indices(emulator: Emulator) -> None:
    out = poisoned((12, 24), np.int32)
    emulator.launch("indices", (2, 3, 2), (4, 3, 2), [out], seed=3)
    np.testing.assert_array_equal(out, 1000 * np.arange(12)[:, None] + np.arange(24))
    with pytest.raises(EmulationError, match="__launch_bounds__"):
        emulator.launch("indices", (1,), (65,), [out])


@pytest.mark.parametrize("seed", range(3))
def test_barriers(emulator: Emulator, seed: int) -> None:
    x = np.arange(64, dtype="f4")
    emulator.launch("reversed", (1,), (64,), [x, 2], seed=seed)
    np.testing.assert_array_equal(x, np.arange(64)[::-1] + 1)
    with pytest.raises(EmulationError, match=r"(wrote|never written|read), with nothing|never written"):
        emulator.launch("reversed", (1,), (64,), [np.ones(64, "f4"), 0], seed=seed)
    with pytest.raises(EmulationError, match=r"line 14\)|line 15\)|line 11\)") as raised:  # the write after the read
        emulator.launch("reversed", (1,), (64,), [np.ones(64, "f4"), 1], seed=seed)
    assert "with nothing in between that orders them" in str(raised.value)


def test_dynamic_shared_memory(emulator: Emulator) -> None:
    x = np.arange(1, 65, dtype="f4")
    emulator.launch("dynamic", (1,), (64,), [x, 100 << 10], shared_bytes=100 << 10)
    assert (x == 1).all()
    with pytest.raises(EmulationError, match="outside of all arrays"):
        emulator.launch("dynamic", (1,), (64,), [x, 4096 + 4], shared_bytes=4096)
    with pytest.raises(EmulationError, match="more dynamic shared memory"):
        emulator.launch("dynamic", (1,), (64,), [x, 4], shared_bytes=228 << 10)


def test_shared_memory_begins_unwritten(emulator: Emulator) -> None:
    with pytest.raises(EmulationError, match=r"thread \(0, 0, 0\) reads byte 0 of s, which was never written"):
        emulator.launch("unwritten", (1,), (32,), [np.zeros(32, "f4")])


@pytest.mark.parametrize(
    ("at", "reason"), [(8, "buffer 1, which has 32"), (-1, "buffer 1"), (1032, "outside of all arrays")]
)
def test_memory_outside(emulator: Emulator, at: int, reason: str) -> None:
    with pytest.raises(EmulationError, match=reason):
        emulator.launch("outside", (1,), (1,), [np.zeros(8, "f4"), np.zeros(8, "f4"), at])


def test_indices_of_registers(emulator: Emulator) -> None:
    x = np.zeros(1, "f4")
    emulator.launch("too_far", (1,), (1,), [x, 3])
    assert x[0] == 4
    with pytest.raises(EmulationError, match="index 4 is outside of the array"):
        emulator.launch("too_far", (1,), (1,), [x, 4])


def test_alignment(emulator: Emulator) -> None:
    x = np.zeros(8, "f4")
    emulator.launch("misaligned", (1,), (1,), [x, 4])
    np.testing.assert_array_equal(x[4:], [1, 2, 3, 4])
    with pytest.raises(EmulationError, match="misaligned"):
        emulator.launch("misaligned", (1,), (1,), [x, 2])


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (0, "has exited"),
        (1, "barrier in line .* barrier in line"),
        (2, "has exited"),
        (3, "waits for the lanes 0xffffffff"),
        (4, "not in the mask"),
        (5, "has exited"),
    ],
)
def test_divergence(emulator: Emulator, how: int, reason: str) -> None:
    with pytest.raises(EmulationError, match=reason):
        emulator.launch("divergent", (1,), (64,), [np.zeros(64, "i4"), how])


def test_warp_functions(emulator: Emulator) -> None:
    out = poisoned((64, 12), np.int32)
    emulator.launch("shuffles", (1,), (64,), [out], seed=5)
    t = np.arange(64)
    lane, warp = t % 32, t // 32 * 32
    want = [
        warp + 5,
        t // 8 * 8 + 3,
        np.where(lane < 3, t, t - 3),
        np.where(t % 16 + 3 > 15, t, t + 3),
        t ^ 9,
        np.where(t % 2, t ^ 4, 100 + (t ^ 4)),
        [sum(1 << i for i in range(32) if (w + i) % 3 == 0) for w in warp],
        np.where(t < 32, 0, 1 + 2),
        np.where(t < 20, (1 << 20) - 1, 0),
        np.where(t < 32, np.arange(32).sum(), np.arange(32, 64).sum()),
        t ^ 1,
        -warp,
    ]
    np.testing.assert_array_equal(out.view(np.uint32), np.stack(want, 1).astype(np.uint32))


def test_warp_barriers_order_only_their_lanes(emulator: Emulator) -> None:
    x = np.zeros(64, "i4")
    emulator.launch("warps", (1,), (64,), [x, 1])
    np.testing.assert_array_equal(x, np.arange(64) ^ 1)
    for mask in (0, -1):  # none, and one of lanes that do not exchange anything
        with pytest.raises(EmulationError, match=r"with nothing in between|never written"):
            emulator.launch("warps", (1,), (64,), [x, mask])


def test_atomics(emulator: Emulator) -> None:
    histogram, total = np.zeros(5, "i4"), np.zeros(1, "f4")
    emulator.launch("counts", (8,), (64,), [histogram, total, 0])
    np.testing.assert_array_equal(histogram, [128, 128, 128, 128, 63])
    assert total[0] == 256
    with pytest.raises(EmulationError, match=r"another block|nothing in between"):
        emulator.launch("counts", (8,), (64,), [histogram, total, 1])


def test_blocks_are_not_ordered(emulator: Emulator) -> None:
    with pytest.raises(EmulationError, match="a thread of another block wrote"):
        emulator.launch("blocks", (4,), (1,), [np.zeros(4, "f4"), 0])


def test_numbers_of_two_bytes(emulator: Emulator) -> None:
    import ml_dtypes

    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(256).astype("f2") for _ in range(2))
    c, out = rng.standard_normal(256).astype(ml_dtypes.bfloat16), poisoned((256, 5), "f2")
    d = poisoned(256, "u2").view(ml_dtypes.bfloat16)
    emulator.launch("halves", (1,), (256,), [a, b, out, c, d])
    fused = (a.astype("f8") * b + a).astype("f2")
    divided = (a.astype("f4") / b.astype("f4")).astype("f2")
    np.testing.assert_array_equal(out, np.stack([a + b, fused, a * b, b * b, divided], 1))
    np.testing.assert_array_equal(d, a.astype(ml_dtypes.bfloat16) * c)


def test_numbers_of_one_byte(emulator: Emulator) -> None:
    import ml_dtypes

    every = np.arange(256, dtype=np.uint8)
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [rng.standard_normal(500) * 2.0 ** rng.integers(-18, 6, 500), [0.0, -0.0, 2.0**-10, 3 * 2.0**-10]]
    )
    x = np.concatenate([x, every.view(ml_dtypes.float8_e4m3fn).astype("f4")]).astype("f4")
    x = x[np.abs(x) < 440]  # beyond, CUDA saturates
    e4m3, e5m2, out = poisoned(len(x), "u1"), poisoned(len(x), "u1"), poisoned((len(x), 2), "f4")
    emulator.launch("bytes", (1,), (len(x),), [x, e4m3, e5m2, out])
    for got, dtype, i in ((e4m3, ml_dtypes.float8_e4m3fn, 0), (e5m2, ml_dtypes.float8_e5m2, 1)):
        np.testing.assert_array_equal(got, x.astype(dtype).view("u1"))
        np.testing.assert_array_equal(out[:, i], x.astype(dtype).astype("f4"))


def test_assembly(emulator: Emulator) -> None:
    x = np.array([0x12345678, 0xDEADBEEF, 0x0F0F0F0F, 1], "u4")
    f, out = np.array([1.5, -2.25, 3.0], "f4"), poisoned(7, "u4")
    emulator.launch("assembly", (1,), (1,), [x, f, out])
    a, b, c = (int(v) for v in x[:3])
    pair = np.array([-2.25, 1.5], "f2").view("u4")[0]
    want = [a & b | a & c | b & c, 0xBEEF5678, 9, pair, np.float32(8).view("u4"), c, 1]
    np.testing.assert_array_equal(out, np.array(want, "u4"))


def refused(body: str) -> str:
    with pytest.raises((TranslationError, BuildError)) as raised:
        Emulator(f'extern "C" __global__ void k(float* x) {{ unsigned a, b; {body} }}')
    return str(raised.value)


def test_unknown_instructions_are_named() -> None:
    assert "griddepcontrol.wait" in refused('asm volatile("griddepcontrol.wait;");')
    assert "bar.sync 1, 64" in refused('asm volatile("bar.sync 1, 64;");')
    assert "cvta.to.global" in refused('asm("cvta.to.global.u64 %0, %1;" : "=r"(a) : "r"(b));')
    wrong = '"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0}, {%1}, {%1}, {%0};" : "=r"(a) : "r"(b)'
    assert "registers of d, a, b, c" in refused(f"asm({wrong});")
    assert "curand" in refused("x[0] = curand();")


def test_a_source_without_a_kernel() -> None:
    with pytest.raises(TranslationError, match="no kernel"):
        Emulator("int x;")
