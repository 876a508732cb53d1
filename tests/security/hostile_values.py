"""Models whose structure holds, and whose operators ask for too much."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, helper

from tests.importer.helpers import FLOAT, model, node, saved
from tests.security.kinds import kind

IMPOSSIBLE, TOO_MUCH = "impossible shape", "declares more than 2^40 bytes"


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def run(folder: Path, *nodes: NodeProto, shape: list[int] | None = None, opset: int = 17, **constants: object) -> Path:
    """x of the shape ([4]) through the nodes to y."""
    return saved(folder, model(nodes, [("x", FLOAT, shape or [4])], ["y"], constants, opset=opset))


@kind(TOO_MUCH)
def expand_to_exabytes(folder: Path) -> Path:
    return run(folder, node("Expand", "x s", "y"), s=ints(2**40, 2**20, 4))


@kind(TOO_MUCH)
def expand_past_64_bits(folder: Path) -> Path:
    return run(folder, node("Expand", "x s", "y"), s=ints(2**62, 4))


@kind(TOO_MUCH)
def concat_that_overflows_to_nothing(folder: Path) -> Path:
    """4 · 64^12 is 0 in 64 bits."""
    nodes = [node("Concat", " ".join([f"v{i}"] * 64), f"v{i + 1}", axis=0) for i in range(12)]
    return run(folder, node("Relu", "x", "v0"), *nodes, node("Relu", "v12", "y"))


@kind(TOO_MUCH)
def range_of_exabytes(folder: Path) -> Path:
    nodes = [node("Range", "a b c", "r"), node("Cast", "r", "y", to=FLOAT)]
    return run(folder, *nodes, a=np.array(0), b=np.array(2**62), c=np.array(1))


@kind(TOO_MUCH)
def a_shape_repeated_endlessly(folder: Path) -> Path:
    nodes = [node("Shape", "x", "s"), node("Tile", "s r", "t"), node("Cast", "t", "y", to=FLOAT)]
    return run(folder, *nodes, r=ints(2**41))


@kind(TOO_MUCH)
def one_hot_of_exabytes(folder: Path) -> Path:
    nodes = [node("OneHot", "i d v", "y")]
    return run(folder, *nodes, i=ints(1), d=np.array(2**50), v=np.array([0, 1], np.float32))


@kind(TOO_MUCH)
def pooling_over_a_border_of_exabytes(folder: Path) -> Path:
    pool = node("MaxPool", "x", "y", kernel_shape=[2, 2], pads=[2**40] * 4)
    return run(folder, pool, shape=[1, 1, 4, 4])


@kind(IMPOSSIBLE)
def einsum_of_60_dimensions(folder: Path) -> Path:
    return run(folder, node("Einsum", "x", "y", equation="a->" + "a" * 60))


@kind(IMPOSSIBLE)
def unsqueezed_5000_times(folder: Path) -> Path:
    return run(folder, node("Unsqueeze", "x a", "y"), a=ints(*range(5000)))


@kind("declares more than 2^40 bytes")
def resized_to_terabytes(folder: Path) -> Path:
    return run(folder, node("Resize", "x _ _ s", "y"), shape=[1, 1, 2, 2], s=ints(1, 1, 2**40, 2**40))


@kind("its operands do not fit")
def resized_by_what_is_no_number(folder: Path) -> Path:
    scales = np.array([1, 1, np.nan, np.inf], np.float32)
    return run(folder, node("Resize", "x _ s", "y"), shape=[1, 1, 2, 2], s=scales)


@kind("its operands do not fit")
def a_slice_without_steps(folder: Path) -> Path:
    return run(folder, node("Slice", "x a b c d", "y"), a=ints(0), b=ints(4), c=ints(0), d=ints(0))


@kind("its operands do not fit")
def blocks_of_nothing(folder: Path) -> Path:
    return run(folder, node("DepthToSpace", "x", "y", blocksize=0), shape=[1, 4, 2, 2])


@kind("must be equal")
def more_groups_than_channels(folder: Path) -> Path:
    weight = np.ones((1, 1, 1, 1), np.float32)
    return run(folder, node("Conv", "x w", "y", group=2**40), shape=[1, 1, 4, 4], w=weight)


@kind("it is random")
def noise_of_exabytes(folder: Path) -> Path:
    return run(folder, node("RandomNormal", "", "k", shape=[2**40, 2**40]), node("Add", "x k", "y"))


# -- control flow -------------------------------------------------------------------------------------------------
def branch(*outputs: str) -> GraphProto:
    nodes = [node("Relu", "x", o) for o in outputs]
    return helper.make_graph(nodes, "branch", [], [onnx.ValueInfoProto(name=o) for o in outputs])


@kind("has no else_branch")
def an_if_with_one_branch(folder: Path) -> Path:
    return run(folder, node("If", "c", "y", then_branch=branch("o")), c=np.array(False))


@kind("branch has 0 inputs and 1 outputs, which do not fit")
def an_if_with_more_outputs_than_its_branches(folder: Path) -> Path:
    return run(folder, node("If", "c", "y z", then_branch=branch("o"), else_branch=branch("o")), c=np.array(True))


@kind("has no body")
def a_loop_without_a_body(folder: Path) -> Path:
    return run(folder, node("Loop", "n _ x", "y"), n=np.array(3))


@kind("body has 0 inputs and 1 outputs, which do not fit")
def a_loop_whose_body_takes_nothing(folder: Path) -> Path:
    return run(folder, node("Loop", "n _ x", "y", body=branch("o")), n=np.array(3))
