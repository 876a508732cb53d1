"""Processes that run tests take turns: most tests run beside others, some alone."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Turns:
    """A lock of readers and writers between processes, in two files of `folder`.

    The system lets readers in while a writer waits. So everyone passes a gate first, which a writer keeps closed until
    its turn has come: nothing new begins meanwhile. Locks end with the process that holds them.
    """

    def __init__(self, folder: Path) -> None:
        self._gate, self._room = (open(folder / name, "w") for name in ("gate.lock", "room.lock"))  # noqa: SIM115

    @contextmanager
    def turn(self, alone: bool) -> Iterator[None]:
        """Waits until a test may run; it has its turn inside of the context."""
        fcntl.flock(self._gate, fcntl.LOCK_EX)
        fcntl.flock(self._room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(self._gate, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(self._room, fcntl.LOCK_UN)
