"""Are the results of a GPU kernel's configuration right? Its CUDA C runs on the CPU (`llmc.emulator`), for a smaller
workload of the same kind: what a configuration decides are tiles, pipelines and who does what, not sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from llmc.emulator.emulator import EmulationError
from llmc.emulator.templates import EmulatedKernel
from llmc.schedules.attention.workloads import AttentionWorkload
from llmc.schedules.base import Config, Kernel, Workload
from llmc.schedules.gemm.dense import DenseLinearWorkload
from llmc.schedules.gemm.lowbit import LowBitLinearWorkload
from llmc.schedules.recurrent.workload import RecurrentWorkload
from llmc.schedules.sampling.sample import SampleWorkload
from llmc.targets.cuda import CudaTarget
from llmc.tune.subject import Rejected
from llmc.tune.tasks import decode_and_prompt, points_of

_ROWS = (1, 12, 70)  # M: every kind of a kernel, and a second, partial block
_KEYS, _TOKENS = 1200, 40  # of attention: more keys than one block of threads takes, a prompt that fills no tile
_N, _K, _UNIT = 128, 1024, 512  # least sizes of a linear layer, and whole tiles of which some are left out


def check(kernel: Kernel, config: Config, target: CudaTarget, seed: int = 0) -> None:
    """Raises Rejected if the configuration computes something else than the reference, or does what no kernel may."""
    small = Kernel(kernel.template, smaller(kernel, config, target))
    template, workload = small.template, small.workload
    rng = np.random.default_rng([seed, *workload.key().encode()])
    emulated = EmulatedKernel(template, workload, target, config)
    weights = template.example_weights(workload, rng)
    packed = template.prepack(weights, workload, config, target)
    for sizes in _sizes(small):
        inputs = template.example_inputs(workload, sizes, rng)
        want = template.expected(workload, config, inputs, weights)
        try:
            got = emulated.run(inputs, packed)
        except EmulationError as error:
            raise Rejected("wrong", f"emulated, {error} at {sizes}") from error
        for name, expected in want.items():
            off = float(np.abs(got[name] - expected).max(initial=0))
            bound = template.tolerance(workload) * max(1e-30, float(np.abs(expected).max(initial=0)))
            if not off <= bound:
                raise Rejected("wrong", f"emulated, {name} is off by {off:.2g} at {sizes}: {bound:.2g} is allowed")


def smaller(kernel: Kernel, config: Config, target: CudaTarget) -> Workload:
    """The smallest workload that the configuration serves in the same way; in the end the kernel's own."""
    template = kernel.template
    for small in _smaller(kernel.workload):
        if template.accepts(small, target) and config in template.space(small, target):
            return small
    return kernel.workload


def _smaller(w: Any) -> Iterator[Workload]:
    """Fewer heads, or columns, and a part of K: without most of the whole tiles, and with the same rest."""
    if isinstance(w, AttentionWorkload):
        yield dataclasses.replace(w, n_heads=w.n_heads // w.n_kv_heads, n_kv_heads=1)
    if isinstance(w, SampleWorkload):
        yield dataclasses.replace(w, V=_K + w.V % _UNIT)
    if isinstance(w, RecurrentWorkload) and w.hidden > _N:
        yield dataclasses.replace(w, hidden=_N + w.hidden % _N)
    if not isinstance(w, DenseLinearWorkload | LowBitLinearWorkload):
        return
    columns = w.columns if w.columns < 2 * _N else _N + w.columns % _N
    for K in (*range(_K + w.K % _UNIT, w.K, _UNIT), w.K):
        # One scale a row stays so.
        groups = {"group_size": K} if getattr(w, "group_size", 0) >= w.K else {}
        yield dataclasses.replace(w, N=columns * w.halves, K=K, **groups)


def _sizes(kernel: Kernel) -> list[dict[str, int]]:
    symbols = {s for arg in (*kernel.workload.inputs(), *kernel.workload.outputs()) for s in arg.shape}
    if "M" in symbols:
        return [{"M": M} for M in _ROWS]
    if isinstance(kernel.workload, AttentionWorkload):
        return decode_and_prompt(kernel, _KEYS, _TOKENS)
    return [point.sizes() for point in points_of(kernel)]
