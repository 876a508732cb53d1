"""Attention of many queries on a GPU in its plainest form: a block of 64 threads for every row of queries.

It serves what no tiled kernel does. Each thread makes one score of a block of keys, then all of them add the block's
values, a dimension a thread, to sums that are rescaled when the maximum grows (online softmax, Milakov and Gimelshein,
2018). float32 arithmetic.
"""

from __future__ import annotations

from typing import Any

from llmc.schedules.attention.call import Operands
from llmc.schedules.attention.cuda_cache import device_cache
from llmc.schedules.attention.cuda_masks import BlockRun, Row, factor
from llmc.schedules.attention.flash import FLOOR, MASKED
from llmc.schedules.attention.layout import BLOCK
from llmc.targets.threads import BlockReduction, Cell, barrier, launch, shared, strided
from llmc.tvm_shim import T


def rows(call: Operands, wanted: Any) -> None:
    """Emit the launch, of nothing unless `wanted`."""
    w, symbols = call.w, call.symbols
    queries = T.Select(wanted, symbols["S"], T.int64(0))
    with launch(BLOCK, queries, w.n_heads, symbols["B"]) as (thread, s, h, b):
        _row(call, thread, b, T.bind(T.floordiv(h, T.int64(w.group))), s * w.group + T.floormod(h, T.int64(w.group)))


def _row(call: Operands, thread: Any, b: Any, kv: Any, r: Any) -> None:
    w, D = call.w, call.w.head_dim
    row, cache = Row(call, b, kv, r), device_cache(call, b, kv)
    q, p = shared((D,)), shared((BLOCK,))
    with strided(D, thread, BLOCK) as d:
        T.buffer_store(q, call.buffers["q"][b, row.s, row.head * D + d] * T.float32(factor(w)), [d])
    barrier()
    block = BlockReduction(thread, BLOCK)
    sums = [Cell(T.float32(0)) for _ in range(-(-D // BLOCK))]
    top, total = Cell(T.float32(FLOOR)), Cell(T.float32(0))
    score, decay = Cell(T.float32(0)), Cell(T.float32(0))
    run = BlockRun(call, b, r, r)
    with T.serial(0, run.count.v) as step:
        cache.open(run.block(step))
        key = T.bind(cache.key0 + T.Cast("int32", thread))
        score.v = T.float32(0)
        with T.If(row.seen(key)):
            with T.Then():
                for dims in cache.groups():
                    cache.open_keys(dims, thread, 1)
                    with T.serial(dims.start, dims.stop) as d:
                        score.v = score.v + q[d] * cache.read_keys(d, thread, 1)[0]
                score.v = T.max(row.changed(score.v, key), T.float32(MASKED))
            with T.Else():
                score.v = T.float32(MASKED)
        largest = block.max(score.v)
        largest.v = T.max(largest.v, top.v)
        decay.v = T.exp2(top.v - largest.v)
        top.v = largest.v
        T.buffer_store(p, T.exp2(score.v - top.v), [thread])
        barrier()
        total.v = total.v * decay.v
        for cell in sums:
            cell.v = cell.v * decay.v
        with T.serial(0, T.max(T.min(row.end.v - cache.key0, T.int32(BLOCK)), T.int32(0))) as i:
            k = T.bind(T.Cast("int64", i))
            total.v = total.v + p[k]
            for i, cell in enumerate(sums):
                d = thread + i * BLOCK
                with T.If(d < D), T.Then():
                    cell.v = cell.v + p[k] * cache.read_value(k, d, 1)[0]
        # The next block's scores take the place of these behind the barrier in its maximum.
    total.v = T.Select(total.v > T.float32(0), T.float32(1) / total.v, T.float32(0))
    for i, cell in enumerate(sums):
        d = thread + i * BLOCK
        with T.If(d < D), T.Then():
            T.buffer_store(call.buffers["out"], cell.v * total.v, [b, row.s, row.head * D + d])
