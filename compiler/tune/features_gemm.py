"""What the linear templates do at a point; `features.CODE` names and explains the counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from llmc.schedules.base import Config
from llmc.targets.base import Target
from llmc.tune.features_loops import parallel_loop
from llmc.tune.features_tiles import lowbit_tiles

if TYPE_CHECKING:
    from llmc.schedules.gemm.dense import DenseLinearWorkload
    from llmc.schedules.gemm.lowbit import LowBitLinearWorkload

_SLICED_BLOCKS = 8  # row blocks of one task where the dense template slices k
_CHAINS = 8  # sums that both float templates keep in flight at least


def lowbit(
    w: LowBitLinearWorkload, config: Config, target: Target, sizes: Mapping[str, int], threads: int
) -> dict[str, float]:
    """`schedules.gemm.lowbit_kernel`: one streaming pass for few rows, register blocks over panels for many."""
    M, layout, a8 = sizes["M"], w.layout(target.lanes), w.activations == "a8"
    KU, few = int(config["KU"]), int(config["skinny"]) >= sizes["M"]
    sums_a_tile = 2 if a8 and layout.groups > 1 else 1  # integers of a group, and floats across groups
    if few:
        rows, vectors = M, int(config["blocks"])
        while vectors > 1 and rows * vectors * sums_a_tile + vectors >= target.vector_registers:
            vectors //= 2
        task_blocks, spans, passes = max(int(config["blocks"]), layout.halves), 1, 1
        prefetch = int(config["ahead_one"] if M == 1 else config["ahead_many"])
    else:
        rows, vectors = int(config["MR"]), int(config["NV"])
        task_blocks, passes = max(vectors, layout.halves), -(-M // rows)
        spans = max(passes // max(1, int(config["task_rows"]) // rows), 1)
        prefetch = int(config["ahead_many"]) if a8 else 0
    panels = -(-layout.used_blocks // task_blocks)
    chains = 1
    while not a8 and few and chains * rows * vectors < _CHAINS:
        chains *= 2
    expanded = not a8 and not few
    x_bytes: float = layout.padded_K * (1 if a8 else 4)  # of one row
    block_bytes = layout.padded_K * target.lanes * (4 if expanded else w.bits / 8) + layout.groups * target.lanes * 4
    step = 4 if a8 else 1  # k of one multiply
    group_steps = layout.group // step
    unit_k = 4 * layout.unit_quads  # a stream unrolls units whole
    unroll = min(KU, group_steps) if a8 else unit_k if few else KU
    unpack = layout.unpack_steps if a8 else 4.0  # instructions a register of codes
    if config.get("body") == "lut":  # numbers are taken apart, sums looked up, weighed and added; or codes made
        unpack, expanded = (3.75 * w.bits / 2, False) if few else (8.0 * w.bits, True)
        block_bytes += layout.padded_K * target.lanes * (0 if few else 1)
        x_bytes *= target.lanes / 2 if few else 1
    passes_a_span = max(passes / spans, 1)
    least = _least_bytes(w, M, x_bytes)
    on_tiles = target.tiles and a8 and not few
    return {
        "rows": rows,
        "vectors": vectors,
        "sums": rows * vectors * chains,
        "registers": (rows * vectors * sums_a_tile * chains + vectors + 1) / target.vector_registers,
        "loads_per_op": 1 / rows + 1 / vectors,
        "unroll": unroll,
        "body": unroll * rows * vectors,
        "trips": (layout.padded_K if expanded else group_steps) / unroll,
        "unpack_per_op": unpack / (passes_a_span * rows if expanded else rows),
        "scale_per_op": 3 / group_steps if a8 else 0,
        "waste": passes * rows / M * layout.blocks / layout.used_blocks,
        "tail": (M % rows) / M,
        "tile_l1": (rows * x_bytes + vectors * block_bytes) / target.l1_bytes,
        "panel_l1": task_blocks * block_bytes / target.l1_bytes,
        "panel_l2": (task_blocks * block_bytes + M / spans * x_bytes) / target.l2_bytes,
        "scratch_l1": (task_blocks * block_bytes if expanded else 0) / target.l1_bytes,
        "traffic": (spans * layout.used_blocks * block_bytes + panels * M * x_bytes) / least,
        "prefetch": prefetch,
        **parallel_loop(spans * panels, threads, 2 * M * w.N * w.K),
        "slices": layout.groups,
        **(lowbit_tiles(layout, M, panels * task_blocks, config, least) if on_tiles else {}),
    }


def dense(
    w: DenseLinearWorkload, config: Config, target: Target, sizes: Mapping[str, int], threads: int
) -> dict[str, float]:
    """`schedules.gemm.dense`: register blocks over fp32 panels, sliced where K is long."""
    M, lanes = sizes["M"], target.lanes
    MR, NV, KU, KC = (int(config[k]) for k in ("MR", "NV", "KU", "KC"))
    rows, slices = min(MR, M), -(-w.K // KC)
    chains = 1
    while chains * rows * NV < _CHAINS and chains < KU:
        chains *= 2
    width = NV * lanes // w.halves
    panels, blocks = -(-w.columns // width), 1 if slices == 1 else _SLICED_BLOCKS
    taken = MR * blocks
    groups = -(-M // taken)
    depth = -(-w.K // slices)
    panel_bytes = 4 * depth * NV * lanes
    return {
        "rows": rows,
        "vectors": NV,
        "sums": rows * NV * chains,
        "registers": (rows * NV * chains + NV + 1) / target.vector_registers,
        "loads_per_op": 1 / rows + 1 / NV,
        "unroll": KU,
        "body": KU * rows * NV,
        "trips": depth // KU,
        "waste": panels * width / w.columns,
        "tail": (M % MR) / M,
        "tile_l1": (4 * rows * depth + panel_bytes) / target.l1_bytes,
        "panel_l1": panel_bytes / target.l1_bytes,
        "panel_l2": (panel_bytes + 4 * min(M, taken) * depth) / target.l2_bytes,
        "scratch_l1": (4 * taken * NV * lanes if slices > 1 else 0) / target.l1_bytes,
        "traffic": (4 * w.N * w.K + 4 * panels * M * w.K) / _least_bytes(w, M, 4 * w.K),
        "prefetch": int(config["ahead"]),
        **parallel_loop(groups * panels, threads, 2 * M * w.N * w.K),
        "slices": slices,
    }


def _least_bytes(w: DenseLinearWorkload | LowBitLinearWorkload, M: int, x_bytes: float) -> float:
    """Weights and rows of x, each read once."""
    return w.N * w.K * getattr(w, "bits", 32) / 8 + M * x_bytes
