"""Checks in a process of their own: code that ends its process, or never ends, is a failure like others."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Sequence
from multiprocessing.connection import Connection

from llmc.targets.base import Target
from tests.fuzz.differential import Failure, check
from tests.fuzz.program import Program

SECONDS = 600.0  # for what the slowest machine needs: only what never ends is stopped


def isolated(programs: Sequence[Program], target: Target | None = None) -> list[Failure | None]:
    """As `check`. Where the process dies, each half of the programs is tried alone, down to the one at fault."""
    if not programs:
        return []
    context = multiprocessing.get_context("fork")  # the parent runs no kernel, so that it has no threads to lose
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(theirs, programs, target))
    child.start()
    theirs.close()
    try:
        found: list[Failure | None] = ours.recv() if ours.poll(SECONDS + 60.0 * len(programs)) else _ended(child.pid)
    except EOFError:
        found = []
    child.join()
    ours.close()
    if found:
        return found
    if len(programs) == 1:
        return [Failure("crash", f"the process ended with exit code {child.exitcode}")]
    half = len(programs) // 2
    return isolated(programs[:half], target) + isolated(programs[half:], target)


def _work(pipe: Connection, programs: Sequence[Program], target: Target | None) -> None:
    pipe.send(check(programs, target))
    pipe.close()


def _ended(pid: int | None) -> list[Failure | None]:
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    return []
