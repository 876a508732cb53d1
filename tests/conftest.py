"""Fixtures of all tests, and what lets processes share them (`pytest -n 2`).

Two processes compile twice as much as one in the same time, since LLVM has one thread. What measures time, or looks for
processes that were left behind, is marked `alone`: nothing runs beside it.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.turns import Turns

# Read when TVM starts its pool of threads. It would pin every process to the same cores, and its idle threads would
# keep a core from the others for 80 ms after each call of a kernel.
os.environ.setdefault("TVM_BIND_THREADS", "0")
os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "10000")

turns_key = pytest.StashKey[Turns]()


@pytest.fixture(scope="session", autouse=True)
def own_data_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiling consults the user's tuning database: tests have one of their own, empty."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))
        yield


def pytest_sessionstart(session: pytest.Session) -> None:
    """One of several processes takes turns with the others, whose temporary folders have the same parent."""
    if hasattr(session.config, "workerinput"):
        base: Path = session.config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
        session.config.stash[turns_key] = Turns(base.parent)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Outside of all else, so that waiting for others is not part of a test's time limit."""
    turns = item.config.stash.get(turns_key, None)
    if turns is None:
        return (yield)
    with turns.turn(alone=item.get_closest_marker("alone") is not None):
        return (yield)
