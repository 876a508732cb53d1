"""Tasks over the real templates' spaces, and a machine that is a formula: measurements without building anything."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from random import Random

from llmc.schedules.attention.attention import ATTENTION
from llmc.schedules.attention.workloads import AttentionWorkload
from llmc.schedules.base import Config, Kernel
from llmc.schedules.gemm.dense import DENSE, DenseLinearWorkload
from llmc.schedules.gemm.lowbit import LOWBIT, LowBitLinearWorkload
from llmc.schedules.norm.norm import NORM, NormWorkload
from llmc.targets.x86 import AVX512
from llmc.tune.task import Measurement, Point, Task, Timing
from llmc.tune.tasks import points_of


def dense(N: int, K: int, **epilogue: bool | str) -> Task:
    kernel = Kernel(DENSE, DenseLinearWorkload(N, K, **epilogue))
    return Task(kernel, AVX512, points_of(kernel))


def lowbit(N: int, K: int, **fields: object) -> Task:
    kernel = Kernel(LOWBIT, LowBitLinearWorkload(N, K, 4, 32, zero=8.0, **fields))
    return Task(kernel, AVX512, points_of(kernel))


def attention(n_heads: int = 9, n_kv_heads: int = 3, head_dim: int = 64) -> Task:
    kernel = Kernel(ATTENTION, AttentionWorkload(n_heads, n_kv_heads, head_dim, head_dim**-0.5))
    return Task(kernel, AVX512, points_of(kernel))


def norm(K: int = 576) -> Task:
    kernel = Kernel(NORM, NormWorkload(K))
    return Task(kernel, AVX512, points_of(kernel))


class Machine:
    """Times dense kernels by a law that knows nothing of the features: FMAs wait for loads, small tiles for latency,
    large ones spill; panels beyond the cache are slow; short prefetches come late.

    `noise`: standard deviation of a time. Configurations in `fail` do not build. `careful` measurements have no noise.
    """

    def __init__(self, noise: float = 0.0, seed: int = 0, interrupt_after: int | None = None) -> None:
        self.noise, self.random = noise, Random(seed)
        self.interrupt_after, self.asked = interrupt_after, list[tuple[Task, Config, bool]]()

    def seconds(self, task: Task, config: Config, point: Point) -> float:
        w, M = task.kernel.workload, point.sizes()["M"]
        MR, NV, KU, KC, ahead = (int(config[k]) for k in ("MR", "NV", "KU", "KC", "ahead"))
        rows = min(MR, M)
        fma = M * w.N * w.K / 32e9
        tile = rows * NV
        compute = fma * max(1, 0.5 + 4 / rows + 2 / NV) * (1 if tile + NV < 30 else 1.4) * max(1, 8 / tile)
        panel = 64 * NV * min(KC, w.K)
        memory = 4 * w.N * w.K / 20e9 * (1 if ahead == 8192 else 1.06 if ahead else 1.25)
        spilt = fma * 0.2 * max(0, math.log2(panel / 2**16))
        return max(compute, memory) + 0.3 * min(compute, memory) + spilt + fma * 0.4 / KU

    def measure(self, task: Task, configs: Iterable[Config], *, careful: bool = False) -> Iterator[Measurement]:
        template, w = task.kernel.template, task.kernel.workload
        default = template.default(w, task.target)
        for config in configs:
            if self.interrupt_after is not None and len(self.asked) >= self.interrupt_after:
                self.interrupt_after = None
                raise KeyboardInterrupt
            self.asked.append((task, config, careful))
            if self.fails(config):
                yield Measurement(config, "build", {}, "too many registers")
                continue
            timings = {}
            for point in task.points:
                noise = 0 if careful else self.noise
                factor = math.exp(self.random.gauss(0, noise)) if noise else 1.0
                base = self.seconds(task, default, point)
                timings[str(point)] = Timing(self.seconds(task, config, point) * factor, base, noise)
            yield Measurement(config, "ok", timings)

    def fails(self, config: Config) -> bool:
        return int(config["MR"]) == 14

    def cost(self, task: Task, config: Config) -> float:
        """Without noise; infinite where it fails."""
        return next(Machine().measure(task, [config])).cost(task.points)


class Still(Machine):
    """All configurations take equally long; what is measured is noise alone."""

    def seconds(self, task: Task, config: Config, point: Point) -> float:
        return 1e-3

    def fails(self, config: Config) -> bool:
        return False


class Journal:
    """A database that is a list."""

    def __init__(self) -> None:
        self.records: list[tuple[Task, Measurement]] = []

    def add(self, task: Task, measurement: Measurement) -> None:
        self.records.append((task, measurement))


def sample(task: Task, count: int, seed: int = 0) -> list[dict[str, int | str]]:
    """`count` different configurations of the task's space."""
    configs = list(task.kernel.template.space(task.kernel.workload, task.target))
    return Random(seed).sample(configs, min(count, len(configs)))
