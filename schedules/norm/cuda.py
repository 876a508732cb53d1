"""RMS norm and layer norm on GPUs: a block a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmc.schedules.base import Config, Space, Workload
from llmc.schedules.norm.norm import Norm, NormWorkload
from llmc.targets.base import Target
from llmc.targets.threads import BlockReduction, Cell, launch, strided
from llmc.tvm_shim import IRBuilder, T


class CudaNorm(Norm):
    """Template "norm_cuda": `Norm` with a block of `threads` threads a row. Each reads the elements again that it read
    for the mean: they are in the cache."""

    name = "norm_cuda"

    def accepts(self, workload: Workload, target: Target) -> bool:
        return isinstance(workload, NormWorkload) and target.kind == "cuda"

    def space(self, workload: NormWorkload, target: Target) -> Space:
        return Space({"threads": (32, 64, 128, 256, 512)})

    def default(self, workload: NormWorkload, target: Target) -> dict[str, int | str]:
        # What a thread does one after another is what few rows wait for; with fewer than two elements some do nothing.
        two_each = 1 << (workload.K // 2).bit_length() - 1 if workload.K >= 2 else 1
        return {"threads": max(32, min(512, two_each))}

    def build(self, workload: NormWorkload, target: Target, config: Config) -> Any:
        w, threads = workload, int(config["threads"])
        with IRBuilder() as ib, T.prim_func(s_tir=True):
            T.func_name("norm")
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            handles = {arg.name: T.arg(arg.name, T.handle()) for arg in w.inputs()}
            weights = ("weight", "bias") if w.bias else ("weight",)
            buffers = {name: T.arg(name, T.Buffer((w.K,), "float32")) for name in weights}
            handles |= {arg.name: T.arg(arg.name, T.handle()) for arg in w.outputs()}
            M = T.int64()
            buffers |= {name: T.match_buffer(h, (M, w.K), "float32") for name, h in handles.items()}
            with launch(threads, M) as (thread, m):
                _row(w, buffers, m, thread, threads)
        return ib.get()


def _row(w: NormWorkload, buffers: dict[str, Any], m: Any, thread: Any, threads: int) -> None:
    x, y, weight = buffers["x"], buffers["y"], buffers["weight"]
    source = x
    if w.residual:
        source = buffers["sum"] if w.sum_output else y  # y holds the sum until it is normalised
        with strided(w.K, thread, threads) as i:
            T.buffer_store(source, x[m, i] + buffers["residual"][m, i], [m, i])
    block = BlockReduction(thread, threads)

    def total(of: Callable[[Any], Any]) -> Cell:
        mine = Cell(T.float32(0))
        with strided(w.K, thread, threads) as i:
            mine.v = mine.v + of(source[m, i])
        return block.sum(mine.v)

    mean = total(lambda s: s) if w.kind == "layer" else None
    if mean is not None:
        mean.v = mean.v * T.float32(1 / w.K)

    def centred(s: Any) -> Any:
        return s if mean is None else s - mean.v

    scale = total(lambda s: centred(s) * centred(s))
    scale.v = T.float32(1) / T.sqrt(scale.v * T.float32(1 / w.K) + T.float32(w.epsilon))
    with strided(w.K, thread, threads) as i:
        value = centred(source[m, i]) * scale.v * weight[i]
        T.buffer_store(y, value + buffers["bias"][i] if w.bias else value, [m, i])


CUDA_NORM = CudaNorm()
