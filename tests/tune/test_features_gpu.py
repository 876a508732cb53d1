"""What the cost model sees of GPU kernels before anything is compiled, and the estimate that it starts from."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import numpy as np
import pytest

from llmc.schedules.attention.cuda import CUDA_ATTENTION
from llmc.schedules.attention.workloads import AttentionWorkload
from llmc.schedules.base import Kernel, Template
from llmc.schedules.gemm.bf16 import Bf16LinearWorkload
from llmc.schedules.gemm.cuda import CUDA_LINEAR, CUDA_LOWBIT
from llmc.schedules.gemm.cuda_fp8 import MMA_FP8
from llmc.schedules.gemm.cuda_mma import MMA_BF16, MMA_INT8, MMA_LOWBIT, HalfLinearWorkload
from llmc.schedules.gemm.dense import DenseLinearWorkload
from llmc.schedules.gemm.fp8 import Fp8LinearWorkload
from llmc.schedules.gemm.lowbit import LowBitLinearWorkload
from llmc.schedules.norm.cuda import CUDA_NORM
from llmc.schedules.norm.norm import NormWorkload
from llmc.targets.cuda import SM80, SM90, CudaTarget
from llmc.tune import features
from llmc.tune.cost_model import CostModel
from llmc.tune.samples import Samples
from llmc.tune.search import Search
from llmc.tune.task import Measurement, Task, Timing
from llmc.tune.tasks import points_of

KERNELS: dict[str, tuple[Template, Any]] = {
    "lowbit_mma": (MMA_LOWBIT, HalfLinearWorkload(4096, 4096, 4, 32, True, 8.0, "float16", activations="a32")),
    "int8_mma": (MMA_INT8, LowBitLinearWorkload(1536, 576, 4, 32, True, 8.0, "float16")),
    "fp8_mma": (MMA_FP8, Fp8LinearWorkload(1536, 576)),
    "bf16_mma": (MMA_BF16, Bf16LinearWorkload(1536, 576, activations="bf16")),
    "dense_cuda": (CUDA_LINEAR, DenseLinearWorkload(1536, 576, activation="silu_mul")),
    "lowbit_cuda": (CUDA_LOWBIT, LowBitLinearWorkload(1536, 576, 1, 32, activations="a32")),
    "attention_cuda": (CUDA_ATTENTION, AttentionWorkload(9, 3, 64, 0.125)),
    "norm_cuda": (CUDA_NORM, NormWorkload(576)),
}


def task_of(name: str, target: CudaTarget = SM80) -> Task:
    kernel = Kernel(*KERNELS[name])
    return Task(kernel, target, points_of(kernel))


def sampled(task: Task, count: int = 12) -> list[dict[str, int | str]]:
    template, workload = task.kernel.template, task.kernel.workload
    space, random = template.space(workload, task.target), Random(1)
    drawn = ({n: random.choice(v) for n, v in space.knobs.items()} for _ in range(4000))
    found = [config for config in drawn if space.valid(config)]
    assert len(found) >= count
    return [template.default(workload, task.target), *found[:count]]


@pytest.mark.parametrize("target", [SM80, SM90], ids=lambda t: t.name)
@pytest.mark.parametrize("name", KERNELS)
def test_every_template_is_described_in_the_documented_vocabulary(name: str, target: CudaTarget) -> None:
    task = task_of(name, target)
    configs = sampled(task)
    told_apart = 0
    for point in task.points:
        for config in configs:
            counts = features._DESCRIBE[name](task.kernel.workload, config, target, point.sizes(), 1)
            assert set(counts) <= set(features.CODE)
            assert all(math.isfinite(v) and v >= 0 for v in counts.values()), counts
            assert 0 < counts["predicted"] < 1e6 and 0 <= counts["occupancy"] <= 1
        X = features.matrix(task, point, configs, 1)
        assert features.is_analytic(X) and features.analytic(X)[0] == 0, "the default against itself"
        told_apart += len(np.unique(np.nan_to_num(X), axis=0)) > 1
    assert told_apart


@pytest.mark.parametrize("name", ["lowbit_mma", "int8_mma", "bf16_mma", "dense_cuda"])
def test_more_rows_take_longer(name: str) -> None:
    task = task_of(name)
    config = sampled(task)[0]
    few, many = (
        features._DESCRIBE[name](task.kernel.workload, config, SM80, task.points[i].sizes(), 1)["predicted"]
        for i in (1, 2)
    )
    assert few <= many


def test_a_model_that_knows_nothing_says_what_the_estimate_says_and_then_learns() -> None:
    task = task_of("norm_cuda")
    configs = [{"threads": n} for n in (32, 64, 256, 512)]
    vectors = [features.matrix(task, p, configs) for p in task.points]
    shares = np.array([p.weight for p in task.points]) / sum(p.weight for p in task.points)
    expected = sum(s * features.analytic(X) for s, X in zip(shares, vectors, strict=True))
    model = CostModel()
    assert np.allclose(model.predict(task, configs).mean, expected) and np.ptp(expected) > 0.1
    # On some GPU it is the other way round.
    ratios = dict(zip((32, 64, 256, 512), 2.0**-expected, strict=True))
    measured = [
        Measurement(c, "ok", {str(p): Timing(ratios[int(c["threads"])], 1.0, 0.01) for p in task.points})
        for c in configs
    ]
    learned = model.adapt(Samples.of([(task, m) for m in measured] * 4)).predict(task, configs).mean
    assert np.corrcoef(learned, expected)[0, 1] < 0
    prior = CostModel.fit(Samples.of([(task, m) for m in measured] * 8), kind="regression").predict(task, configs).mean
    assert np.corrcoef(prior, expected)[0, 1] < 0


def test_the_first_proposals_are_those_that_should_be_fast() -> None:
    task = task_of("norm_cuda")
    search = Search(task, CostModel(), seed=1)
    (first,) = search.propose(1)
    assert search.predict([first])[0] == min(search.predict([{"threads": n} for n in (32, 64, 256, 512)]))
