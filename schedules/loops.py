"""Loops that several templates share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmc.tvm_shim import T


def rows(count: Any, elements: int, grain: int, body: Callable[[Any], None]) -> None:
    """body(m) for m in 0..count, each of `elements` elements: in parallel if all of them make at least `grain`.

    Waking the other threads costs about as much as a few thousand elements of streaming work, and far more when
    another process holds their core.
    """
    work = count * T.int64(elements)
    with T.If(work < T.int64(grain)):
        with T.Then():
            with T.serial(0, count) as m:
                body(m)
        with T.Else():
            with T.parallel(0, count) as m:
                body(m)


def sweep(size: int, lanes: int, unroll: int, body: Callable[[Any, int, int], None]) -> None:
    """body(start, n, u) over 0..size, n = `lanes` elements at a time, u counting an unrolled step's; the last n may
    be smaller."""
    whole = size // lanes
    if whole >= unroll:
        with T.serial(0, whole // unroll) as step:
            for u in range(unroll):
                body((step * unroll + u) * lanes, lanes, u)
    for u in range(whole % unroll):
        body((whole // unroll * unroll + u) * lanes, lanes, u)
    if size % lanes:
        body(whole * lanes, size % lanes, 0)
