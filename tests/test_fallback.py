"""The fallback schedule: every kind of loop nest is scheduled, kernels of templates are left alone."""

import numpy as np
import pytest

from llmc.fallback import SCHEDULED, legalize_and_schedule, schedule
from llmc.legalize import groups
from llmc.targets.x86 import AVX2
from llmc.tvm_shim import PrimFunc, TvmTarget, relax, te, tirx, tvm, tvm_ffi

rng = np.random.default_rng(0)
B, S, P = (tirx.Var(n, "int64") for n in ("b", "s", "p"))


def primfunc(f, *shapes):
    inputs = [te.placeholder(s, "float32", name=f"x{i}") for i, s in enumerate(shapes)]
    return te.create_prim_func([*inputs, f(*inputs)])


def loops(func):
    """(kind, extent) of every loop, outermost first."""
    found = []
    tvm_ffi.structural_walk(func.body, (tirx.For, lambda f: found.append((int(f.kind), f.extent))), order="pre")
    return found


PARALLEL = int(tirx.ForKind.PARALLEL)


def add(a, b):
    return te.compute(a.shape, lambda i, j: a(i, j) + b(i, j), name="add")


def test_flat_elementwise_is_one_parallel_loop():
    m, n = te.var("m", "int64"), te.var("n", "int64")
    assert [kind for kind, _ in loops(schedule(primfunc(add, (m, n), (m, n))))] == [PARALLEL]


def test_small_work_stays_serial():
    assert all(kind != PARALLEL for kind, _ in loops(schedule(primfunc(add, (4, 8), (4, 8)))))


def test_matmul_runs_along_rows_of_b():
    def product(a, b):
        k = te.reduce_axis((0, a.shape[1]), "k")
        return te.compute((a.shape[0], b.shape[1]), lambda i, j: te.sum(a(i, k) * b(k, j), axis=k), name="c")

    kinds = loops(schedule(primfunc(product, (64, 96), (96, 128))))
    assert kinds[0][0] == PARALLEL
    assert int(kinds[-1][1]) == 128  # j innermost, not the reduction


def test_softmax_is_one_parallel_loop_over_rows():
    x = relax.Var("x", relax.TensorType([B, 12, S, P], "float32"))
    bb = relax.BlockBuilder()
    with bb.function("main", [x]):
        with bb.dataflow():
            y = bb.emit_output(relax.op.nn.softmax(x))
        bb.emit_func_output(y)
    mod = legalize_and_schedule(bb.finalize(), AVX2)
    funcs = [f for f in mod.functions.values() if isinstance(f, PrimFunc)]
    assert [sum(kind == PARALLEL for kind, _ in loops(f)) for f in funcs] == [1]


def test_scheduled_kernels_are_left_alone():
    func = primfunc(add, (512, 512), (512, 512)).with_attr(SCHEDULED, True).with_attr("global_symbol", "kernel")
    mod = legalize_and_schedule(tvm.IRModule({"kernel": func}), AVX2)
    assert all(kind != PARALLEL for kind, _ in loops(mod["kernel"]))


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 7), (100, 333)])
def test_symbolic_extents_compute_what_numpy_does(shape):
    m, n = te.var("m", "int64"), te.var("n", "int64")
    func = schedule(primfunc(add, (m, n), (m, n)))
    lib = tvm.compile(tvm.IRModule({"main": func.with_attr("global_symbol", "main")}), target=TvmTarget(AVX2.tvm()))
    a, b = rng.random(shape, np.float32), rng.random(shape, np.float32)
    out = tvm.runtime.tensor(np.zeros(shape, np.float32))
    lib["main"](tvm.runtime.tensor(a), tvm.runtime.tensor(b), out)
    np.testing.assert_array_equal(out.numpy(), a + b)


@pytest.mark.parametrize(
    ("source", "result", "expected"),
    [
        ([B, S, 576], [B, S, 9, 64], [([0], [0]), ([1], [1]), ([2], [2, 3])]),
        ([B * S, 576], [B, S, 576], [([0], [0, 1]), ([1], [2])]),
        ([B, 2, P + S, 16], [B, 2, 1, P + S, 16], [([0], [0]), ([1], [1]), ([2], [2, 3]), ([3], [4])]),
        ([6, 4], [8, 3], [([0, 1], [0, 1])]),
        ([1, 1], [], [([0], []), ([1], [])]),
    ],
)
def test_reshape_groups(source, result, expected):
    assert [(list(a), list(b)) for a, b in groups(source, result)] == expected
