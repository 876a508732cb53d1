"""Instructions on fragments against the PTX ISA's tables, written down here element by element, as the tables are."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest

from llmc.emulator.emulator import Emulator, available, poisoned

pytestmark = pytest.mark.skipif(not available(), reason="no g++ 12 for x86-64")

Place = tuple[int, int]


# PTX ISA 8.x, "Matrix Fragments for mma.m16n8k16" and so on: groupID = lane >> 2, threadID_in_group = lane % 4.
def a_m16n8k16_f16(lane: int, i: int) -> Place:
    row = lane >> 2 if i in (0, 1, 4, 5) else (lane >> 2) + 8
    column = (lane % 4) * 2 + (i & 1) if i < 4 else (lane % 4) * 2 + (i & 1) + 8
    return row, column


def b_m16n8k16_f16(lane: int, i: int) -> Place:
    row = (lane % 4) * 2 + (i & 1) if i < 2 else (lane % 4) * 2 + (i & 1) + 8
    return row, lane >> 2


def c_m16n8(lane: int, i: int) -> Place:
    row = lane >> 2 if i < 2 else (lane >> 2) + 8
    return row, (lane % 4) * 2 + (i & 1)


def a_m16n8k8_f16(lane: int, i: int) -> Place:
    return (lane >> 2 if i < 2 else (lane >> 2) + 8), (lane % 4) * 2 + (i & 1)


def b_m16n8k8_f16(lane: int, i: int) -> Place:
    return (lane % 4) * 2 + i, lane >> 2


def a_m16n8k32_8bit(lane: int, i: int) -> Place:
    row = lane >> 2 if i < 4 or 8 <= i < 12 else (lane >> 2) + 8
    column = (lane % 4) * 4 + (i & 3) if i < 8 else (lane % 4) * 4 + (i & 3) + 16
    return row, column


def b_m16n8k32_8bit(lane: int, i: int) -> Place:
    row = (lane % 4) * 4 + (i & 3) if i < 4 else (lane % 4) * 4 + (i & 3) + 16
    return row, lane >> 2


def a_m16n8k16_8bit(lane: int, i: int) -> Place:
    return (lane >> 2 if i < 4 else (lane >> 2) + 8), (lane % 4) * 4 + (i & 3)


def b_m16n8k16_8bit(lane: int, i: int) -> Place:
    return (lane % 4) * 4 + i, lane >> 2


def a_m8n8k16_8bit(lane: int, i: int) -> Place:
    return lane >> 2, (lane % 4) * 4 + i


def b_m8n8k16_8bit(lane: int, i: int) -> Place:
    return (lane % 4) * 4 + i, lane >> 2


def c_m8n8(lane: int, i: int) -> Place:
    return lane >> 2, (lane % 4) * 2 + i


def a_m16n8k8_tf32(lane: int, i: int) -> Place:
    row = lane >> 2 if i in (0, 2) else (lane >> 2) + 8
    return row, (lane % 4 if i < 2 else lane % 4 + 4)


def b_m16n8k8_tf32(lane: int, i: int) -> Place:
    return (lane % 4 if i == 0 else lane % 4 + 4), lane >> 2


Table = Callable[[int, int], Place]
F16 = (a_m16n8k16_f16, b_m16n8k16_f16, c_m16n8)
BYTES = (a_m16n8k32_8bit, b_m16n8k32_8bit, c_m16n8)
CASES: dict[str, tuple[tuple[int, int], tuple[Table, Table, Table]]] = {
    "m16n8k16.row.col.f32.f16.f16.f32": ((16, 16), F16),
    "m16n8k16.row.col.f16.f16.f16.f16": ((16, 16), F16),
    "m16n8k16.row.col.f32.bf16.bf16.f32": ((16, 16), F16),
    "m16n8k8.row.col.f32.f16.f16.f32": ((16, 8), (a_m16n8k8_f16, b_m16n8k8_f16, c_m16n8)),
    "m16n8k8.row.col.f32.tf32.tf32.f32": ((16, 8), (a_m16n8k8_tf32, b_m16n8k8_tf32, c_m16n8)),
    "m16n8k32.row.col.s32.s8.s8.s32": ((16, 32), BYTES),
    "m16n8k32.row.col.s32.u8.s8.s32": ((16, 32), BYTES),
    "m16n8k32.row.col.s32.s8.u8.s32": ((16, 32), BYTES),
    "m16n8k32.row.col.f32.e4m3.e4m3.f32": ((16, 32), BYTES),
    "m16n8k32.row.col.f32.e5m2.e4m3.f32": ((16, 32), BYTES),
    "m16n8k16.row.col.s32.s8.s8.s32": ((16, 16), (a_m16n8k16_8bit, b_m16n8k16_8bit, c_m16n8)),
    "m8n8k16.row.col.s32.s8.s8.s32": ((8, 16), (a_m8n8k16_8bit, b_m8n8k16_8bit, c_m8n8)),
}
DTYPES = {
    "f16": np.dtype("f2"), "bf16": np.dtype(ml_dtypes.bfloat16), "tf32": np.dtype("f4"), "f32": np.dtype("f4"),
    "s8": np.dtype("i1"), "u8": np.dtype("u1"), "s32": np.dtype("i4"), "e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "e5m2": np.dtype(ml_dtypes.float8_e5m2),
}  # fmt: skip


def kernel(number: int, name: str, sizes: tuple[int, int, int]) -> str:
    """Each lane reads the registers of its fragments from rows of its own, and writes those of d."""
    letter = "f" if name.split(".")[3] == "f32" else "r"
    register = "float" if letter == "f" else "unsigned"
    d, a, b = sizes
    groups, first = [], 0
    for count in (d, a, b, d):
        groups.append("{" + ", ".join(f"%{first + i}" for i in range(count)) + "}")
        first += count
    out = ", ".join(f'"={letter}"(d[t * {d} + {i}])' for i in range(d))
    ins = [f'"r"(a[t * {a} + {i}])' for i in range(a)] + [f'"r"(b[t * {b} + {i}])' for i in range(b)]
    ins += [f'"{letter}"(c[t * {d} + {i}])' for i in range(d)]
    return f"""
extern "C" __global__ void __launch_bounds__(32) k{number}(unsigned* a, unsigned* b, {register}* c, {register}* d) {{
  int t = threadIdx.x;
  asm volatile("mma.sync.aligned.{name} {", ".join(groups)};" : {out} : {", ".join(ins)});
}}"""


def registers(name: str) -> tuple[int, int, int]:
    (M, K), types = CASES[name][0], name.split(".")[3:]
    bits = [DTYPES[t].itemsize * 8 for t in types]
    return M * 8 * bits[0] // 1024, M * K * bits[1] // 1024, 8 * K * bits[2] // 1024


@pytest.fixture(scope="module")
def products() -> Emulator:
    return Emulator("\n".join(kernel(n, name, registers(name)) for n, name in enumerate(CASES)))


def values(rng: np.random.Generator, shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    """Of few bits, so that float32 adds their products exactly."""
    if dtype.kind in "iu":
        return rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, shape, dtype, endpoint=True)
    return rng.integers(-7, 8, shape).astype("f4").astype(dtype)


def scatter(matrix: np.ndarray, table: Table) -> np.ndarray:
    """[32, registers] uint32: every lane's elements by a table."""
    per_lane = matrix.size // 32
    lanes = [[matrix[table(lane, i)] for i in range(per_lane)] for lane in range(32)]
    return np.array(lanes, matrix.dtype).view(np.uint32)


@pytest.mark.parametrize("name", CASES)
def test_mma(products: Emulator, name: str) -> None:
    (M, K), (ta, tb, tc) = CASES[name]
    td, da, db, _ = (DTYPES[t] for t in name.split(".")[3:])
    rng = np.random.default_rng(len(name))
    a, b = values(rng, (M, K), da), values(rng, (K, 8), db)
    c = rng.integers(-100, 100, (M, 8)).astype(td)
    out = poisoned((32, M * 8 // 32), td)
    frag = scatter(c, tc)
    products.launch(
        f"k{list(CASES).index(name)}",
        (1,),
        (32,),
        [scatter(a, ta), scatter(b, tb), frag.view("f4") if td == np.dtype("f4") else frag, out],
    )
    wide = np.int64 if td.kind == "i" else np.float64
    want = a.astype(wide) @ b.astype(wide) + c.astype(wide)
    got = np.empty((M, 8), td)
    for lane in range(32):
        for i in range(out.shape[1]):
            got[tc(lane, i)] = out[lane, i]
    np.testing.assert_array_equal(got, want.astype(td))


MATRICES = r"""
extern "C" __global__ void load(unsigned short* in, unsigned* out) {
  __shared__ alignas(128) unsigned short s[256];
  int t = threadIdx.x;
  for (int i = 0; i < 8; ++i) s[8 * t + i] = in[8 * t + i];
  __syncthreads();
  unsigned row = __cvta_generic_to_shared(&s[8 * t]);
  unsigned r[11];
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
    : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
    : "=r"(r[4]), "=r"(r[5]), "=r"(r[6]), "=r"(r[7]) : "r"(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2+0];" : "=r"(r[8]), "=r"(r[9]) : "r"(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[10]) : "r"(row));
  for (int i = 0; i < 11; ++i) out[11 * t + i] = r[i];
}
extern "C" __global__ void store(unsigned* in, unsigned short* out) {
  __shared__ alignas(128) unsigned short s[256];
  int t = threadIdx.x;
  unsigned row = __cvta_generic_to_shared(&s[8 * t]);
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
    : : "r"(row), "r"(in[4 * t]), "r"(in[4 * t + 1]), "r"(in[4 * t + 2]), "r"(in[4 * t + 3]) : "memory");
  __syncthreads();
  for (int i = 0; i < 8; ++i) out[8 * t + i] = s[8 * t + i];
}
extern "C" __global__ void move(unsigned* in, unsigned* out) {
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out[threadIdx.x]) : "r"(in[threadIdx.x]));
}
"""


@pytest.fixture(scope="module")
def matrices() -> Emulator:
    return Emulator(MATRICES)


def fragment(matrix: np.ndarray) -> np.ndarray:
    """[32] uint32: "each thread receives two elements of row laneid / 4, 2 * (laneid % 4) and the next"."""
    return np.array([[matrix[lane // 4, lane % 4 * 2 + i] for i in (0, 1)] for lane in range(32)]).view(np.uint32)[:, 0]


def test_ldmatrix(matrices: Emulator) -> None:
    data = np.random.default_rng(0).integers(0, 1 << 16, (4, 8, 8), np.uint16)
    out = poisoned((32, 11), np.uint32)
    matrices.launch("load", (1,), (32,), [data, out])
    plain = [fragment(m) for m in data]
    want = [*plain, *(fragment(m.T) for m in data), *plain[:2], plain[0]]
    np.testing.assert_array_equal(out, np.stack(want, 1))


def test_stmatrix_and_movmatrix(matrices: Emulator) -> None:
    data = np.random.default_rng(1).integers(0, 1 << 16, (4, 8, 8), np.uint16)
    out = poisoned((4, 8, 8), np.uint16)
    matrices.launch("store", (1,), (32,), [np.stack([fragment(m) for m in data], 1), out])
    np.testing.assert_array_equal(out, data)
    moved = poisoned(32, np.uint32)
    matrices.launch("move", (1,), (32,), [fragment(data[0]), moved])
    np.testing.assert_array_equal(moved, fragment(data[0].T))
