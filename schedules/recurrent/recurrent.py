"""Recurrent layers after the projection of their inputs: every step is one product with a weight that stays in the
caches, and a few functions of its sums.

The recurrent weight is stored as panels, one for every NR hidden units with the rows of all their gates side by side,
laid out [hidden, G * NR]: one step in k reads G * NR consecutive floats, nothing is added across a register, and all
gates of a unit are ready at once. Several rows of the batch pass over a panel together, as in a GEMM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llmc.schedules.base import Arrays, Config, Space, Template, Work, Workload
from llmc.schedules.gemm.panels import pack_panels
from llmc.schedules.recurrent.cells import PHASES
from llmc.schedules.recurrent.kernel import build
from llmc.schedules.recurrent.workload import RecurrentWorkload, reference
from llmc.targets.base import Target


class Recurrent(Template):
    """Template "recurrent". Weights in: recurrent [D, G * hidden, hidden] (any strides), and for gru_after bias
    [D, hidden]. Packed: for each phase of a step [D, ceil(hidden/NR), hidden, gates * NR], missing units zero.

    Knobs: MR rows by NV registers of every gate is the register block, KU the unrolling of k. `share` is what threads
    share: the "units" of a step, or whole "sequences" (directions and blocks of rows), which need not meet after every
    step, but each read the whole weight. Steps of fewer than `grain` multiplications are not shared.
    """

    name = "recurrent"

    def accepts(self, workload: Workload, target: Target) -> bool:
        return isinstance(workload, RecurrentWorkload) and target.kind == "llvm"

    def space(self, workload: RecurrentWorkload, target: Target) -> Space:
        gates = max(phase.gates for phase in PHASES[workload.cell])

        def valid(config: Config) -> bool:
            NV = gates * int(config["NV"])
            return target.vector_registers > int(config["MR"]) * NV + NV

        return Space(
            {
                "MR": (1, 2, 3, 4, 5, 6, 8, 10),
                "NV": (1, 2, 3, 4, 6),
                "KU": (4, 8),
                "share": ("units", "sequences"),
                "grain": (1 << 15, 1 << 16, 1 << 17, 1 << 18),
            },
            valid,
        )

    def default(self, workload: RecurrentWorkload, target: Target) -> dict[str, int | str]:
        gates = max(phase.gates for phase in PHASES[workload.cell])
        wide = target.vector_registers >= 32
        MR, NV = {
            (4, True): (6, 1),
            (3, True): (8, 1),
            (2, True): (6, 2),
            (1, True): (6, 4),
            (4, False): (2, 1),
            (3, False): (3, 1),
            (2, False): (2, 2),
            (1, False): (2, 4),
        }[gates, wide]
        weight = 4 * workload.gates * workload.hidden**2
        share = "sequences" if weight <= target.l2_bytes // 2 else "units"
        return {"MR": MR, "NV": NV, "KU": 4, "share": share, "grain": 1 << 17}

    def prepack(
        self, weights: Mapping[str, Any], workload: RecurrentWorkload, config: Config, target: Target
    ) -> Arrays:
        H, NR = workload.hidden, int(config["NV"]) * target.lanes
        packed = {}
        for i, phase in enumerate(PHASES[workload.cell]):
            rows = slice(phase.first * H, (phase.first + phase.gates) * H)
            panels = [pack_panels(r[rows], phase.gates * NR, phase.gates) for r in weights["recurrent"]]
            packed[f"recurrent{i}"] = np.stack(panels)
        if workload.cell == "gru_after":
            packed["bias"] = weights["bias"]
        return packed

    def layout(self, workload: RecurrentWorkload, config: Config, target: Target) -> str:
        return f"recurrent.{workload.cell}.{int(config['NV']) * target.lanes}"

    def build(self, workload: RecurrentWorkload, target: Target, config: Config) -> Any:
        return build(workload, target, config)

    def reference(
        self, workload: RecurrentWorkload, inputs: Mapping[str, np.ndarray], weights: Mapping[str, Any]
    ) -> Arrays:
        return reference(workload, inputs, weights)

    def work(self, workload: RecurrentWorkload, dims: Mapping[str, int]) -> Work:
        steps, B, H = dims["steps"], dims["B"], workload.hidden
        D, G, states = workload.directions, workload.gates, len(workload.outputs()) - 1
        streamed = steps * D * B * H * (G + 1) + D * B * H * states * (2 if workload.initial else 1)
        return Work(ops=2 * steps * D * B * G * H * H, bytes=4 * (D * G * H * H + streamed))

    def example_weights(self, workload: RecurrentWorkload, rng: np.random.Generator) -> dict[str, Any]:
        D, H = workload.directions, workload.hidden
        recurrent = rng.standard_normal((D, workload.gates * H, H), np.float32) / np.float32(H**0.5)
        return {"recurrent": recurrent, "bias": rng.standard_normal((D, H), np.float32)}

    def corners(self, workload: RecurrentWorkload) -> Sequence[Mapping[str, int]]:
        return [{"steps": steps, "B": B} for steps in (1, 3) for B in (*range(1, 12), 17)]


RECURRENT = Recurrent()
