"""What the templates that go over rows do at a point; `features.CODE` names and explains the counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from llmc.schedules.base import Config
from llmc.targets.base import Target
from llmc.tune.features_loops import parallel_loop, serial_loop

if TYPE_CHECKING:
    from llmc.schedules.embedding.dense import EmbeddingDenseWorkload
    from llmc.schedules.norm.norm import NormWorkload


def norm(w: NormWorkload, config: Config, target: Target, sizes: Mapping[str, int], threads: int) -> dict[str, float]:
    """`schedules.norm.norm`: several sweeps over each row, the sums in `unroll` registers."""
    M, unroll = sizes["M"], int(config["unroll"])
    registers = w.K // target.lanes
    return {
        "rows": 1,
        "vectors": unroll,
        "sums": unroll,
        "unroll": unroll,
        "trips": registers // unroll,
        "tail": (registers % unroll) / max(registers, 1),
        "tile_l1": 4 * w.K * (len(w.inputs()) + len(w.outputs())) / target.l1_bytes,
        **_rows(M, w.K, int(config["grain"]), threads),
    }


def embedding(
    w: EmbeddingDenseWorkload, config: Config, target: Target, sizes: Mapping[str, int], threads: int
) -> dict[str, float]:
    """`schedules.embedding.dense`: a copy of each row."""
    return _rows(sizes["M"], w.E, int(config["grain"]), threads)


def _rows(M: int, elements: int, grain: int, threads: int) -> dict[str, float]:
    """`schedules.loops.rows`: fewer elements than `grain` run on the calling thread."""
    return (serial_loop if M * elements < grain else parallel_loop)(M, threads, M * elements)
