"""RMS norm and layer norm over the last axis, with the residual addition that precedes them in a transformer.

rms:   y = s / sqrt(mean(s^2) + epsilon) * weight + bias           (Zhang and Sennrich, arXiv:1910.07467)
layer: y = (s - mean(s)) / sqrt(var(s) + epsilon) * weight + bias  (Ba, Kiros and Hinton, arXiv:1607.06450)
with s = x + residual. The variance is taken about the mean, in a pass of its own: no cancellation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from llmc.errors import KernelError
from llmc.schedules.base import Arg, Arrays, Config, Space, Template, Work, Workload
from llmc.schedules.loops import rows, sweep
from llmc.targets.base import Target
from llmc.targets.intrinsics import Simd
from llmc.tvm_shim import IRBuilder, T


@dataclass(frozen=True)
class NormWorkload(Workload):
    """x [M, K] float32 and, if `residual`, a second [M, K] added to it first; `sum_output` also returns their sum.
    Raises KernelError for `sum_output` without `residual`.

    weight [K] float32, and bias [K] if `bias`. y [M, K], sum [M, K].
    """

    K: int
    kind: Literal["rms", "layer"] = "rms"
    epsilon: float = 1e-5
    bias: bool = False
    residual: bool = False
    sum_output: bool = False

    def __post_init__(self) -> None:
        if self.sum_output and not self.residual:
            raise KernelError("a norm without a residual has no sum to return: it would be x itself")

    def inputs(self) -> tuple[Arg, ...]:
        names = ("x", "residual") if self.residual else ("x",)
        return tuple(Arg(name, ("M", self.K), "float32") for name in names)

    def outputs(self) -> tuple[Arg, ...]:
        names = ("y", "sum") if self.sum_output else ("y",)
        return tuple(Arg(name, ("M", self.K), "float32") for name in names)


class Norm(Template):
    """Template "norm". Weights weight [K] and bias [K], as they are.

    Knobs: `unroll` registers a step, each with a partial sum of its own; `grain`: calls of fewer elements run on the
    calling thread, because waking the others would take longer.
    """

    name = "norm"

    def accepts(self, workload: Workload, target: Target) -> bool:
        return isinstance(workload, NormWorkload) and target.kind == "llvm"

    def space(self, workload: NormWorkload, target: Target) -> Space:
        return Space({"unroll": (1, 2, 3, 4, 6, 8, 12, 16), "grain": (16384, 32768, 65536, 131072)})

    def default(self, workload: NormWorkload, target: Target) -> dict[str, int | str]:
        return {"unroll": 4, "grain": 65536}

    def layout(self, workload: NormWorkload, config: Config, target: Target) -> str:
        return "rows"

    def build(self, workload: NormWorkload, target: Target, config: Config) -> Any:
        with IRBuilder() as ib:
            with T.prim_func(s_tir=True):
                T.func_name("norm")
                T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
                handles = {arg.name: T.arg(arg.name, T.handle()) for arg in workload.inputs()}
                weights = ("weight", "bias") if workload.bias else ("weight",)
                buffers = {name: T.arg(name, T.Buffer((workload.K,), "float32")) for name in weights}
                handles |= {arg.name: T.arg(arg.name, T.handle()) for arg in workload.outputs()}
                M = T.int64()
                buffers |= {name: T.match_buffer(h, (M, workload.K), "float32") for name, h in handles.items()}
                simd, unroll = Simd(target), int(config["unroll"])
                rows(M, workload.K, int(config["grain"]), lambda m: _row(workload, simd, unroll, buffers, m))
        return ib.get()

    def reference(self, workload: NormWorkload, inputs: Mapping[str, np.ndarray], weights: Mapping[str, Any]) -> Arrays:
        s = inputs["x"].astype(np.float64)
        if workload.residual:
            s = s + inputs["residual"]
        centred = s - s.mean(-1, keepdims=True) if workload.kind == "layer" else s
        y = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + workload.epsilon) * weights["weight"]
        if workload.bias:
            y = y + weights["bias"]
        return {"y": y, "sum": s} if workload.sum_output else {"y": y}

    def work(self, workload: NormWorkload, dims: Mapping[str, int]) -> Work:
        elements = dims["M"] * workload.K
        buffers = len(workload.inputs()) + len(workload.outputs())
        ops = elements * (4 if workload.kind == "rms" else 7)
        return Work(ops=ops, bytes=4 * (elements * buffers + workload.K * (2 if workload.bias else 1)))

    def example_weights(self, workload: NormWorkload, rng: np.random.Generator) -> dict[str, Any]:
        names = ("weight", "bias") if workload.bias else ("weight",)
        return {name: rng.standard_normal(workload.K, np.float32) for name in names}


def _row(workload: NormWorkload, simd: Simd, unroll: int, buffers: Mapping[str, Any], m: Any) -> None:
    """One row. It stays in the first-level cache, so that each pass may read it again."""
    K, x, y, weight = workload.K, buffers["x"], buffers["y"], buffers["weight"]
    source = x
    if workload.residual:
        source = buffers["sum"] if workload.sum_output else y  # y holds the sum until it is normalised

        def add(i: Any, n: int, _: int) -> None:
            at = m, simd.span(i, n)
            T.buffer_store(source, x[at] + buffers["residual"][at], list(at))

        sweep(K, simd.lanes, unroll, add)

    inverse_K = T.float32(1 / K)
    mean = T.float32(0)
    if workload.kind == "layer":
        mean = T.bind(_sum(K, simd, unroll, lambda i, n: source[m, simd.span(i, n)], lambda v, n, c: v + c) * inverse_K)

    def centred(i: Any, n: int) -> Any:
        value = source[m, simd.span(i, n)]
        return T.bind(value - simd.splat(mean, n)) if workload.kind == "layer" else T.bind(value)

    squares = _sum(K, simd, unroll, centred, lambda v, n, c: simd.fma(v, v, c, n))
    scale = T.bind(T.float32(1) / T.sqrt(squares * inverse_K + T.float32(workload.epsilon)))

    def normalise(i: Any, n: int, _: int) -> None:
        span = simd.span(i, n)
        value = centred(i, n) * simd.splat(scale, n) * weight[span]
        T.buffer_store(y, value + buffers["bias"][span] if workload.bias else value, [m, span])

    sweep(K, simd.lanes, unroll, normalise)


def _sum(K: int, simd: Simd, unroll: int, load: Callable[[Any, int], Any], add: Callable[[Any, int, Any], Any]) -> Any:
    """Sum over a row of what `load` gives, put together by add(value, count, sum): a scalar."""
    partial = [simd.reg() for _ in range(unroll)]
    for register in partial:
        register.v = simd.f32(0)
    rest = T.alloc_buffer((1,), "float32")  # the shorter last register has a sum of its own
    T.buffer_store(rest, T.float32(0), [0])

    def body(i: Any, n: int, u: int) -> None:
        value = load(i, n)
        if n == simd.lanes:
            partial[u].v = add(value, n, partial[u].v)
        else:
            value = add(value, n, simd.f32(0, n))
            T.buffer_store(rest, simd.reduce_add(value) if n > 1 else value, [0])

    sweep(K, simd.lanes, unroll, body)
    total = partial[0].v
    for register in partial[1:]:
        total = total + register.v
    return T.bind(simd.reduce_add(total) + rest[0])


NORM = Norm()
