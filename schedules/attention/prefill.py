"""Many queries: tasks are blocks of stacked rows, each over all the keys that it sees."""

from __future__ import annotations

from llmc.schedules.attention.call import Call
from llmc.schedules.attention.flash import Flash
from llmc.tvm_shim import T


def prefill(call: Call, BQ: int, MR: int, NR: int, body: type[Flash] = Flash) -> None:
    """Emit the body. BQ rows a task, tiles of MR rows by NR registers."""
    w, simd = call.w, call.simd
    blocks = T.bind((call.rows + BQ - 1) // BQ)
    with T.parallel(0, call.symbols["B"] * w.n_kv_heads * blocks) as task:
        b, kv, j = T.bind(task // (w.n_kv_heads * blocks)), T.bind(task // blocks % w.n_kv_heads), T.bind(task % blocks)
        # A parallel loop is cut into equal runs of tasks, and causal tasks grow with their rows: take them alternately
        # from both ends, so that every run is worth the same.
        at = T.bind(T.Select(j % 2 == 0, j // 2, blocks - 1 - j // 2))
        row0 = T.bind(at * BQ)
        count = T.bind(T.min(call.rows - row0, T.int64(BQ)))
        flash = body(call, b, kv, row0, count, BQ, MR, NR)
        flash.run(*call.blocks(b, row0, row0 + count - 1))
        with T.serial(0, count) as i:
            total = flash.sum_of_weights(i)
            norm = T.bind(T.Select(total < T.float32(0.5), T.float32(0), T.float32(1) / total))
            n = flash.width
            for column, c in enumerate(flash.starts):
                x = flash.acc[i, simd.span(column * n, n)] * simd.splat(norm, n)
                T.buffer_store(call.buffers["out"], x, call.output_at(b, kv, row0 + i, c, n))
