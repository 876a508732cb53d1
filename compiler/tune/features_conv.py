"""What the templates over images do at a point; `features.CODE` names and explains the counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from llmc.schedules.base import Config
from llmc.targets.base import Target
from llmc.tune.features_loops import parallel_loop

if TYPE_CHECKING:
    from llmc.schedules.conv.workloads import ConvWorkload, WindowWorkload

_CHAINS = 8  # sums that a convolution keeps in flight at least


def conv(w: ConvWorkload, config: Config, target: Target, sizes: Mapping[str, int], threads: int) -> dict[str, float]:
    """`schedules.conv.conv`, and `integer` with bytes: a matrix product whose rows are the pixels of a block."""
    integers = w.inputs()[0].dtype == "uint8"
    size, unit = (1, 4) if integers else (4, 1)  # bytes of a number, and terms of one multiplication
    MR, NV, KU = (int(config[k]) for k in ("MR", "NV", "KU"))
    OH, OW, B = w.OH or sizes["OH"], w.OW or sizes["OW"], sizes["B"]
    tall = max(1, MR // OW) if w.OW else 1
    across, down = -(-OW // MR), -(-OH // tall)
    rows = tall * -(-OW // across)  # pixels of the largest block
    each, width = w.N // w.groups, NV * target.lanes
    panels = w.groups * -(-each // width)
    chains = 1
    while chains * rows * NV < _CHAINS and chains < KU:
        chains *= 2
    run = w.K // w.KH if w.groups == 1 and w.DW == 1 else w.C // w.groups
    panel_bytes, x_bytes = size * w.K * width, size * B * w.C * (w.H or sizes["H"]) * (w.W or sizes["W"])
    weight_bytes = size * w.N * w.K
    blocks = B * across * down
    return {
        "rows": rows,
        "vectors": NV,
        "sums": rows * NV * chains,
        "registers": (rows * NV * chains + NV + 1) / target.vector_registers,
        "loads_per_op": 1 / rows + 1 / NV,
        "unroll": KU,
        "body": KU * rows * NV,
        "trips": run // unit // KU,
        "waste": panels * width / w.N,
        "tail": (run // unit % KU) / (run // unit),
        "tile_l1": (size * rows * w.K + panel_bytes) / target.l1_bytes,
        "panel_l1": panel_bytes / target.l1_bytes,
        "panel_l2": (panel_bytes + x_bytes) / target.l2_bytes,
        "traffic": (weight_bytes + panels / w.groups * x_bytes) / (weight_bytes + x_bytes),
        **parallel_loop(blocks * panels, threads, 2 * B * OH * OW * w.N * w.K),
        "slices": w.K / run,
    }


def window(
    w: WindowWorkload, config: Config, target: Target, sizes: Mapping[str, int], threads: int
) -> dict[str, float]:
    """`schedules.conv.window`: blocks of neighbouring pixels by registers of channels."""
    MR, NV = int(config["MR"]), int(config["NV"])
    OH, OW, B = w.OH or sizes["OH"], w.OW or sizes["OW"], sizes["B"]
    rows = -(-OW // -(-OW // MR))
    columns = len({m * w.SW + kw * w.DW for m in range(rows) for kw in range(w.KW)})
    width = NV * min(target.lanes, w.C)
    chunks = -(-w.C // width)
    loads = columns + (w.KW if w.kind == "depthwise" else 0)
    row_bytes = 4 * w.C * (w.W or sizes["W"])
    return {
        "rows": rows,
        "vectors": NV,
        "sums": rows * NV,
        "registers": (rows * NV + 2 * NV) / target.vector_registers,
        "loads_per_op": loads / (rows * w.KW),
        "unroll": w.KW,
        "body": w.KW * rows * NV,
        "trips": w.KH,
        "waste": chunks * width / w.C,
        "tail": (OW % rows) / OW,
        "tile_l1": 4 * w.KH * columns * width / target.l1_bytes,
        "panel_l1": w.KH * row_bytes / target.l1_bytes,
        **parallel_loop(B * OH * chunks, threads, 2 * B * OH * OW * w.C * w.KH * w.KW),
    }
