"""How the lanes of a warp reach memory: bank conflicts of shared memory, sectors of global memory.

Shared memory has 32 banks, each 4 bytes wide; a wavefront gives every bank one word, to all lanes that ask for it
(CUDA C++ Programming Guide, "Shared Memory" of compute capability 5 and later). Lanes with 8 bytes each go in two
halves of a warp, with 16 bytes in four quarters.
"""

from __future__ import annotations

import numpy as np

BANKS, WORD, SECTOR, LANES = 32, 4, 32, 32


def wavefronts(addresses: np.ndarray, active: np.ndarray, width: int) -> tuple[int, int]:
    """(wavefronts that the accesses of all warps take, those that they would take without conflicts).

    `addresses`: bytes, one for each thread, whole warps; `active`: which threads take part; `width`: bytes of each.
    """
    lanes = LANES if width <= WORD else LANES * WORD // width
    words = max(width // WORD, 1)
    taken = ideal = 0
    for phase, on in zip(addresses.reshape(-1, lanes), active.reshape(-1, lanes), strict=True):
        if on.any():
            asked = np.unique((phase[on, None] // WORD + np.arange(words)).reshape(-1))
            taken += int(np.bincount(asked % BANKS, minlength=BANKS).max())
            ideal += 1
    return taken, ideal


def sectors(addresses: np.ndarray, active: np.ndarray, width: int) -> int:
    """Sectors of 32 bytes that the accesses of all warps touch."""
    step = np.arange(0, width, min(width, SECTOR))
    count = 0
    for warp, on in zip(addresses.reshape(-1, LANES), active.reshape(-1, LANES), strict=True):
        if on.any():
            count += len(np.unique((warp[on, None] + step) // SECTOR))
    return count
