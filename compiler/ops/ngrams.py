"""TfIdfVectorizer of numbers: how often each n-gram of a pool occurs in a sequence."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmc.ops.context import Context, Rule
from llmc.ops.scalar import select
from llmc.ops.tensor import elementwise, full, loops, reshape
from llmc.tvm_shim import Expr, T, te, tirx


def _pool(ctx: Context) -> list[tuple[tuple[int, ...], int]]:
    """(n-gram, its place in the output) of those whose length counts. The pool has 1-grams first, then 2-grams …"""
    items, places = [int(i) for i in ctx.attr("pool_int64s")], iter(ctx.attr("ngram_indexes"))
    starts = [int(c) for c in ctx.attr("ngram_counts")]
    low, high = int(ctx.attr("min_gram_length")), int(ctx.attr("max_gram_length"))
    found = []
    for size, (start, end) in enumerate(zip(starts, [*starts[1:], len(items)], strict=True), 1):
        for at in range(start, end - size + 1, size):
            found.append((tuple(items[at : at + size]), int(next(places))))
    return [(gram, place) for gram, place in found if low <= len(gram) <= high]


def _tf_idf_vectorizer(ctx: Context) -> Expr:
    """X [C] or [N, C] of integers to float32 [size] or [N, size]: counts, whether there are any, or either weighted.

    The numbers of an n-gram stand side by side, or up to `max_skip_count` others stand between any two of them.
    """
    if not ctx.attr("pool_int64s"):
        ctx.fail("it counts n-grams of strings")
    shape, pool, skips = ctx.shape(), _pool(ctx), int(ctx.attr("max_skip_count"))
    places = [int(i) for i in ctx.attr("ngram_indexes")]
    size = max(places) + 1
    if min(places) < 0:
        ctx.fail(f"ngram_indexes has {min(places)}, which is no place in the output")
    rows, out = (shape[0] if len(shape) > 1 else 1), [*shape[:-1], size]
    if not pool:
        return full(ctx, out, 0, "float32")
    longest = max(len(gram) for gram, _ in pool)
    table = np.array([[*gram, *[0] * (longest - len(gram)), len(gram), place] for gram, place in pool])
    width = longest + 2

    def nest(x: Any, table: Any, counts: Any, rows: Any, length: Any) -> None:
        with T.parallel(0, rows) as row:
            with T.serial(0, T.int64(size)) as i:
                counts[row * size + i] = te.const(0, "float32")
            with T.serial(0, T.int64(len(pool))) as g, T.serial(0, T.int64(skips + 1)) as skip:
                n, place, step = table[g * width + longest], table[g * width + longest + 1], skip + 1
                starts = te.max(length - (n - 1) * step, te.const(0, "int64"))
                with T.serial(0, select(tirx.all(n == 1, skip > 0), te.const(0, "int64"), starts)) as start:
                    hits = [
                        tirx.any(
                            n <= k,
                            x[row * length + te.min(start + step * k, length - 1)].astype("int64")
                            == table[g * width + k],
                        )
                        for k in range(longest)
                    ]
                    with T.If(tirx.all(*hits)), T.Then():
                        at = row * size + place
                        counts[at] = counts[at] + te.const(1, "float32")

    literal = reshape(ctx, ctx.emit(ctx.literal(table, "int64")), [table.size])
    (counts,) = loops(ctx, "ngrams", nest, [ctx.x(), literal], [([rows, size], "float32")], [rows, shape[-1]])
    return _weighted(ctx, reshape(ctx, counts, out), size)


def _weighted(ctx: Context, counts: Expr, size: int) -> Expr:
    mode, one, none = ctx.attr("mode"), te.const(1, "float32"), te.const(0, "float32")
    if mode == "IDF":
        counts = elementwise(ctx, "occurs", lambda c: select(c > none, one, none), counts)
    if mode == "TF" or not ctx.attr("weights"):
        return counts
    weights = np.zeros(size, np.float32)  # they are in the pool's order, which need not be the output's
    weights[list(ctx.attr("ngram_indexes"))] = ctx.attr("weights")
    return elementwise(ctx, "weighted", lambda c, w: c * w, counts, ctx.emit(ctx.literal(weights)))


RULES: dict[str, Rule] = {"TfIdfVectorizer": _tf_idf_vectorizer}
