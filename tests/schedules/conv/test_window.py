"""Depthwise convolution and pooling against float64, at every edge, and their reference against onnx's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from llmc.errors import KernelError
from llmc.schedules.conv.window import WINDOW
from llmc.schedules.conv.workloads import KINDS, WindowWorkload
from llmc.schedules.epilogue import SINGLE
from llmc.targets.base import Target
from llmc.targets.x86 import AVX2, AVX512
from tests.schedules.kernels import X86, Kernel, compile_kernels

SMALL = {"MR": 2, "NV": 1}
WIDE = {"MR": 2, "NV": 2}


def geometries(kind: str, C: int) -> list[WindowWorkload]:
    return [
        WindowWorkload(C, 3, 3, kind, top=1, left=1),
        WindowWorkload(C, 3, 3, kind, 2, 2, top=1, left=1),
        WindowWorkload(C, 3, 5, kind, 1, 3, 2, 2, top=2, left=4),
        WindowWorkload(C, 1, 1, kind),
    ]


def channels(target: Target) -> list[WindowWorkload]:
    """Fewer than a register has, whole registers, and some that hang over."""
    lanes = target.lanes
    cases = [(1, "max"), (3, "average"), (lanes, "max"), (lanes + 1, "average"), (lanes + 1, "max")]
    return [WindowWorkload(C, 2, 2, kind, left=1) for C, kind in [*cases, (lanes - 1, "depthwise")]]


def sized() -> list[WindowWorkload]:
    """Known sizes: windows that hang over behind x, too (as ceil_mode has it)."""
    return [
        WindowWorkload(5, 3, 3, "depthwise", top=1, left=1, H=4, W=7, OH=4, OW=7, bias=True),
        WindowWorkload(5, 3, 3, "average", 2, 2, H=6, W=8, OH=3, OW=4),
        WindowWorkload(5, 3, 3, "max", 2, 2, H=6, W=8, OH=3, OW=4),
        WindowWorkload(5, 2, 3, "depthwise", 1, 2, 2, 2, left=1, H=3, W=4, OH=3, OW=1),
        WindowWorkload(5, 2, 2, "average", 1, 1, 2, 2, top=1, left=1, H=4, W=5, OH=4, OW=5),
        WindowWorkload(5, 2, 2, "average", top=1, left=1, H=3, W=3, OH=4, OW=4, count_pad=True),
    ]


def epilogues() -> list[WindowWorkload]:
    cases = [*((40, a) for a in SINGLE), (5, "gelu")]
    return [WindowWorkload(C, 2, 1, activation=a, bias=True) for C, a in cases]


@pytest.fixture(scope="module", params=X86)
def kernels(request: pytest.FixtureRequest) -> list[Kernel]:
    target: Target = request.param
    cases = [(w, SMALL) for kind, n in (("depthwise", 4), ("max", 3), ("average", 3)) for w in geometries(kind, 21)[:n]]
    cases += [(w, SMALL) for w in (*channels(target), *sized(), *epilogues())]
    cases += [
        (WindowWorkload(21, 3, 3, "average", DW=2, left=2), {"MR": 14, "NV": 1})
    ]  # the most bodies that there are
    cases += [(w, WIDE) for w in geometries("depthwise", 2 * target.lanes + 3)[1:3]]
    return compile_kernels(WINDOW, [*cases, (WindowWorkload(70, 5, 5, top=2, left=2, OW=19, bias=True), None)], target)


def test_equals_reference(kernels: list[Kernel]) -> None:
    rng = np.random.default_rng(0)
    for kernel in kernels:
        w = kernel.workload
        weights = WINDOW.example_weights(w, rng)
        for B, OH, OW in [(1, 1, 1), (2, 2, 4), (1, 5, 7), (2, 3, 9)][: 1 if w.H else 4]:
            dims = w.sizes(B, OH, OW)
            kernel.check(WINDOW.example_inputs(w, dims, rng), weights, tolerance=2e-6, dims=dims)


def test_many_images_are_shared_out(kernels: list[Kernel]) -> None:
    """Enough work for the body that runs in parallel."""
    rng = np.random.default_rng(2)
    kernel = kernels[-1]
    dims = kernel.workload.sizes(2, 17, 19)
    inputs = WINDOW.example_inputs(kernel.workload, dims, rng)
    kernel.check(inputs, WINDOW.example_weights(kernel.workload, rng), tolerance=2e-6, dims=dims)


def test_a_window_of_nothing_but_minus_infinity_stays_so(kernels: list[Kernel]) -> None:
    kernel = next(k for k in kernels if k.workload.kind == "max" and not k.workload.H)
    dims = kernel.workload.sizes(1, 3, 4)
    inputs = WINDOW.example_inputs(kernel.workload, dims, np.random.default_rng(0))
    inputs["x"][:] = -np.inf
    assert (kernel.run(inputs, {}, dims)["y"] == -np.inf).all()


def _onnx(w: WindowWorkload, x: np.ndarray, weights: dict[str, Any], OH: int, OW: int) -> np.ndarray:
    _, H, W, C = x.shape
    pads = [w.top, w.left]
    pads += [(OH - 1) * w.SH + (w.KH - 1) * w.DH + 1 - w.top - H, (OW - 1) * w.SW + (w.KW - 1) * w.DW + 1 - w.left - W]
    op = {"depthwise": "Conv", "max": "MaxPool", "average": "AveragePool"}[w.kind]
    attributes: dict[str, Any] = {
        "kernel_shape": [w.KH, w.KW],
        "strides": [w.SH, w.SW],
        "pads": [max(p, 0) for p in pads],
    }
    attributes["dilations"] = [w.DH, w.DW]
    if op == "Conv":
        attributes["group"] = C
    names = ["x", "w"] if op == "Conv" else ["x"]
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in (*names, "y")]
    graph = helper.make_graph([helper.make_node(op, names, ["y"], **attributes)], "window", infos[:-1], infos[-1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)])
    feeds = {"x": x.transpose(0, 3, 1, 2)} | ({"w": weights["weight"]} if op == "Conv" else {})
    return ReferenceEvaluator(model).run(None, feeds)[0].transpose(0, 2, 3, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_onnx(kind: str) -> None:
    rng = np.random.default_rng(1)
    for w in geometries(kind, 3):
        weights = WINDOW.example_weights(w, rng)
        x = WINDOW.example_inputs(w, w.sizes(2, 4, 5), rng)["x"]
        OH, OW = w.out(*x.shape[1:3])
        want = _onnx(w, x, weights, OH, OW)
        got = WINDOW.reference(replace(w, OH=OH, OW=OW), {"x": x}, weights)["y"]
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("target", [AVX2, AVX512], ids=lambda t: t.name)
def test_defaults_are_in_their_spaces(target: Target) -> None:
    for C in (1, 5, 16, 31, 32, 33, 960):
        w = WindowWorkload(C, 3, 3)
        assert WINDOW.default(w, target) in WINDOW.space(w, target)


@pytest.mark.parametrize(("fields", "reason"), [({"kind": "median"}, "'median' is unknown"), ({"DW": 0}, "at least 1")])
def test_workloads_that_mean_nothing_are_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(KernelError, match=reason):
        WindowWorkload(3, 3, 3, **fields)
