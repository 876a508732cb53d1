"""Tests that run alone wait for the others, and the others for them."""

from __future__ import annotations

import fcntl
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest

from tests.turns import Turns

SOON = 0.1


class Runner:
    """Has a turn from when it is let in until it is told to end, in a thread; its files are open once more."""

    def __init__(self, pool: ThreadPoolExecutor, folder: Path, alone: bool) -> None:
        self.runs, self.may_end = Event(), Event()
        self.ended = pool.submit(self._run, Turns(folder), alone)

    def _run(self, turns: Turns, alone: bool) -> None:
        with turns.turn(alone):
            self.runs.set()
            self.may_end.wait(60)

    def end(self) -> None:
        self.may_end.set()
        self.ended.result(60)


def gate_is_closed(folder: Path) -> bool:
    with open(folder / "gate.lock") as gate:
        try:
            fcntl.flock(gate, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_most_tests_run_beside_each_other(tmp_path: Path) -> None:
    with ThreadPoolExecutor() as pool:
        pair = [Runner(pool, tmp_path, alone=False) for _ in range(2)]
        assert all(runner.runs.wait(60) for runner in pair)
        for runner in pair:
            runner.end()


def test_nothing_runs_beside_one_that_is_alone_and_nothing_begins_before_it(tmp_path: Path) -> None:
    with ThreadPoolExecutor() as pool:
        first = Runner(pool, tmp_path, alone=False)
        assert first.runs.wait(60)
        alone = Runner(pool, tmp_path, alone=True)
        while not gate_is_closed(tmp_path):
            time.sleep(0.01)
        assert not alone.runs.wait(SOON)
        later = Runner(pool, tmp_path, alone=False)
        assert not later.runs.wait(SOON)
        first.end()
        assert alone.runs.wait(60) and not later.runs.wait(SOON)
        alone.end()
        assert later.runs.wait(60)
        later.end()


def test_a_turn_ends_with_a_failure(tmp_path: Path) -> None:
    turns = Turns(tmp_path)
    with pytest.raises(ZeroDivisionError), turns.turn(alone=True):
        raise ZeroDivisionError
    with turns.turn(alone=False):
        pass
