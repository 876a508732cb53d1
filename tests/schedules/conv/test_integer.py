"""The convolution of bytes against exact integers, at every edge of its blocks."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.schedules.conv.integer import INTEGER_CONV, IntegerConvWorkload
from llmc.targets.base import Target
from llmc.targets.detect import machine
from llmc.targets.x86 import AVX2, AVX512, AVX_VNNI
from llmc.tvm_shim import tvm
from tests.schedules.kernels import Kernel, compile_kernels

SMALL = {"MR": 3, "NV": 2, "KU": 2}
CASES = [
    IntegerConvWorkload(4, 1),
    IntegerConvWorkload(4, 35, 3, 3, bias=True),
    IntegerConvWorkload(12, 33, 3, 2, 2, 1, bias=True),
    IntegerConvWorkload(8, 20, 2, 3, DH=3, DW=2),
    IntegerConvWorkload(16, 66, 3, 3, groups=2, bias=True),
    IntegerConvWorkload(2, 5, 1, 4),
    IntegerConvWorkload(512, 32, 3, 3, H=5, W=5),
]


@pytest.fixture(scope="module", params=[AVX512, AVX_VNNI], ids=lambda target: target.name)
def kernels(request: pytest.FixtureRequest) -> list[Kernel]:
    target: Target = request.param
    if missing := machine().missing(target):
        pytest.skip(f"CPU lacks {missing}")
    cases = [(w, SMALL) for w in CASES]
    return compile_kernels(INTEGER_CONV, [*cases, (IntegerConvWorkload(24, 70, H=1, W=29, bias=True), None)], target)


def check(kernel: Kernel, dims: dict[str, int], inputs: dict[str, np.ndarray], weights: dict[str, np.ndarray]) -> None:
    w = kernel.workload
    packed = INTEGER_CONV.prepack(weights, w, kernel.config, kernel.target)
    known = {"B": inputs["x"].shape[0], **dims}
    shape = tuple(known[d] if isinstance(d, str) else d for d in w.outputs()[0].shape)
    y = tvm.runtime.tensor(np.full(shape, -(2**31), np.int32))
    kernel.call(*(tvm.runtime.tensor(a) for a in (inputs["x"], *packed.values())), y)
    np.testing.assert_array_equal(y.numpy(), INTEGER_CONV.reference(w, inputs, weights)["y"], err_msg=w.key())


def test_equals_reference(kernels: list[Kernel]) -> None:
    rng = np.random.default_rng(0)
    for kernel in kernels:
        weights = INTEGER_CONV.example_weights(kernel.workload, rng)
        for B, OH, OW in [(1, 1, 1), (2, 2, 4), (1, 3, 7), (1, 1, 23)]:
            dims = kernel.workload.sizes(B, OH, OW)
            check(kernel, dims, INTEGER_CONV.example_inputs(kernel.workload, dims, rng), weights)


def test_the_ends_of_bytes(kernels: list[Kernel]) -> None:
    """No product saturates on its way into 32 bits."""
    for kernel in kernels:
        rng = np.random.default_rng(1)
        dims = kernel.workload.sizes(1, 2, 5)
        inputs = INTEGER_CONV.example_inputs(kernel.workload, dims, rng)
        weights = INTEGER_CONV.example_weights(kernel.workload, rng)
        for end in (-128, 127):
            x = {"x": np.full_like(inputs["x"], 255)}
            check(kernel, dims, x, weights | {"weight": np.full_like(weights["weight"], end)})


def test_what_is_accepted() -> None:
    assert INTEGER_CONV.accepts(IntegerConvWorkload(4, 8, 3, 3), AVX512)
    assert INTEGER_CONV.accepts(IntegerConvWorkload(2, 8, 3, 2), AVX512)  # rows of a window hold four bytes
    for w in (
        IntegerConvWorkload(3, 8, 3, 3),
        IntegerConvWorkload(2, 8, 3, 2, DW=2),
        IntegerConvWorkload(4, 8, groups=2),
    ):
        assert not INTEGER_CONV.accepts(w, AVX512)
    assert not INTEGER_CONV.accepts(IntegerConvWorkload(4, 8), AVX2)  # without VNNI sums of pairs would saturate
