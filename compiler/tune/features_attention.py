"""What the attention templates do at a point; `features.CODE` names and explains the counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from llmc.schedules.attention.examples import keys_read
from llmc.schedules.base import Config
from llmc.targets.base import Target
from llmc.targets.tiles import ROWS
from llmc.tune.features_loops import parallel_loop, serial_loop
from llmc.tune.features_tiles import attention_tiles

if TYPE_CHECKING:
    from llmc.schedules.attention.workloads import AttentionWorkload, KVAppendWorkload

_BLOCK = 64  # keys side by side
_MAX_QUERIES = 4  # up to so many queries the kernel decodes


def attention(
    w: AttentionWorkload, config: Config, target: Target, sizes: Mapping[str, int], threads: int
) -> dict[str, float]:
    """`schedules.attention.decode` for few queries, `schedules.attention.prefill` for many."""
    B, S, C = sizes["B"], sizes["S"], sizes["C"]
    BQ, MR, NR = (int(config[k]) for k in ("BQ", "MR", "NR"))
    keys = keys_read(w, S if S <= _MAX_QUERIES else min(S, -(-BQ // w.group)), C)
    stacked, blocks = S * w.group, -(-keys // _BLOCK)
    ops = 4 * B * S * w.n_heads * w.head_dim * keys
    if S <= _MAX_QUERIES:
        chunk = int(config["chunk"])
        splits = -(-blocks // chunk)
        tasks, task_rows, task_blocks = B * w.n_kv_heads * splits, stacked, min(chunk, blocks)
        rows = -(-w.group // -(-w.group // MR))
        vectors = max(n for n in (1, 2, 4, 8) if n * target.lanes <= _BLOCK and rows * n <= max(MR, rows) * NR)
        alone = 8 * B * blocks * _BLOCK * w.head_dim * w.n_kv_heads <= int(config["serial_kib"]) * 1024
        loop = (serial_loop if alone else parallel_loop)(tasks, threads, ops)
        allocated, on_tiles = _MAX_QUERIES * w.group, False
    else:
        per_head, splits = -(-stacked // BQ), 1
        tasks, task_rows, task_blocks = B * w.n_kv_heads * per_head, min(BQ, stacked), blocks
        on_tiles = config.get("body") == "tiles"
        rows, vectors, allocated = (ROWS, _BLOCK // ROWS, BQ) if on_tiles else (MR, NR, BQ)
        loop = parallel_loop(tasks, threads, ops)
    columns = -(-w.head_dim // target.lanes)  # registers of one row of values
    value_vectors = -(-columns // -(-columns // vectors))
    tiles = -(-task_rows // rows)
    kv_block = 4 * _BLOCK * w.head_dim  # bytes of keys, and as many of values
    return {
        "rows": rows,
        "vectors": vectors,
        "sums": rows * min(vectors, value_vectors),
        "registers": (rows * vectors + vectors + 1) / target.vector_registers,
        "loads_per_op": 1 / rows + (1 / vectors + 1 / value_vectors) / 2,
        "unroll": value_vectors / vectors,
        "body": rows * vectors,
        "trips": w.head_dim,
        "waste": tiles * rows / task_rows,
        "tail": (stacked % task_rows) / stacked,
        "tile_l1": 4 * w.head_dim * (rows + vectors * target.lanes) / target.l1_bytes,
        "panel_l1": kv_block / target.l1_bytes,
        "panel_l2": 2 * kv_block * task_blocks / target.l2_bytes,
        "scratch_l1": 4 * allocated * (2 * w.head_dim + _BLOCK) / target.l1_bytes,
        "traffic": tasks / splits / (B * w.n_kv_heads),
        **loop,
        "slices": splits,
        "scale_per_op": task_blocks / blocks,  # partial results are merged once a split
        **(attention_tiles(w, {**sizes, "C": keys}, BQ, B * w.n_kv_heads * blocks * 2 * kv_block) if on_tiles else {}),
    }


def kv_append(
    w: KVAppendWorkload, config: Config, target: Target, sizes: Mapping[str, int], threads: int
) -> dict[str, float]:
    """`schedules.attention.kv_append`: one thread for few tokens, else all."""
    tokens = sizes["B"] * sizes["S"]
    alone = int(config["serial_tokens"]) >= tokens
    ops = tokens * w.head_dim * (w.n_heads + 2 * w.n_kv_heads)
    return (serial_loop if alone else parallel_loop)(tokens, threads, ops)
