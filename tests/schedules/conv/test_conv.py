"""The convolution kernel against float64, at every edge of its blocks, and its reference against onnx's own."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from llmc.errors import KernelError
from llmc.schedules.conv.conv import CONV
from llmc.schedules.conv.workloads import ConvWorkload
from llmc.schedules.epilogue import SINGLE
from llmc.targets.base import Target
from llmc.targets.x86 import AVX2, AVX512
from tests.schedules.kernels import X86, Kernel, compile_kernels

SMALL = {"MR": 5, "NV": 2, "KU": 4}  # a small register block: all of its edges are few pixels away


def geometries() -> list[ConvWorkload]:
    """Windows, strides, dilations and groups, with outputs that leave a part of the last panel empty."""
    return [
        ConvWorkload(1, 1),
        ConvWorkload(3, 33, 7, 7, 2, 2),
        ConvWorkload(5, 37, 3, 3),
        ConvWorkload(5, 37, 1, 1, 2, 3),
        ConvWorkload(4, 31, 2, 3, 1, 2, 3, 2),
        ConvWorkload(7, 19, 1, 5),
        ConvWorkload(6, 10, 3, 3, groups=2),
        ConvWorkload(8, 140, 3, 1, groups=2, bias=True),
        ConvWorkload(66, 20, 3, 3, DW=2, groups=1, bias=True, residual=True),
    ]


def whole_rows() -> list[ConvWorkload]:
    """Sizes that are known: blocks of several rows, of one and less, with a part that is left in either direction."""
    sizes = [(1, 1), (7, 1), (5, 2), (4, 2), (9, 3), (3, 5), (3, 6), (2, 11), (2, 23)]
    return [ConvWorkload(3, 35, 3, 2, H=OH + 2, W=OW + 1, bias=True) for OH, OW in sizes]


def epilogues() -> list[ConvWorkload]:
    return [ConvWorkload(5, 37, 3, 3, activation=a, bias=True, residual=i % 2 == 0) for i, a in enumerate(SINGLE)]


def deep(target: Target) -> ConvWorkload:
    """So many weights and so few pixels that blocks fetch the next panel, also behind the last one."""
    return ConvWorkload(512, 3 * target.lanes, 3, 3, H=5, W=5)


@pytest.fixture(scope="module", params=X86)
def kernels(request: pytest.FixtureRequest) -> list[Kernel]:
    target: Target = request.param
    cases = [(w, SMALL) for w in (*geometries(), *whole_rows(), *epilogues())]
    return compile_kernels(CONV, [*cases, (deep(target), SMALL), (ConvWorkload(9, 70, 3, 3, H=12, W=31), None)], target)


def test_equals_reference(kernels: list[Kernel]) -> None:
    rng = np.random.default_rng(0)
    for kernel in kernels:
        w = kernel.workload
        weights = CONV.example_weights(w, rng)
        for B, OH, OW in [(1, 1, 1), (2, 2, 4), (1, 3, 5), (2, 1, 6), (1, 2, 11), (1, 1, 23)][: 2 if w.H else 6]:
            dims = w.sizes(B, OH, OW)
            kernel.check(CONV.example_inputs(w, dims, rng), weights, tolerance=4e-6, dims=dims)


@pytest.mark.parametrize("w", [w for w in geometries() if not w.residual], ids=lambda w: w.key())
def test_the_reference_is_onnx(w: ConvWorkload) -> None:
    rng = np.random.default_rng(1)
    weights = CONV.example_weights(w, rng)
    x = CONV.example_inputs(w, w.sizes(2, 3, 4), rng)["x"]
    attributes = {"strides": [w.SH, w.SW], "dilations": [w.DH, w.DW], "group": w.groups}
    names = ["x", "w", "b"] if w.bias else ["x", "w"]
    node = helper.make_node("Conv", names, ["y"], kernel_shape=[w.KH, w.KW], **attributes)
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in (*names, "y")]
    graph = helper.make_graph([node], "conv", infos[:-1], infos[-1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    feeds = {"x": x.transpose(0, 3, 1, 2), "w": weights["weight"]} | ({"b": weights["bias"]} if w.bias else {})
    (want,) = ReferenceEvaluator(model).run(None, feeds)
    got = CONV.reference(w, {"x": x}, weights)["y"].transpose(0, 3, 1, 2)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("target", [AVX2, AVX512], ids=lambda t: t.name)
def test_defaults_are_in_their_spaces(target: Target) -> None:
    shapes = [(3, 64, 7), (64, 64, 3), (512, 512, 3), (16, 24, 1), (960, 160, 1), (4, 1, 3)]
    for w in (ConvWorkload(C, N, k, k) for C, N, k in shapes):
        assert CONV.default(w, target) in CONV.space(w, target)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"groups": 2}, "do not divide into 2 groups"),
        ({"groups": 0}, "do not divide into 0 groups"),
        ({"SH": 0}, "at least 1"),
        ({"KH": 3, "H": 2}, "no window fits"),
        ({"activation": "tanhh"}, "'tanhh' is unknown"),
    ],
)
def test_workloads_that_mean_nothing_are_refused(fields: dict[str, int], reason: str) -> None:
    with pytest.raises(KernelError, match=reason):
        ConvWorkload(3, 5, **fields)  # type: ignore[arg-type]
