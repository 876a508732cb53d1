"""Tile instructions by name, through LLVM: each against numpy, with shapes that are known at run time only."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmc.targets import tiles
from llmc.targets.x86 import AMX, AVX512
from llmc.tir_pipeline import build_kernels
from llmc.tvm_shim import IRBuilder, T, TvmTarget, tvm
from tests import amx_emulator

QUADS, COLUMNS = 11, 14
SIGNS = ("ss", "su", "us", "uu")
TYPES = {"s": "int8", "u": "uint8"}


def kernel(kind: str) -> Any:
    """c [rows, 14] += a [rows, 44 bytes] b [11, 56 bytes], rows read from the buffers; all rows 64 bytes apart."""
    result = "float32" if kind == "bf16" else "int32"
    with IRBuilder() as ib:
        with T.prim_func(s_tir=True):
            T.func_name(kind)
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            handles = [T.arg(name, T.handle()) for name in "abc"]
            rows = T.int64()
            a = T.match_buffer(handles[0], (rows, 64), "uint8")
            b = T.match_buffer(handles[1], (QUADS, 64), "uint8")
            c = T.match_buffer(handles[2], (rows, 16), result)
            tiles.configure({0: (rows, 4 * COLUMNS), 5: (rows, 4 * QUADS), 7: (QUADS, 4 * COLUMNS), 3: (rows, 8)})
            tiles.load(0, c[0, 0], 64)
            tiles.load(5, a[0, 0], 64)
            tiles.load(7, b[0, 0], 64)
            tiles.zero(3)
            if kind == "bf16":
                tiles.dot_bf16(0, 5, 7)
            else:
                tiles.dot_bytes(0, 5, 7, kind)
            tiles.store(0, c[0, 0], 64)
            tiles.store(3, c[0, COLUMNS], 64)
            tiles.release()
    return ib.get()


@pytest.fixture(scope="module")
def kernels() -> Any:
    if missing := set(AVX512.requires) - amx_emulator.machine().flags:
        pytest.skip(f"CPU lacks {missing}")
    amx_emulator.enable()
    return build_kernels({kind: kernel(kind) for kind in (*SIGNS, "bf16")}, TvmTarget(AMX.tvm()))


@pytest.mark.parametrize("rows", [1, 9, 16])
@pytest.mark.parametrize("signs", SIGNS)
def test_byte_dots(kernels: Any, signs: str, rows: int) -> None:
    rng = np.random.default_rng(rows)
    a, b = (rng.integers(0, 256, (n, 64), np.uint8) for n in (rows, QUADS))
    c = rng.integers(-999, 999, (rows, 16)).astype(np.int32)
    x, y = (v.view(TYPES[s]).astype(np.int64).reshape(len(v), 16, 4) for v, s in zip((a, b), signs, strict=True))
    want = c + np.einsum("mqj,qnj->mn", x[:, :QUADS], y)
    want[:, COLUMNS:] = 0
    out = tvm.runtime.tensor(c)
    kernels[signs](tvm.runtime.tensor(a), tvm.runtime.tensor(b), out)
    np.testing.assert_array_equal(out.numpy(), want)


def test_bf16_dot(kernels: Any) -> None:
    """Small whole numbers: every order of additions gives the same."""
    rng, rows = np.random.default_rng(0), 13
    values = [rng.integers(-9, 10, (n, 32)).astype(np.float32) for n in (rows, QUADS)]
    a, b = (np.ascontiguousarray((v.view(np.uint32) >> 16).astype(np.uint16)).view(np.uint8) for v in values)
    x, y = (v.reshape(len(v), 16, 2) for v in values)
    c = np.ones((rows, 16), np.float32)
    out = tvm.runtime.tensor(c)
    kernels["bf16"](tvm.runtime.tensor(a), tvm.runtime.tensor(b), out)
    want = c + np.einsum("mqj,qnj->mn", x[:, :QUADS], y)
    want[:, COLUMNS:] = 0
    np.testing.assert_array_equal(out.numpy(), want)
