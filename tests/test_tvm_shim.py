"""What the shim does to functions."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.schedules.attention.attention import ATTENTION
from llmc.schedules.attention.workloads import AttentionWorkload
from llmc.schedules.gemm.lowbit import LOWBIT, LowBitLinearWorkload
from llmc.targets.detect import native
from llmc.tir_pipeline import build_kernels
from llmc.tvm_shim import IRBuilder, PrimFunc, T, TvmTarget, for_sizes, tvm, with_plain_division

TARGET = native()


def _y(func: PrimFunc, w: LowBitLinearWorkload, M: int) -> np.ndarray:
    """What a low-bit linear computes for M rows; NaN where it writes nothing."""
    rng = np.random.default_rng(0)
    weights = LOWBIT.example_weights(w, rng)
    packed = LOWBIT.prepack(weights, w, LOWBIT.default(w, TARGET), TARGET).values()
    arrays = (rng.standard_normal((M, w.K), np.float32), *packed)
    y = tvm.runtime.tensor(np.full((M, w.columns), np.nan, np.float32))
    kernel = build_kernels({"kernel": func}, TvmTarget(TARGET.tvm()))["kernel"]
    kernel(*(tvm.runtime.tensor(np.ascontiguousarray(a)) for a in arrays), y)
    return np.asarray(y.numpy())


def test_branches_that_no_size_reaches_are_left_out() -> None:
    """At the sizes that were named nothing changes; the others' code is gone."""
    w = LowBitLinearWorkload(64, 96, 4, 32, zero=8.0)
    func = LOWBIT.build(w, TARGET, LOWBIT.default(w, TARGET))
    reached = for_sizes(func, [a.shape for a in w.inputs()], [{"M": 1}, {"M": 20}])
    for M in (1, 20, 21):  # 21 takes the way of 20
        np.testing.assert_array_equal(_y(reached, w, M), _y(func, w, M))
    assert np.isnan(_y(reached, w, 2)).all()
    assert len(str(reached)) < len(str(func)) / 2
    with pytest.raises(Exception, match="shape"):  # for one size M is a number
        _y(for_sizes(func, [a.shape for a in w.inputs()], [{"M": 20}]), w, 21)


def test_conditions_on_anything_but_sizes_stay() -> None:
    """The masks of attention depend on lengths that are read from a buffer."""
    w = AttentionWorkload(2, 1, 16, 0.25)
    func = ATTENTION.build(w, TARGET, ATTENTION.default(w, TARGET))
    shapes = [a.shape for a in w.inputs()]
    one, prompt = {"B": 1, "S": 1, "CB": 2, "C": 128}, {"B": 1, "S": 128, "CB": 2, "C": 128}
    both = for_sizes(func, shapes, [one, prompt])
    assert str(both) != str(func)  # both are of one sequence
    assert str(both).count("if ") == str(func).count("if ")
    assert all(len(str(for_sizes(func, shapes, [p]))) < len(str(func)) for p in (one, prompt))


@pytest.mark.parametrize("a", [0, 1, 6, 7, 8, 1_000_003])
def test_plain_division_is_floor_division_of_no_negatives(a: int) -> None:
    with IRBuilder() as ib:
        with T.prim_func(s_tir=True):
            T.func_name("divide")
            x, y = T.arg("x", T.handle()), T.arg("y", T.Buffer((4,), "int64"))
            size = T.int64()
            T.match_buffer(x, (size,), "int64")
            n = T.int64(a)
            for i, value in enumerate((n // size, n % size, n // 7, n % 7)):
                T.buffer_store(y, value, [i])
    func = with_plain_division(ib.get())
    assert "//" not in str(func) and "floor" not in str(func)
    kernel = build_kernels({"kernel": func}, TvmTarget(TARGET.tvm()))["kernel"]
    for b in (1, 3, 7):
        out = tvm.runtime.tensor(np.zeros(4, np.int64))
        kernel(tvm.runtime.tensor(np.zeros(b, np.int64)), out)
        assert out.numpy().tolist() == [a // b, a % b, a // 7, a % 7]


def test_divisions_that_simplification_makes_negative() -> None:
    """(6 - i) // 2 becomes 3 + (-i) // 2 on its way to code, and rounded the wrong way there."""
    with IRBuilder() as ib:
        with T.prim_func(s_tir=True):
            T.func_name("divide")
            y = T.arg("y", T.Buffer((6,), "int64"))
            with T.serial(0, T.int64(6)) as i:
                T.buffer_store(y, (T.int64(6) - i) // T.int64(2), [i])
    kernel = build_kernels({"kernel": ib.get()}, TvmTarget(TARGET.tvm()))["kernel"]
    out = tvm.runtime.tensor(np.zeros(6, np.int64))
    kernel(out)
    assert out.numpy().tolist() == [(6 - i) // 2 for i in range(6)]
