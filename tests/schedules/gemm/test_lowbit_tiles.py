"""The low-bit linear on AMX tiles: bit for bit what the VNNI kernel computes, and tiles computed it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llmc.schedules.epilogue import ACTIVATIONS
from llmc.schedules.gemm.lowbit import LOWBIT, LowBitLinearWorkload
from llmc.schedules.gemm.lowbit_tiles import tile_depth
from llmc.targets.base import Target
from llmc.targets.detect import machine
from llmc.targets.x86 import AMX, AVX512
from tests import amx_emulator
from tests.schedules.gemm.test_lowbit import TOLERANCE, Case, case, random_case
from tests.schedules.kernels import Kernel, compile_kernels

VNNI = {"MR": 4, "NV": 2, "KU": 8, "blocks": 1, "skinny": 4, "ahead_one": 0, "ahead_many": 0, "task_rows": 48}
WIDE, NARROW = VNNI | {"MR": 32, "NV": 2}, VNNI | {"MR": 16, "NV": 1}
# Around one tile of rows, two, and two blocks; fewer than a tile; few enough for VNNI; several spans of task_rows.
ROWS = (1, 5, 15, 16, 17, 33, 64, 149)

CASES: list[Case] = [
    case(1, 32, 4, 32, 8.0, WIDE),
    case(15, 31, 4, 32, 8.0, NARROW),
    case(16, 33, 4, 32, "whole", WIDE),
    case(17, 95, 4, 32, "fractional", NARROW),
    case(97, 192, 4, 32, 8.0, WIDE),
    case(32, 129, 4, 64, 7.0, NARROW),
    case(61, 300, 4, 128, "fractional", WIDE),
    case(53, 100, 4, 100, 8.0, WIDE),  # one group of 26 quads: zeros fill the second tile
    case(37, 290, 4, 290, "fractional", NARROW),  # of 74 quads
    case(41, 67, 2, 16, 1.0, WIDE),
    case(33, 90, 2, 90, "whole", NARROW),
    case(33, 90, 3, 32, 4.0, WIDE | {"KU": 8}),
    case(19, 40, 8, 32, 128.0, WIDE),
    case(67, 161, 8, 32, "fractional", NARROW),
    case(29, 192, 8, 192, 128.0, WIDE),  # whole tiles of one group: read where the weight is stored
    case(31, 103, 8, 103, "whole", NARROW),
    case(51, 96, 8, 48, 0.0, WIDE, scale_dtype="float16"),  # tiles of 12 quads
    case(35, 224, 4, 112, 8.0, NARROW),  # of 14
    case(37, 161, 4, 32, "minimum", WIDE, scale_dtype="float16", zero_dtype="float16"),
    *[case(74, 48, 4, 32, 8.0, WIDE, activation=a, bias=True) for a in ACTIVATIONS],
    case(74, 48, 8, 32, "whole", NARROW, activation="silu_mul", residual=True, bias=True),
    case(61, 48, 4, 32, 8.0, None, residual=True),
]


@pytest.fixture(scope="module")
def kernels() -> dict[str, list[Kernel]]:
    """Every case, by target: "x86-avx512" is the reference with the same arithmetic."""
    if missing := machine().missing(AVX512):
        pytest.skip(f"CPU lacks {missing}")
    amx_emulator.enable()

    def compiled(target: Target) -> list[Kernel]:
        chosen = [(w, config if target is AMX or config is None else VNNI) for w, _, config in CASES]
        return compile_kernels(LOWBIT, chosen, target)

    return {target.name: compiled(target) for target in (AVX512, AMX)}


@pytest.mark.parametrize("i", range(len(CASES)), ids=lambda i: f"{i}-{CASES[i][0].bits}bit-{CASES[i][0].K}")
def test_equal_to_vnni(kernels: dict[str, list[Kernel]], i: int) -> None:
    workload, zero, _ = CASES[i]
    vnni, amx = kernels["x86-avx512"][i], kernels["x86-amx"][i]
    for M in ROWS:
        inputs, weights = random_case(workload, zero, M, seed=M)
        packed = LOWBIT.prepack(weights, workload, vnni.config, AVX512)
        for name, plane in LOWBIT.prepack(weights, workload, amx.config, AMX).items():
            np.testing.assert_array_equal(plane, packed[name])  # one layout
        np.testing.assert_array_equal(amx.run(inputs, packed)["y"], vnni.run(inputs, packed)["y"], err_msg=f"M={M}")
    amx.check(inputs, weights, TOLERANCE)  # and both are right


@pytest.mark.parametrize("code", ["lowest", "highest"])
def test_extreme_codes(kernels: dict[str, list[Kernel]], code: str) -> None:
    """The largest sums that integers must hold, in magnitude."""
    for i, (workload, zero, _) in enumerate(CASES):
        inputs, weights = random_case(workload, zero, 18, seed=i)
        inputs["x"] = np.where(inputs["x"] > 0, np.float32(3), np.float32(-3))
        inputs["x"][0] = 3
        value = 0 if code == "lowest" else 2**workload.bits - 1
        weights["weight"] = replace(weights["weight"], q=np.full_like(weights["weight"].q, value))
        packed = LOWBIT.prepack(weights, workload, VNNI, AMX)
        got, want = (kernels[t][i].run(inputs, packed)["y"] for t in ("x86-amx", "x86-avx512"))
        np.testing.assert_array_equal(got, want)


def blocks_of(w: LowBitLinearWorkload, kernel: Kernel) -> int:
    """Row blocks that one task takes, times tasks."""
    layout = w.layout(16)
    taken = max(int(kernel.config["NV"]), layout.halves)
    return -(-layout.used_blocks // taken) * taken


@pytest.mark.parametrize("M", [4, 5, 17, 100])
def test_tiles_did_it(kernels: dict[str, list[Kernel]], M: int) -> None:
    """As many instructions as there are tiles; none for rows that VNNI multiplies."""
    emulator = amx_emulator.emulator()
    for kernel, (w, zero, _) in zip(kernels["x86-amx"], CASES, strict=True):
        inputs, weights = random_case(w, zero, M, seed=M)
        packed = LOWBIT.prepack(weights, w, kernel.config, AMX)
        emulator.reset()
        kernel.run(inputs, packed)
        counts, layout, config = emulator.counts(), w.layout(16), kernel.config
        if int(config["skinny"]) >= M:
            assert counts == {}
            continue
        sums = -(-M // 16) * blocks_of(w, kernel) * layout.groups  # tiles that leave as integers
        steps = -(-layout.group // (4 * tile_depth(layout)))
        row_blocks = -(-M // int(config["MR"]))
        tasks = max(1, row_blocks // (int(config["task_rows"]) // int(config["MR"])))
        tasks *= blocks_of(w, kernel) // max(int(config["NV"]), layout.halves)
        loads = counts.pop("tileloadd")
        assert counts == {
            "ldtilecfg": tasks, "tilerelease": tasks, "tilezero": sums, "tilestored": sums, "tdpbsud": sums * steps
        }, w  # fmt: skip
        shared = 1 if config["NV"] == 1 and config["MR"] == 16 else 2
        assert 2 * sums * steps // shared <= loads <= 2 * sums * steps


def test_knobs() -> None:
    w = LowBitLinearWorkload(960, 576, 4, 32, zero=8.0)
    assert {c["MR"] for c in LOWBIT.space(w, AMX)} == {16, 32}
    assert {c["NV"] for c in LOWBIT.space(w, AMX)} == {1, 2}
    floats = replace(w, activations="a32")
    assert LOWBIT.space(floats, AMX).knobs == LOWBIT.space(floats, AVX512).knobs
    assert LOWBIT.layout(w, LOWBIT.default(w, AMX), AMX) == LOWBIT.layout(w, LOWBIT.default(w, AVX512), AVX512)


@pytest.mark.parametrize(
    ("K", "bits", "group", "depth"),
    [(576, 4, 32, 8), (576, 4, 64, 16), (576, 4, 128, 16), (576, 8, 48, 12), (224, 4, 112, 14), (100, 4, 100, 16)],
)
def test_depth_of_a_tile(K: int, bits: int, group: int, depth: int) -> None:
    assert tile_depth(LowBitLinearWorkload(64, K, bits, group).layout(16)) == depth
