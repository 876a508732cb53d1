"""The emulator against numpy's statement of every instruction. With AMX in the CPU, its own tiles run these tests."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import textwrap
import threading
from typing import Any

import numpy as np
import pytest

from tests import amx_emulator

SHAPES = ((16, 16, 16), (1, 1, 1), (13, 11, 14), (16, 8, 16), (5, 16, 3))  # rows of c, quads of k, columns of c
DOTS = {"tdpbssd": "ii", "tdpbsud": "iu", "tdpbusd": "ui", "tdpbuud": "uu"}


@pytest.fixture(scope="module")
def lib() -> ctypes.CDLL:
    """One function an instruction, executed by the emulator, or by a CPU that can."""
    amx_emulator.enable()
    return ctypes.CDLL(str(amx_emulator.build("instructions.c")))


def pointer(array: np.ndarray, offset: int = 0) -> Any:
    """The address of an array's bytes from `offset` on; it keeps the array alive."""
    return array.reshape(-1).view(np.uint8)[offset:].ctypes.data_as(ctypes.c_void_p)


def configuration(*shapes: tuple[int, int]) -> np.ndarray:
    """(rows, bytes of a row) of tile 0, 1, ... as ldtilecfg reads them."""
    config = np.zeros(64, np.uint8)
    config[0] = 1
    for tile, (rows, row_bytes) in enumerate(shapes):
        config[16 + 2 * tile], config[48 + tile] = row_bytes, rows
    return config


def multiply(lib: ctypes.CDLL, name: str, c: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """c + a b by one instruction; all are [rows, row bytes] uint8."""
    lib.ldtilecfg(pointer(configuration(c.shape, a.shape, b.shape)))
    for tile, data in enumerate((c, a, b)):
        getattr(lib, f"tileload{tile}")(pointer(data), ctypes.c_int64(data.strides[0]))
    getattr(lib, name)()
    out = np.zeros_like(c)
    lib.tilestore0(pointer(out), ctypes.c_int64(out.strides[0]))
    lib.tilerelease()
    return out


@pytest.mark.parametrize("name", DOTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("extreme", [False, True])
def test_byte_dots(lib: ctypes.CDLL, name: str, shape: tuple[int, int, int], extreme: bool) -> None:
    """Exact, and around the ends of int32 like its additions."""
    (M, Q, N), rng = shape, np.random.default_rng(0)
    a, b = (rng.integers(0, 256, size, np.uint8) for size in ((M, 4 * Q), (Q, 4 * N)))
    c = rng.integers(-(2**31), 2**31, (M, N)).astype(np.int32)
    if extreme:
        a[:], b[:] = 0x80, np.where(b < 128, 0x80, 0xFF)
    x = a.view("i1" if DOTS[name][0] == "i" else "u1").astype(np.int64).reshape(M, Q, 4)
    y = b.view("i1" if DOTS[name][1] == "i" else "u1").astype(np.int64).reshape(Q, N, 4)
    want = (c + np.einsum("mqj,qnj->mn", x, y)).astype(np.int32)  # wraps
    got = multiply(lib, name, c.view(np.uint8), a, b).view(np.int32)
    np.testing.assert_array_equal(got, want)


def bf16_values(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """float32 that are bfloat16, of such magnitudes that float64 adds their products without rounding."""
    mantissa = rng.integers(-255, 256, shape)
    return np.ldexp(mantissa.astype(np.float32), rng.integers(-12, -3, shape))


def as_bf16(values: np.ndarray) -> np.ndarray:
    """float32 [rows, n] that are bfloat16 -> their bytes, [rows, 2 n] uint8."""
    return np.ascontiguousarray((np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16)).view(np.uint8)


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_dot(lib: ctypes.CDLL, shape: tuple[int, int, int]) -> None:
    """Two sums, of even and of odd k, each rounded to float32 after every product; then their sum; then c."""
    (M, Q, N), rng = shape, np.random.default_rng(1)
    a, b = bf16_values(rng, M, 2 * Q), bf16_values(rng, Q, 2 * N)
    c = rng.standard_normal((M, N), np.float32)
    sums = np.zeros((M, N, 2), np.float32)
    for q in range(Q):
        product = a.reshape(M, 1, Q, 2)[:, :, q].astype(np.float64) * b.reshape(Q, N, 2)[q]
        sums = (sums + product).astype(np.float32)
    want = c + (sums[..., 0] + sums[..., 1])
    got = multiply(lib, "tdpbf16ps", c.view(np.uint8), as_bf16(a), as_bf16(b)).view(np.float32)
    np.testing.assert_array_equal(got, want)


def test_bf16_denormals_count_as_zero(lib: ctypes.CDLL) -> None:
    tiny, small = np.float32(1e-39), np.float32(2.0**-70)
    a, b = (as_bf16(np.array([[x, 0]], np.float32)) for x in (tiny, 2.0**100))
    assert multiply(lib, "tdpbf16ps", np.full((1, 1), 1, np.float32).view(np.uint8), a, b).view(np.float32) == 1
    a, b = (as_bf16(np.array([[x, 0]], np.float32)) for x in (small, small))
    assert multiply(lib, "tdpbf16ps", np.full((1, 1), tiny, np.float32).view(np.uint8), a, b).view(np.float32) == 0


def test_loads_fill_the_rest_with_zeros(lib: ctypes.CDLL) -> None:
    """Rows that a tile has not are neither read nor written; what a store leaves alone stays."""
    data = np.random.default_rng(2).integers(1, 256, (16, 100), np.uint8)
    lib.ldtilecfg(pointer(configuration((7, 24))))
    lib.tileload0(pointer(data), ctypes.c_int64(100))
    out = np.full((16, 80), 255, np.uint8)
    lib.tilestore0(pointer(out), ctypes.c_int64(80))
    np.testing.assert_array_equal(out[:7, :24], data[:7, :24])
    assert (out[7:] == 255).all() and (out[:, 24:] == 255).all()
    lib.tilezero()
    lib.tilestore0(pointer(out), ctypes.c_int64(80))
    assert not out[:7, :24].any()
    lib.tilerelease()


FORMS = (
    "plain",
    "scaled",
    "near",
    "near_behind",
    "far",
    "far_behind",
    "base_like_rsp",
    "base_like_rbp",
    "index_like_rsp",
    "hint",
)


@pytest.mark.parametrize("form", FORMS)
def test_addresses(lib: ctypes.CDLL, form: str) -> None:
    rows, row_bytes, stride = 11, 40, 48
    lib.ldtilecfg(pointer(configuration(*[(1, 4)] * 7, (rows, row_bytes))))
    data = np.random.default_rng(3).integers(0, 256, (rows, stride), np.uint8)
    out = np.zeros_like(data)
    getattr(lib, f"form_{form}")(pointer(data), pointer(out), ctypes.c_int64(stride))
    np.testing.assert_array_equal(out[:rows, :row_bytes], data[:rows, :row_bytes])
    assert not out[rows:].any() and not out[:, row_bytes:].any()
    lib.tilerelease()


def test_configurations(lib: ctypes.CDLL) -> None:
    """From wherever they lie; what is stored is what was loaded, and zeros after a release."""
    out = np.full(64, 255, np.uint8)
    lib.config_relative.restype = ctypes.POINTER(ctypes.c_uint8 * 64)
    np.testing.assert_array_equal(np.array(lib.config_relative().contents), configuration((5, 12)))
    config = configuration((16, 64), (3, 8))
    shifted = np.zeros(128, np.uint8)
    shifted[23:87] = config
    lib.config_indexed(pointer(shifted), ctypes.c_int64(5), pointer(out))
    np.testing.assert_array_equal(out, config)
    lib.config_no_base(pointer(shifted, 23), pointer(out))
    np.testing.assert_array_equal(out, config)
    lib.tilerelease()
    lib.sttilecfg(pointer(out))
    assert not out.any()


def test_a_new_configuration_empties_tiles(lib: ctypes.CDLL) -> None:
    data, out = np.full((2, 8), 7, np.uint8), np.full((2, 8), 9, np.uint8)
    lib.ldtilecfg(pointer(configuration((2, 8))))
    lib.tileload0(pointer(data), ctypes.c_int64(8))
    lib.ldtilecfg(pointer(configuration((2, 8))))
    lib.tilestore0(pointer(out), ctypes.c_int64(8))
    assert not out.any()
    lib.tilerelease()


def test_every_thread_has_its_tiles(lib: ctypes.CDLL) -> None:
    """Threads that take turns, each with a shape and data of its own."""
    threads, turn = 4, threading.Barrier(4)
    results: list[np.ndarray] = [np.zeros(0)] * threads

    def work(i: int) -> None:
        data = np.random.default_rng(i).integers(0, 256, (4 * (i + 1), 16 * (i + 1)), np.uint8)
        out = np.zeros_like(data)
        lib.ldtilecfg(pointer(configuration(data.shape)))
        turn.wait()
        lib.tileload0(pointer(data), ctypes.c_int64(data.strides[0]))
        turn.wait()
        lib.tilestore0(pointer(out), ctypes.c_int64(data.strides[0]))
        turn.wait()
        lib.tilerelease()
        results[i] = out == data

    started = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    assert all(same.size and same.all() for same in results)


def test_counts(lib: ctypes.CDLL) -> None:
    emulator = amx_emulator.emulator()
    emulator.reset()
    assert emulator.counts() == {}
    tile = np.zeros((1, 4), np.uint8)
    for _ in range(3):
        multiply(lib, "tdpbusd", tile, tile, tile)
    assert emulator.counts() == {
        "ldtilecfg": 3, "tileloadd": 9, "tdpbusd": 3, "tilestored": 3, "tilerelease": 3
    }  # fmt: skip


def run(script: str) -> subprocess.CompletedProcess[str]:
    """A process of its own that executes `script` with `lib`, `configuration` and the like at hand."""
    prelude = """
        import ctypes, numpy as np
        from tests import amx_emulator
        from tests.amx_emulator.test_emulator import configuration, multiply, pointer
        amx_emulator.enable()
        lib = ctypes.CDLL(str(amx_emulator.build("instructions.c")))
    """
    command = [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(prelude) + textwrap.dedent(script)]
    return subprocess.run(command, capture_output=True, text=True)


ILLEGAL = {
    "no configuration": "lib.tilezero()",
    "released": "lib.ldtilecfg(pointer(configuration((1, 4)))); lib.tilerelease(); lib.tilezero()",
    "a tile without shape": "lib.ldtilecfg(pointer(configuration((1, 4)))); lib.tdpbssd()",
    "shapes that do not fit": "multiply(lib, 'tdpbssd', *(np.zeros(s, 'uint8') for s in ((2, 8), (2, 8), (3, 8))))",
    "one tile twice": "lib.ldtilecfg(pointer(configuration(*[(4, 16)] * 3))); lib.same_tile_twice()",
    "another instruction": "lib.another_instruction()",
}


@pytest.mark.parametrize("case", ILLEGAL)
def test_what_hardware_refuses(case: str) -> None:
    """The handler that was there before, Python's, hears of it."""
    done = run(ILLEGAL[case])
    assert done.returncode == -signal.SIGILL and "Fatal Python error: Illegal instruction" in done.stderr


@pytest.mark.skipif(amx_emulator.NATIVE, reason="this CPU refuses them in another way")
@pytest.mark.parametrize("wrong", [(0, 2), (48, 17), (48, 0), (16, 65), (2, 1), (56, 1)])
def test_wrong_configurations(wrong: tuple[int, int]) -> None:
    position, value = wrong
    done = run(f"c = configuration((4, 16)); c[{position}] = {value}; lib.ldtilecfg(pointer(c))")
    assert done.returncode == -signal.SIGILL and "ldtilecfg is not legal here" in done.stderr


def test_a_right_configuration_is_taken() -> None:
    assert run("lib.ldtilecfg(pointer(configuration((4, 16)))); lib.tilerelease()").returncode == 0
