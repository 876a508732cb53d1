"""A process of its own that calls functions for this one, and is ended when one takes too long.

Builds and conversations with devices run in such processes: a compiler may abort or never finish, and a device may fall
silent, in the middle of a call that Python cannot interrupt. `concurrent.futures.ProcessPoolExecutor` could not end
such a call alone, does not say which of several calls brought a process down, and cannot start processes inside dask's
workers.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TypeVar

from llmc.tune.task import Status
from llmc.tune.worker import die_with_parent, out_of_memory

_START_S = 120.0  # for Python and TVM on a busy machine

R = TypeVar("R")


class Lost(Exception):
    """The process ended, or was ended, before it answered; `status` says how."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status


class Child:
    """One process, started by the first call and again by the first call after it was lost. Use it from one thread at
    a time: the thread that starts it takes it along when it ends, however that comes about."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def call(self, limit_s: float, function: Callable[..., R], *args: object) -> R:
        """What `function(*args)` returns there; it must be importable, and catch its own errors.

        Raises Lost if it takes longer than `limit_s` seconds or ends the process; then nothing that it started is left.
        """
        try:
            if self._process is None or self._process.poll() is not None:
                self._start()
            self._connection.send((function, args))
            if self._connection.poll(limit_s):
                answer: R = self._connection.recv()
                return answer
            raise Lost("timeout", f"took longer than {limit_s:g} s")
        except (EOFError, OSError):
            raise self._ended() from None
        except BaseException:  # whatever came between, a late answer must not be taken for the next call's
            self.kill()
            raise

    def interrupt(self) -> None:
        """From any thread: end the process with all that it started, so that the call under way raises Lost."""
        if (process := self._process) is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)

    def kill(self) -> None:
        """End the process with all that it started."""
        if self._process is not None:
            self.interrupt()
            self._process.wait()
            self._connection.close()
            self._words.close()
            self._process = None

    def _start(self) -> None:
        self.kill()  # what a process that has ended left behind
        self._connection, theirs = Pipe()
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 - what the process prints; closed by kill()
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from llmc.tune.child import main; main()", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._words,
            stderr=self._words,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
            start_new_session=True,  # a process group to kill; Ctrl-C reaches the parent alone
        )
        theirs.close()
        if not self._connection.poll(_START_S):
            raise Lost("timeout", f"did not start within {_START_S:g} s")
        self._connection.recv()

    def _ended(self) -> Lost:
        """How a process that hung up has ended, and the last line that it printed."""
        assert self._process is not None
        code = self._process.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        self._words.seek(0)
        lines = self._words.read().decode(errors="replace").strip().splitlines()
        said = lines[-1].strip()[:200] if lines else ""
        self.kill()
        return Lost("memory" if out_of_memory(said) else "crash", how + (f": {said}" if said else ""))


def main() -> None:
    """The process's entry: its argument is the connection's descriptor. It ends when the parent hangs up or dies."""
    die_with_parent()
    parent = Connection(int(sys.argv[1]))
    parent.send(None)
    while True:
        try:
            function, args = parent.recv()
        except EOFError:
            return
        parent.send(function(*args))
