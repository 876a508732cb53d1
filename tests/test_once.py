"""What several processes of a run share is made by one of them, and nobody sees half of it."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.once import made_once


def test_one_makes_it_and_the_others_wait(tmp_path_factory: pytest.TempPathFactory) -> None:
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        time.sleep(0.05)
        (folder / "file").write_text("whole")

    def read(_: int) -> str:
        return (made_once(tmp_path_factory, "shared", make) / "file").read_text()

    with ThreadPoolExecutor(4) as pool:  # each opens the lock anew, as processes do
        assert list(pool.map(read, range(4))) == ["whole"] * 4
    assert len(made) == 1


def test_what_failed_is_made_by_the_next(tmp_path_factory: pytest.TempPathFactory) -> None:
    def fail(folder: Path) -> None:
        raise ValueError

    with pytest.raises(ValueError):
        made_once(tmp_path_factory, "again", fail)
    folder = made_once(tmp_path_factory, "again", lambda folder: (folder / "file").touch())
    assert (folder / "file").exists()


def test_workers_share_the_folder_above_their_own(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path_factory.mktemp("run") / "popen-gw0"
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    monkeypatch.setattr(tmp_path_factory, "getbasetemp", lambda: base)
    assert made_once(tmp_path_factory, "shared", lambda folder: None).parent == base.parent
