"""Calls of a session's functions: their arguments, and what the host fills in and sends before each.

Those of one token are kept: a kernel leaves nothing of Python's in the CPU's caches, and touching hundreds of tensors'
reference counts anew for every token would cost a tenth of its time. On a GPU they are replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from llmc.runtime.arrays import aligned_zeros
from llmc.runtime.caches import Caches
from llmc.runtime.graphs import Replayed, first
from llmc.runtime.memory import Stage

if TYPE_CHECKING:
    from llmc.runtime.model import Function, Model


class Call(NamedTuple):
    """A step function's arguments, and what the host fills in beforehand and sends: ids, positions, tree [R, S],
    kv_len [R]."""

    function: Function
    ids: np.ndarray
    positions: np.ndarray
    kv_len: np.ndarray
    tree: np.ndarray
    stage: Stage
    arguments: tuple[Any, ...]
    replayed: Replayed | None

    def run(self) -> Any:
        """What the function computes, [R, S, V], or [R, 1, V] of the last tokens, wherever it lies."""
        self.stage.send()
        # A function may return the caches after the logits: they are the very same memory.
        return first(self.function.run(self.arguments)) if self.replayed is None else self.replayed.run()


class Draws(NamedTuple):
    """Arguments of the function that samples, to be filled in and sent: each [R]."""

    arrays: dict[str, np.ndarray]
    stage: Stage


class Outcome(NamedTuple):
    """What is wanted of a step: `of` its function, its logits and its rows, an array [R, S, ...]; `pause` is what n
    tokens of a row would give that has none."""

    of: Callable[[Function, Any, slice], np.ndarray]
    pause: Callable[[int], np.ndarray]


class Calls:
    """The calls of one session. `kept` has those of one token, by function and rows, until the caches move."""

    def __init__(self, model: Model, caches: Caches) -> None:
        self._model, self._caches = model, caches
        self.kept: dict[tuple[str, int, int], Call] = {}
        self._draws: dict[tuple[int, int], Draws] = {}  # by rows
        self._moves = caches.moves  # when the kept ones were prepared

    def of(self, function: Function, rows: slice, count: int) -> Call:
        """A call with `count` tokens for each of the rows."""
        if self._moves != self._caches.moves:
            self.kept.clear()  # they hold on to the old memory
            self._moves = self._caches.moves
        key = (function.name, rows.start, rows.stop)
        if count == 1 and key in self.kept:
            return self.kept[key]
        size = rows.stop - rows.start
        ids, positions = (aligned_zeros((size, count), np.int64) for _ in range(2))
        kv_len, tree = aligned_zeros((size,), np.int64), aligned_zeros((size, count), np.uint64)
        own = {"input_ids": ids, "position_ids": positions, "kv_len": kv_len, "tree": tree}
        small = own | self._caches.inputs(rows)
        memory = function.memory
        stage = memory.stage([small[spec.name] for spec in function.spec.inputs if spec.name in small])
        tensors = function.arguments((*stage.tensors, *map(memory.tensor, self._caches.buffers(rows))))
        again = count == 1
        replayed = Replayed(self._model, function, tensors) if again and memory.on_device else None
        call = Call(function, ids, positions, kv_len, tree, stage, tensors, replayed)
        if again:
            self.kept[key] = call
        return call

    def draws(self, function: Function, rows: slice) -> Draws:
        """Arguments of the function that samples for these rows; they are kept."""
        key = rows.start, rows.stop
        if key not in self._draws:
            specs = [spec for spec in function.spec.inputs if spec.name != "logits"]
            arrays = {spec.name: np.zeros(rows.stop - rows.start, spec.dtype) for spec in specs}
            self._draws[key] = Draws(arrays, function.memory.stage(list(arrays.values())))
        return self._draws[key]


def logits(function: Function, result: Any, rows: slice) -> np.ndarray:
    """The host's view, or copy, of a result."""
    found = function.memory.get(result, "")
    return found.copy() if function.spec.workspaces else found  # the next call writes there again
