"""CUDA C that TVM generates from schedules of its dlight, with kernels that nobody here wrote."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from llmc.emulator.emulator import Emulator, available, poisoned
from llmc.gpu.passes import lower
from llmc.gpu.schedule import schedule
from llmc.targets.cuda import SM80
from llmc.tvm_shim import IRModule, TvmTarget, cuda_source, te, tirx

pytestmark = pytest.mark.skipif(not available(), reason="no g++ 12 for x86-64")


def elementwise() -> Any:
    x = te.placeholder((te.var("m", "int64"), _i(256)), name="x")
    return [x, te.compute(x.shape, lambda i, j: te.exp(x[i, j]) * 2.0)]


def reduction() -> Any:
    x = te.placeholder((te.var("m", "int64"), _i(256)), name="x")
    k = te.reduce_axis((_i(0), _i(256)), "k")
    return [x, te.compute((x.shape[0],), lambda i: te.sum(x[i, k], axis=k))]


def product(dtype: str) -> Any:
    x, y = (
        te.placeholder((te.var("m", "int64"), _i(256)), dtype, name="x"),
        te.placeholder((_i(256), _i(256)), dtype, "y"),
    )
    k = te.reduce_axis((_i(0), _i(256)), "k")
    return [x, y, te.compute(x.shape, lambda i, j: te.sum(x[i, k] * y[j, k], axis=k))]


def _i(value: int) -> Any:
    return tirx.IntImm("int64", value)


def run(tensors: list[Any], inputs: list[np.ndarray], shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    """The result of a function that dlight scheduled; its single kernel is emulated."""
    target = TvmTarget(SM80.tvm())
    func = te.create_prim_func(tensors, index_dtype_override="int64").with_attr("global_symbol", "f")
    with target:
        _, kernels = lower(IRModule({"f": schedule(func.with_attr("target", target), target)}), target)
    ((name, (kernel, launch)),) = kernels.items()
    emulator = Emulator(cuda_source(name, kernel, target))
    names = [p.name for p in emulator.kernels[name].parameters]  # in the order of their use
    arrays = {f"{tensor.op.name}_ptr": array for tensor, array in zip(tensors[:-1], inputs, strict=True)}
    arrays[f"{tensors[-1].op.name}_ptr"] = out = poisoned(shape, dtype)
    # Besides m, kernels may take a common part of several expressions, which here is the number of elements.
    rows = len(inputs[0])
    arrays = {p: a for n, a in arrays.items() for p in names if re.fullmatch(rf"(p\d+_)?{n}", p)}
    given = [arrays.get(n, rows * 256 if "cse" in n else rows) for n in names]
    scalars = {a.name: value for a, value in zip(launch.arguments, given, strict=True) if not a.pointer}
    grid, block, shared = launch.sizes(scalars)
    emulator.launch(name, grid, block, given, shared, seed)
    return out


@pytest.mark.parametrize("seed", range(2))
def test_elementwise_and_reduction(seed: int) -> None:
    x = np.random.default_rng(0).standard_normal((7, 256)).astype("f4")
    np.testing.assert_allclose(run(elementwise(), [x], (7, 256), "float32", seed), 2 * np.exp(x), rtol=1e-6)
    np.testing.assert_allclose(run(reduction(), [x], (7,), "float32", seed), x.astype("f8").sum(1), atol=1e-4)


@pytest.mark.slow  # dlight's schedule, and g++ for what it unrolls, take seconds
def test_product() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((70, 256)).astype("f4"), rng.standard_normal((256, 256)).astype("f4")
    np.testing.assert_allclose(
        run(product("float32"), [x, y], (70, 256), "float32", 1), x.astype("f8") @ y.T, atol=1e-4
    )


@pytest.mark.slow  # dlight takes half a minute
def test_product_on_tensor_cores() -> None:
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((n, 256)).astype("f2") for n in (70, 256))
    out = run(product("float16"), [x, y], (70, 256), "float16", 1).astype("f8")
    # Sums in float16: 16 roundings of values up to the largest.
    bound = 16 * 2.0**-11 * np.abs(x.astype("f8")) @ np.abs(y.astype("f8")).T
    assert (np.abs(out - x.astype("f8") @ y.T.astype("f8")) < bound).all()
