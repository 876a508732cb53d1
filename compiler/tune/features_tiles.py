"""What kernels on AMX tiles do at a point; `features.CODE` names and explains the counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from llmc.schedules.base import Config
from llmc.schedules.gemm.lowbit_tiles import tile_depth
from llmc.targets.base import Target
from llmc.targets.tiles import ROW_BYTES, ROWS
from llmc.tune.features_loops import parallel_loop

if TYPE_CHECKING:
    from llmc.schedules.attention.workloads import AttentionWorkload
    from llmc.schedules.gemm.bf16 import Bf16LinearWorkload
    from llmc.schedules.gemm.packing import LowBitLayout

_TILE = ROWS * ROW_BYTES  # bytes
_BLOCK = 64  # keys that attention takes at a time
_DEPTH = 32  # bfloat16 in a row of a tile


def attention_tiles(w: AttentionWorkload, sizes: Mapping[str, int], BQ: int, least_bytes: float) -> dict[str, float]:
    """`schedules.attention.tile_flash`; C are the keys that a task reads."""
    stacked, blocks = sizes["S"] * w.group, -(-sizes["C"] // _BLOCK)
    tasks = [min(BQ, stacked - first) for first in range(0, stacked, BQ)]
    times = sizes["B"] * w.n_kv_heads * blocks * sum(-(-rows // ROWS) for rows in tasks)  # row tiles meet key blocks
    steps, vectors, key_tiles = -(-w.head_dim // _DEPTH), -(-w.head_dim // ROWS), _BLOCK // ROWS
    value_steps, sweeps = _BLOCK // _DEPTH, -(-vectors // key_tiles)
    dots = steps * key_tiles + value_steps * vectors
    moved = steps * (1 + key_tiles) + key_tiles + value_steps * (sweeps + vectors) + 2 * vectors
    return _counts(times * dots, times * moved, times * moved * _TILE, least_bytes)


def lowbit_tiles(layout: LowBitLayout, M: int, blocks: int, config: Config, least_bytes: float) -> dict[str, float]:
    """`schedules.gemm.lowbit_tiles` for many rows times `blocks` row blocks: sums leave the tiles after each group."""
    depth = tile_depth(layout)
    steps = -(-layout.group // (4 * depth))
    return _linear(M, blocks * layout.groups, steps, depth, config, least_bytes)


def bf16(
    w: Bf16LinearWorkload, config: Config, target: Target, sizes: Mapping[str, int], threads: int
) -> dict[str, float]:
    """`schedules.gemm.bf16_kernel`: one streaming pass for few rows; blocks over panels, or on tiles, for many."""
    M, layout, few = sizes["M"], w.layout(target.lanes), int(config["skinny"]) >= sizes["M"]
    rows, vectors = (M, int(config["blocks"])) if few else (int(config["MR"]), int(config["NV"]))
    task_blocks, passes = max(vectors, layout.halves), -(-M // rows)
    spans = 1 if few else max(passes // max(1, int(config["task_rows"]) // rows), 1)
    panels = -(-layout.used_blocks // task_blocks)
    block_bytes = 2 * layout.padded_K * target.lanes
    least = 2 * w.N * w.K + 4 * M * w.K
    counts = {
        "rows": rows,
        "vectors": vectors,
        "loads_per_op": 1 / rows + 1 / vectors,
        "trips": layout.padded_K,
        "waste": passes * rows / M * layout.blocks / layout.used_blocks,
        "tail": (M % rows) / M,
        "panel_l1": task_blocks * block_bytes / target.l1_bytes,
        "panel_l2": task_blocks * block_bytes / target.l2_bytes,
        "traffic": (spans * layout.used_blocks * block_bytes + panels * M * 4 * w.K) / least,
        "prefetch": int(config["ahead_one"] if M == 1 else config["ahead_many"] if few else 0),
        **parallel_loop(spans * panels, threads, 2 * M * w.N * w.K),
    }
    if few or w.activations != "bf16":
        return counts
    steps = layout.padded_K // _DEPTH
    return counts | _linear(M, panels * task_blocks, steps, ROWS, config, least)


def _linear(M: int, sums: int, steps: int, depth: int, config: Config, least_bytes: float) -> dict[str, float]:
    """Of `sums` tiles side by side for each tile of rows, each summed in `steps` of `depth` rows of weights."""
    side, below = int(config["NV"]), int(config["MR"]) // ROWS
    results = -(-M // ROWS) * sums
    dots = results * steps
    x, weights = dots / side, dots / below  # tiles that are loaded
    bytes_ = x * ROWS * 4 * depth + weights * depth * ROW_BYTES + results * _TILE
    return _counts(dots, x + weights + results, bytes_, least_bytes)


def _counts(dots: float, moved: float, bytes_: float, least_bytes: float) -> dict[str, float]:
    return {"tile_dots": dots, "tile_loads": moved / dots, "tile_bytes": bytes_ / least_bytes}
