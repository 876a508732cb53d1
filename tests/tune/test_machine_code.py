"""What machine code shows: counts of assembly written by hand, and of kernels whose code is foreseeable."""

from __future__ import annotations

import shutil
import subprocess
import textwrap
from pathlib import Path

import numpy as np
import pytest

from llmc.schedules.gemm.dense import DENSE, DenseLinearWorkload
from llmc.schedules.gemm.lowbit import LOWBIT, LowBitLinearWorkload
from llmc.targets.base import Target
from llmc.targets.detect import native
from llmc.targets.x86 import AVX2, AVX512
from llmc.tune import features, machine_code
from llmc.tune.machine_code import build_and_count, count, count_text
from llmc.tvm_shim import TvmTarget, for_sizes, tvm

needs_tools = pytest.mark.skipif(not machine_code.readable(), reason="needs ld and objdump")

BY_HAND = """
    .globl f, g
    f:  push rbp
        vmovups zmm9, [rsp - 64]            # in no loop
    1:  vmovaps zmm0, [rdi]                 # the outer loop: a load
    2:  vbroadcastss zmm1, [rsi]            # the inner one: 6 instructions, 3 multiplies, 3 loads
        vfmadd231ps zmm2, zmm0, zmm1
        vfmadd231ps zmm3, zmm0, [rsi + 4]{1to16}
        vpdpbusd zmm4, zmm5, [rsp + 64]     # reloaded
        dec rcx
        jne 2b
        vmovups [rsp + 128], zmm2           # spilled: a store
        vcvtdq2ps ymm7, ymm8
        prefetcht0 [rdi + 512]
        vmovss [rbp + 8], xmm2              # rbp is no frame pointer here
        dec rdx
        jne 1b
        jmp 3f
    3:  ret
    g:  push rbp
        mov rbp, rsp
    1:  vmulps ymm1, ymm1, [rbp - 32]       # here it is
        lea rax, [rbp + rax]
        jmp 1b
"""


@needs_tools
@pytest.mark.skipif(not shutil.which("as"), reason="needs an assembler")
def test_counts_by_hand(tmp_path: Path) -> None:
    source = ".intel_syntax noprefix\n" + textwrap.dedent(BY_HAND)
    subprocess.run(["as", "-o", tmp_path / "f.o"], input=source, text=True, check=True)
    subprocess.run(["ld", "-shared", "-o", tmp_path / "f.so", tmp_path / "f.o"], check=True)
    counts = count(tmp_path / "f.so")
    assert counts.pop("code") > 60
    assert counts == {
        "looped": 13 + 3,
        "zmm": 6,
        "ymm": 2,
        "xmm": 1,
        "dots": 1,
        "fmas": 2,
        "conversions": 1,
        "broadcasts": 2,
        "branches": 3,
        "spills": 3,
        "hot_multiplies": 3,
        "hot_instructions": 6 / 3,
        "hot_loads": 3 / 3,
        "hot_spills": 1 / 3,
    }


def test_code_of_other_architectures_is_not_counted() -> None:
    assert count_text("f.so:     file format elf64-littleaarch64\n\n0 <f>:\n   0:\tret\n") == {}


def _dense(target: Target, **knobs: int) -> dict[str, float]:
    """Machine code of a small fp32 GEMM of 128 rows."""
    w = DenseLinearWorkload(96, 64)
    func = DENSE.build(w, target, DENSE.default(w, target) | knobs)
    reached = for_sizes(func, [arg.shape for arg in w.inputs()], [{"M": 128}])
    return build_and_count({"kernel": reached}, TvmTarget(target.tvm()))[1]


@needs_tools
def test_the_documented_counts_are_what_is_counted() -> None:
    counts = _dense(AVX512, MR=8, NV=3, KU=4)
    assert set(counts) == set(features.CPU_BUILT)
    assert counts["zmm"] > counts["ymm"] and counts["dots"] == 0
    assert counts["hot_multiplies"] == 8 * 3 * 4  # rows, vectors, steps: `features_gemm` foresees it
    # Each step loads 3 vectors, and broadcasts 8 elements.
    assert counts["hot_loads"] == pytest.approx((3 + 8) / 24, rel=0.2)
    assert counts["hot_spills"] == 0


@needs_tools
def test_a_tile_that_does_not_fit_spills() -> None:
    fits, spills = (_dense(AVX2, MR=MR, NV=2, KU=2) for MR in (6, 12))  # 12 and 24 sums; AVX2 has 16 registers
    assert fits["zmm"] == spills["zmm"] == 0 < fits["ymm"]
    assert fits["hot_spills"] == 0 < spills["hot_spills"]
    assert spills["hot_instructions"] > fits["hot_instructions"]


@needs_tools
@pytest.mark.parametrize("target", [AVX2, AVX512], ids=lambda t: t.name)
def test_int8_kernels_multiply_bytes(target: Target) -> None:
    w = LowBitLinearWorkload(96, 64, 4, 32, zero=8.0)
    func = LOWBIT.build(w, target, LOWBIT.default(w, target))
    reached = for_sizes(func, [arg.shape for arg in w.inputs()], [{"M": 1}])
    _, counts = build_and_count({"kernel": reached}, TvmTarget(target.tvm()))
    assert counts["dots"] > 0 and counts["dots"] % 8 == 0  # 4 bytes each, in groups of 32
    assert counts["conversions"] > 0  # sums of integers become floats


@pytest.mark.parametrize("tools", [pytest.param(True, marks=needs_tools), False], ids=["linked", "in memory"])
def test_kernels_compute_with_and_without_the_tools(tools: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_code, "readable", lambda: tools)
    w, target, rng = DenseLinearWorkload(20, 12), native(), np.random.default_rng(0)
    config = DENSE.default(w, target)
    kernel, counts = build_and_count({"kernel": DENSE.build(w, target, config)}, TvmTarget(target.tvm()))
    assert bool(counts) == tools
    weights, x = DENSE.example_weights(w, rng), rng.standard_normal((5, 12), np.float32)
    packed = DENSE.prepack(weights, w, config, target).values()
    y = tvm.runtime.tensor(np.zeros((5, 20), np.float32))
    kernel["kernel"](*(tvm.runtime.tensor(np.ascontiguousarray(a)) for a in (x, *packed)), y)
    (want,) = DENSE.reference(w, {"x": x}, weights).values()
    np.testing.assert_allclose(y.numpy(), want, atol=1e-5)
