"""Bank conflicts as they happen: every access of shared memory of the launches that are emulated, counted."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from llmc.emulator.build import runtime
from llmc.gpu.banks import LANES, wavefronts

_REACHED = np.dtype(
    [("where", "u8"), *((name, "u4") for name in ("block", "thread", "offset", "bytes", "writes"))], align=True
)
_ROWS = 8  # of a matrix of ldmatrix, which names 16 bytes with each


@dataclass
class Conflicts:
    """Of each place in the code that reaches shared memory: (wavefronts, those without conflicts)."""

    places: dict[tuple[int, bool], tuple[int, int]] = field(default_factory=dict)

    @property
    def ways(self) -> tuple[float, float]:
        """(worst, mean) ways of bank conflicts; 1 is none."""
        if not self.places:
            return 1.0, 1.0
        taken, ideal = (sum(each) for each in zip(*self.places.values(), strict=True))
        return max(t / i for t, i in self.places.values()), taken / ideal


@contextmanager
def counted() -> Iterator[Conflicts]:
    """Counts what is emulated inside; the figures are there at its end.

    Lanes of a warp that come to one place for the n-th time in a block are taken to come there together.
    """
    library = ctypes.CDLL(str(runtime()))
    library.emu_trace_end.restype = ctypes.c_void_p
    found = Conflicts()
    library.emu_trace_begin()
    try:
        yield found
    finally:
        count = ctypes.c_uint64()
        address = library.emu_trace_end(ctypes.byref(count))
        if count.value:
            raw = ctypes.string_at(address, count.value * _REACHED.itemsize)
            found.places.update(_counted(np.frombuffer(raw, _REACHED)))


def _counted(reached: np.ndarray) -> dict[tuple[int, bool], tuple[int, int]]:
    places: dict[tuple[int, bool], tuple[int, int]] = {}
    for where in np.unique(reached["where"]):
        for writes in (0, 1):
            here = reached[(reached["where"] == where) & (reached["writes"] == writes)]
            if len(here):
                groups = _visits(here) if where else np.arange(len(here)) // _ROWS
                places[int(where), bool(writes)] = _add_up(here, groups)
    return places


def _visits(here: np.ndarray) -> np.ndarray:
    """For each access the number of its warp's visit."""
    key = here["block"].astype(np.int64) << 20 | here["thread"]
    order = np.argsort(key, kind="stable")
    _, first, counts = np.unique(key[order], return_index=True, return_counts=True)
    visit = np.empty(len(here), np.int64)
    visit[order] = np.arange(len(here)) - np.repeat(first, counts)
    warp = here["block"].astype(np.int64) << 20 | here["thread"] // LANES
    return np.unique(np.stack([warp, visit]), axis=1, return_inverse=True)[1].reshape(-1)


def _add_up(here: np.ndarray, groups: np.ndarray) -> tuple[int, int]:
    taken = ideal = 0
    order = np.argsort(groups, kind="stable")
    for part in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
        lanes = here["thread"][part] % LANES if here["where"][0] else np.arange(len(part))
        addresses, active = np.zeros(LANES, np.int64), np.zeros(LANES, bool)
        addresses[lanes], active[lanes] = here["offset"][part], True
        t, i = wavefronts(addresses, active, int(here["bytes"][part[0]]))
        taken, ideal = taken + t, ideal + i
    return taken, ideal
