"""What the recurrent template does at a point; `features.CODE` names and explains the counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from llmc.schedules.base import Config
from llmc.schedules.recurrent.cells import PHASES
from llmc.targets.base import Target
from llmc.tune.features_loops import parallel_loop, serial_loop

if TYPE_CHECKING:
    from llmc.schedules.recurrent.workload import RecurrentWorkload

_CHAINS = 8  # sums that a product keeps in flight at least


def recurrent(
    w: RecurrentWorkload, config: Config, target: Target, sizes: Mapping[str, int], threads: int
) -> dict[str, float]:
    """`schedules.recurrent.kernel`: blocks of rows over panels of hidden units, step after step. A gru's phase with
    most gates stands for the others."""
    H, D, B, steps = w.hidden, w.directions, sizes["B"], sizes["steps"]
    NV, KU, grain = (int(config[k]) for k in ("NV", "KU", "grain"))
    vectors = NV * max(phase.gates for phase in PHASES[w.cell])
    blocks = -(-B // int(config["MR"]))
    rows, width = -(-B // blocks), NV * target.lanes
    panels = -(-H // width)
    chains = 1
    while chains * rows * vectors < _CHAINS and chains < KU:
        chains *= 2
    work = B * D * w.gates * H * H  # multiplications of a step
    if config["share"] == "units":
        tasks, shared = panels, work >= grain
    else:
        tasks, shared = blocks * D, blocks * D > 1 and work * steps >= grain
    owners = min(threads, tasks) if shared and config["share"] == "units" else 1
    panel = 4 * H * vectors * target.lanes
    loop = parallel_loop if shared else serial_loop
    return {
        "rows": rows,
        "vectors": vectors,
        "sums": rows * vectors * chains,
        "registers": (rows * vectors * chains + vectors + 1) / target.vector_registers,
        "loads_per_op": 1 / rows + 1 / vectors,
        "unroll": KU,
        "body": KU * rows * vectors,
        "trips": H // KU,
        "waste": panels * width / H,
        "tail": (H % KU) / H,
        "tile_l1": (4 * rows * H + panel) / target.l1_bytes,
        "panel_l1": panel / target.l1_bytes,
        "panel_l2": 4 * w.gates * panels * width * H / owners / target.l2_bytes,
        **loop(tasks, threads, 2 * work * (1 if config["share"] == "units" else steps)),
    }
