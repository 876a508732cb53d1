"""Products of warpgroups and bulk copies: layouts against the PTX ISA's tables, written down element by element, and a
kernel that is right as it stands, and wrong in every way that `mutant` knows.

Those that survive, and why:

| kernel | mutant | why it may survive |
| --- | --- | --- |
| pipeline | waits for the phase twice | correct: a phase that is complete stays so until the next one is |
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from llmc.emulator.emulator import EmulationError, Emulator, available, poisoned
from llmc.emulator.translate import TranslationError, translate

pytestmark = pytest.mark.skipif(not available(), reason="no g++ 12 for x86-64")

DTYPES = {
    "f16": np.dtype("f2"), "bf16": np.dtype(ml_dtypes.bfloat16), "s8": np.dtype("i1"), "u8": np.dtype("u1"),
    "e4m3": np.dtype(ml_dtypes.float8_e4m3fn), "e5m2": np.dtype(ml_dtypes.float8_e5m2), "f32": np.dtype("f4"),
    "s32": np.dtype("i4"),
}  # fmt: skip
CASES = (
    "m64n8k16.f32.f16.f16", "m64n40k16.f32.bf16.bf16", "m64n64k16.f32.f16.f16", "m64n24k32.s32.s8.s8",
    "m64n16k32.s32.u8.s8", "m64n32k32.f32.e4m3.e4m3", "m64n8k32.f32.e5m2.e4m3",
)  # fmt: skip


def operands(first: int, count: int) -> str:
    return "{" + ", ".join(f"%{first + i}" for i in range(count)) + "}"


def product(name: str, d: str, a: str, b: str, accumulate: str = "1", sign: str = "1, ") -> str:
    """An asm statement; `a` names four registers, or a descriptor."""
    N, kinds = int(name.split("n")[1].split("k")[0]), name.split(".")
    letter, count = "f" if kinds[1] == "f32" else "r", N // 2
    registers = "[" in a
    into = ", ".join(f'"+{letter}"({d}[{i}])' for i in range(count))
    taken = [f'"r"({a.replace("[]", f"[{i}]")})' for i in range(4)] if registers else [f'"l"({a})']
    at = count + len(taken)
    first = operands(count, 4) if registers else f"%{count}"
    options = "" if kinds[1] == "s32" else f", {sign}1" + (", 0" * (2 - registers) if "16" in kinds[2] else "")
    return (
        f'asm volatile("{{ .reg .pred p; setp.ne.b32 p, %{at + 1}, 0; wgmma.mma_async.sync.aligned.{name} '
        f'{operands(0, count)}, {first}, %{at}, p{options}; }}" : {into} : {", ".join(taken)}, "l"({b}), '
        f'"r"({accumulate}));'
    )


def layouts(number: int, name: str) -> str:
    """d := a b, then d += a b, with a from registers, or from shared memory."""
    count = int(name.split("n")[1].split("k")[0]) // 2
    register = "float" if name.split(".")[1] == "f32" else "int"
    return f"""
extern "C" __global__ void __launch_bounds__(128) k{number}(
    uchar* a, uchar* b, uint* fragments, uint64_t a_shape, uint64_t b_shape, int in_registers, {register}* d) {{
  __shared__ alignas(1024) uchar sa[16384];
  __shared__ alignas(1024) uchar sb[16384];
  int t = threadIdx.x;
  for (int i = 0; i < 128; ++i) sa[t * 128 + i] = a[t * 128 + i], sb[t * 128 + i] = b[t * 128 + i];
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  uint64_t da = a_shape + (((uint32_t)__cvta_generic_to_shared(sa) & 0x3ffff) >> 4);
  uint64_t db = b_shape + (((uint32_t)__cvta_generic_to_shared(sb) & 0x3ffff) >> 4);
  uint f[4];
  for (int i = 0; i < 4; ++i) f[i] = fragments[t * 4 + i];
  {register} c[{count}];
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  if (in_registers) {{
    {product(name, "c", "f[]", "db", "0")}
    {product(name, "c", "f[]", "db")}
  }} else {{
    {product(name, "c", "da", "db", "0")}
    {product(name, "c", "da", "db")}
  }}
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  for (int i = 0; i < {count}; ++i) d[t * {count} + i] = c[i];
}}"""


@pytest.fixture(scope="module")
def products() -> Emulator:
    head = "#define uint unsigned\n#define uchar unsigned char\n"
    return Emulator(head + "\n".join(layouts(n, name) for n, name in enumerate(CASES)))


def in_shared(matrix: np.ndarray, swizzle: int, k_offset: int) -> tuple[np.ndarray, int]:
    """(bytes, descriptor without the address) of rows of 32 bytes, from `k_offset` bytes of a row on. PTX ISA, figures
    "K major interleaved", "K major 32B swizzling", 64B, 128B: eight rows of chunks of 16 bytes; chunk c of row r
    is in column c ^ r for 128 bytes, c ^ r / 2 for 64, c ^ r / 4 for 32."""
    rows = np.ascontiguousarray(matrix).view(np.uint8).reshape(len(matrix), 2, 16)
    memory = np.random.default_rng(0).integers(0, 256, 16384, np.uint8)
    for r, row in enumerate(rows):
        block, line = divmod(r, 8)
        for c in range(2):
            if not swizzle:  # cores of 8 rows by 16 bytes: along rows they follow one another, along k 4096 bytes apart
                at = block * 128 + line * 16 + c * 4096
            else:
                chunks = swizzle // 16
                column = (c + k_offset // 16) ^ (line // (8 // chunks))
                at = block * 8 * swizzle + line * swizzle + column * 16
            memory[at : at + 16] = row[c]
    kind = {0: 0, 128: 1, 64: 2, 32: 3}[swizzle]
    stride, leading = (8 * swizzle, 16) if swizzle else (128, 4096)
    return memory, kind << 62 | stride >> 4 << 32 | leading >> 4 << 16 | k_offset >> 4


def fragments_of(a: np.ndarray) -> np.ndarray:
    """[128, 4] uint32. PTX ISA, "WGMMA .m64nNk16 register fragment layout for matrix A" (8 bits: .m64nNk32): for each
    warp as mma's of 16 rows."""
    e = 4 // a.itemsize
    lanes = []
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        for i in range(4):
            row = 16 * warp + (lane >> 2) + 8 * (i & 1)
            column = (lane % 4) * e + (4 * e if i >= 2 else 0)
            lanes.append(a[row, column : column + e])
    return np.array(lanes, a.dtype).view(np.uint32).reshape(128, 4)


def accumulator(thread: int, i: int) -> tuple[int, int]:
    """PTX ISA, "WGMMA .m64nNk16 register fragment layout for accumulator matrix D"."""
    row = 16 * (thread // 32) + (thread % 32 >> 2) + (8 if i % 4 >= 2 else 0)
    return row, (thread % 4) * 2 + (i & 1) + 8 * (i // 4)


def values(rng: np.random.Generator, shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    """Of few bits, so that float32 adds their products exactly."""
    if dtype.kind in "iu":
        return rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, shape, dtype, endpoint=True)
    return rng.integers(-7, 8, shape).astype("f4").astype(dtype)


@pytest.mark.parametrize("name", CASES)
def test_products_by_the_tables(products: Emulator, name: str) -> None:
    kinds = name.split(".")
    td, ta, tb = (DTYPES[kind] for kind in kinds[1:])
    N, K = int(name.split("n")[1].split("k")[0]), int(kinds[0].split("k")[1])
    rng = np.random.default_rng(N)
    a, b = values(rng, (64, K), ta), values(rng, (N, K), tb)
    wide = np.float64 if td.kind == "f" else np.int64
    want = 2 * (a.astype(wide) @ b.astype(wide).T)
    for swizzle, offset, in_registers in ((0, 0, 0), (32, 0, 0), (64, 32, 0), (128, 96, 0), (128, 0, 1), (64, 0, 1)):
        a_bytes, a_shape = in_shared(a, swizzle, offset)
        b_bytes, b_shape = in_shared(b, swizzle, offset)
        out = poisoned((128, N // 2), td)
        arguments = [a_bytes, b_bytes, fragments_of(a), a_shape, b_shape, in_registers, out]
        products.launch(f"k{CASES.index(name)}", (1,), (128,), arguments)
        got = np.zeros((64, N), td)
        for thread in range(128):
            for i in range(N // 2):
                got[accumulator(thread, i)] = out[thread, i]
        np.testing.assert_array_equal(got, want.astype(td))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (1 << 49 | 1 << 62 | 64 << 32, "base offset"),
        (1 << 62 | 64 << 32 | 128 >> 4, "do not begin where"),
        (1 << 62 | 65 << 32, "do not begin where"),
        (1 << 62 | 64 << 32 | 112 >> 4, "run over"),
        (4095 << 32, "not|never|byte|shared"),
    ],
)
def test_descriptors_that_are_refused(products: Emulator, shape: int, message: str) -> None:
    zeros, out = np.zeros(16384, np.uint8), poisoned((128, 32), "f4")
    with pytest.raises(EmulationError, match=message):
        products.launch("k2", (1,), (128,), [zeros, zeros, np.zeros((128, 4), np.uint32), 0, shape, 1, out])


# y [64, 32] float32 = a [64, K] b [32, K]^T: a comes by bulk copies, by steps of 16 as cores of 8 rows by 16 bytes; b
# is rounded by the threads. Two stages.
PIPELINE = r"""
#define uint unsigned
#define uchar unsigned char
__device__ __forceinline__ uint32_t smem(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ __forceinline__ uint64_t matrix(const void* p, int leading, int stride) {
  return (smem(p) & 0x3ffff) >> 4 | (uint64_t)(leading >> 4) << 16 | (uint64_t)(stride >> 4) << 32;
}
__device__ __forceinline__ bool passed(uint64_t* phase, int parity) {
  uint32_t done;
  asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }"
    : "=r"(done) : "r"(smem(phase)), "r"(parity) : "memory");
  return done;
}
__device__ __forceinline__ void copy(uchar* to, const uchar* from, uint64_t* phase, int mutant) {
  if (mutant != 3)
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
      : : "r"(smem(phase)), "r"(mutant == 4 ? 4096 : 2048) : "memory");
  if (mutant == 22) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" : : "r"(smem(phase)) : "memory");
  if (mutant != 5)
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
      : : "r"(smem(to)), "l"(from), "r"(2048), "r"(smem(phase)) : "memory");
}
extern "C" __global__ void __launch_bounds__(128) pipeline(uchar* a, float* b, float* y, int steps, int mutant) {
  __shared__ alignas(1024) uchar sa[4096];
  __shared__ alignas(1024) half sb[1024];
  __shared__ alignas(8) uint64_t full[2];
  int t = threadIdx.x, warp = t >> 5;
  if (t == 0) {
    for (int i = 0; i < 2; ++i)
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;"
        : : "r"(smem(full + i)), "r"(mutant == 21 ? 2 : 1) : "memory");
    if (mutant != 1) asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    for (int i = 0; i < 2; ++i) copy(sa + i * 2048, a + i * 2048, full + i, mutant);
  }
  if (mutant != 2) __syncthreads();
  float c[16];
  for (int s = 0; s < steps; ++s) {
    int slot = s & 1, parity = mutant == 7 ? 0 : s >> 1 & 1;
    if (mutant == 8) passed(full + slot, parity);
    else if (mutant != 6) while (!passed(full + slot, parity)) {}
    if (mutant == 25) while (!passed(full + slot, parity)) {}
    for (int i = 0; i < 4; ++i) {
      int row = t >> 2, k = (t & 3) * 4 + i;
      half value = (half)b[row * steps * 16 + s * 16 + k];
      sb[slot * 512 + (row >> 3) * 64 + (row & 7) * 8 + (k >> 3) * 256 + (k & 7)] = value;
    }
    if (mutant != 9) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    if (mutant != 10) __syncthreads();
    uint64_t da = matrix(sa + slot * 2048, 1024, 128), db = matrix(sb + slot * 512, 512, 128);
    if (mutant == 18) da = matrix(sa + slot * 2048, 128, 1024);
    if (mutant == 19 && warp == 2) db = matrix(sb, 512, 128);
    if (mutant != 11) asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    if (mutant != 20 || warp != 3) {
      WGMMA
    }
    if (mutant != 12) asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    if (mutant == 16) c[3] = 0;
    if (mutant == 17 && t == 0) sb[slot * 512 + 5] = (half)0.0f;
    if (mutant == 26) {
      __syncthreads();
      if (t == 0) sb[slot * 512 + 5] = (half)0.0f;
      __syncthreads();
    }
    if (mutant == 14) asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
    else if (mutant != 13) asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    if (mutant == 24) c[3] = c[3] + 1;
    if (mutant != 15) __syncthreads();
    if (t == 0 && s + 2 < steps) copy(sa + slot * 2048, a + (s + 2) * 2048, full + slot, mutant);
  }
  for (int i = 0; i < 16; ++i)
    y[(16 * warp + ((t & 31) >> 2) + 8 * (i >> 1 & 1)) * 32 + 8 * (i >> 2) + 2 * (t & 3) + (i & 1)] = c[i];
}
""".replace("WGMMA", product("m64n32k16.f32.f16.f16", "c", "da", "db", "mutant == 23 || s"))
# 23 has accumulators of rubbish at first.
SURVIVES = {25}
STEPS = 6


@pytest.fixture(scope="module")
def pipelines() -> Emulator:
    return Emulator(PIPELINE)


def error_of(pipelines: Emulator, mutant: int, seed: int) -> float:
    rng = np.random.default_rng(0)
    a, b = rng.integers(-8, 9, (64, STEPS * 16)).astype("f2"), rng.integers(-8, 9, (32, STEPS * 16)).astype("f4")
    cores = a.reshape(8, 8, STEPS, 2, 8).transpose(2, 3, 0, 1, 4)
    y = poisoned((64, 32), "f4")
    packed = np.ascontiguousarray(cores).view(np.uint8).reshape(-1)
    pipelines.launch("pipeline", (1,), (128,), [packed, b, y, STEPS, mutant], seed=seed)
    return float(np.abs(y - a.astype("f8") @ b.astype("f8").T).max())


@pytest.mark.parametrize("seed", range(4))
def test_the_pipeline_is_right(pipelines: Emulator, seed: int) -> None:
    assert error_of(pipelines, 0, seed) == 0


@pytest.mark.parametrize("mutant", sorted({*range(1, 27)} - SURVIVES))
def test_mutants_are_caught(pipelines: Emulator, mutant: int) -> None:
    for seed in range(3):
        try:
            wrong = error_of(pipelines, mutant, seed) != 0  # NaN, too
        except EmulationError:
            wrong = True
        assert wrong, f"mutant {mutant} survives seed {seed}"


@pytest.mark.parametrize("mutant", sorted(SURVIVES))
def test_survivors_are_right(pipelines: Emulator, mutant: int) -> None:
    assert error_of(pipelines, mutant, 1) == 0


MESSAGES = {
    1: "no fence has made known",
    2: "mbarrier",
    3: "nobody can go on|waits for a phase",
    6: "asynchronous copy .* is under way",
    9: "fence.proxy.async",
    10: "wrote",
    11: "without wgmma.fence",
    15: "read|was written before the wait",
    16: "an accumulator was written",
    17: "nothing in between",
    26: "was written before the wait",
    19: "differs between the warps",
    20: "not all warps|barrier",
}


@pytest.mark.parametrize("mutant", MESSAGES)
def test_the_message_names_the_fault(pipelines: Emulator, mutant: int) -> None:
    with pytest.raises(EmulationError, match=MESSAGES[mutant]):
        error_of(pipelines, mutant, 1)


@pytest.mark.parametrize(
    "instruction",
    [
        product("m64n8k16.f32.f16.f16", "c", "d", "d", sign="-1, "),
        product("m64n8k16.f16.f16.f16", "c", "d", "d"),
        product("m64n8k8.f32.tf32.tf32", "c", "d", "d"),
        'asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" : : "r"(x));',
        'asm volatile("mbarrier.init.b64 [%0], 1;" : : "l"(d));',
        'asm volatile("fence.proxy.alias;");',
    ],
)
def test_what_is_not_emulated_is_refused(instruction: str) -> None:
    body = f"uint64_t d = 0; unsigned x = 0; float c[4]; {instruction}"
    with pytest.raises(TranslationError, match="not emulated"):
        translate(f'extern "C" __global__ void refused() {{ {body} }}')
