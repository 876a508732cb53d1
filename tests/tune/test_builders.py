"""Candidates become libraries in other processes, here and on a dask cluster, and no build can do harm."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from distributed import Client, LocalCluster

from llmc.errors import LlmcError, OptionError
from llmc.schedules.base import Config
from llmc.tune import builders
from llmc.tune.builders import Builders, Built, ClusterBuilders, LocalBuilders, build
from llmc.tune.task import Measurement, Point, Task
from llmc.tvm_shim import tvm

from . import faults

pytestmark = pytest.mark.alone
CHILD = "llmc.tune.child"
NONE = {"fault": "none"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=":0", host="127.0.0.1", silence_logs="ERROR"
    ) as cluster:
        yield cluster


def parents() -> set[int]:
    """Of all processes that build."""
    return {int((p / "stat").read_text().rsplit(")", 1)[1].split()[1]) for p in faults.processes(CHILD)}


def statuses(pool: Builders, task: Task, configs: Iterable[Config]) -> list[tuple[str, str]]:
    """Fault and outcome of every candidate."""
    built = pool.build(task, configs, False)
    return sorted((str(c["fault"]), b.status if isinstance(b, Measurement) else "built") for c, b in built)


def doubles(built: Built, folder: Path, rows: int) -> bool:
    """Does the library's kernel do what it should?"""
    path = folder / f"{len(list(folder.iterdir()))}.so"  # libraries that are loaded stay mapped
    path.write_bytes(built.library)
    x = np.random.default_rng(0).standard_normal((rows, 64), np.float32)
    y = tvm.runtime.tensor(np.zeros_like(x))
    tvm.runtime.load_module(str(path))["kernel"](tvm.runtime.tensor(x), y)
    return np.array_equal(y.numpy(), 2 * x)


@pytest.mark.parametrize("careful", [False, True])
def test_a_build_is_a_library(careful: bool, tmp_path: Path) -> None:
    task = faults.task(M=2)
    several = dataclasses.replace(task, points=(*task.points, Point((("M", 5),))))
    for each, sizes in ((task, (2,)), (several, (2, 5))):
        built = build(each, NONE, careful)
        assert isinstance(built, Built) and built.seconds > 0
        assert all(doubles(built, tmp_path, rows) for rows in sizes)


def test_local_builds_that_go_wrong_are_recorded_by_kind() -> None:
    """Their neighbours are built as if nothing had happened, and no process is left."""
    names = ("none", "build", "build_abort", "build_loop", "none", "none")
    pool = LocalBuilders(2, limit_s=2)
    try:
        got = statuses(pool, faults.task(), ({"fault": name} for name in names))
        assert os.getpid() in parents()
    finally:
        pool.close()
    assert got == sorted(
        [("build", "build"), ("build_abort", "crash"), ("build_loop", "timeout"), *[("none", "built")] * 3]
    )
    assert os.getpid() not in parents()


def test_stopping_in_the_middle_ends_what_is_under_way() -> None:
    """Builds that would not end by themselves; more candidates than are asked for are not even taken."""
    taken = []

    def configs() -> Iterator[Config]:
        for name in ("none", *["build_loop"] * 9):
            taken.append(name)
            yield {"fault": name}

    pool = LocalBuilders(2, limit_s=60)
    results = pool.build(faults.task(), configs(), False)
    assert isinstance(next(results)[1], Built)
    results.close()
    pool.close()
    assert len(taken) == 3 and os.getpid() not in parents()


def test_a_cluster_builds_on_all_its_workers(cluster: LocalCluster, tmp_path: Path) -> None:
    pool = ClusterBuilders(cluster.scheduler_address)
    try:
        results = list(pool.build(faults.task(), [NONE] * 6, False))
        with Client(cluster, set_as_default=False) as client:
            workers = set(client.run(os.getpid).values())
        assert len(workers) == 2 and workers <= parents()
    finally:
        pool.close()
    assert len(results) == 6 and all(isinstance(b, Built) and doubles(b, tmp_path, 2) for _, b in results)


def test_a_cluster_survives_builds_that_go_wrong(cluster: LocalCluster) -> None:
    with Client(cluster, set_as_default=False) as client:
        before = set(client.run(os.getpid).values())
        pool = ClusterBuilders(cluster.scheduler_address, limit_s=3)
        try:
            names = ("build_abort", "none", "build_loop", "build", "none")
            got = statuses(pool, faults.task(), [{"fault": name} for name in names])
        finally:
            pool.close()
        assert set(client.run(os.getpid).values()) == before
    assert got == sorted(
        [("build", "build"), ("build_abort", "crash"), ("build_loop", "timeout"), *[("none", "built")] * 2]
    )


def test_a_cluster_that_cannot_build_is_an_error(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its workers have another TVM, or do not know what they are sent."""
    pool = ClusterBuilders(cluster.scheduler_address)
    monkeypatch.setattr(builders, "_build_here", lambda *_: {}["no such module"])
    try:
        with pytest.raises(LlmcError, match=r"a build could not be run: KeyError"):
            list(pool.build(faults.task(), [NONE], False))
    finally:
        pool.close()
    monkeypatch.setattr(builders, "TVM_VERSION", "0.1")
    with pytest.raises(OptionError, match=r"has TVM .*, and this machine 0\.1"):
        ClusterBuilders(cluster.scheduler_address)


def test_what_a_cluster_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with LocalCluster(n_workers=0, dashboard_address=":0", host="127.0.0.1", silence_logs="ERROR") as empty:
        with pytest.raises(OptionError, match="no workers"):
            ClusterBuilders(empty.scheduler_address)
    monkeypatch.setattr(builders, "_CONNECT_S", 0.5)
    with pytest.raises(OptionError, match="no dask scheduler answers"):
        ClusterBuilders("tcp://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(OptionError, match=r'pip install "llmc\[cluster\]"'):
        ClusterBuilders("tcp://127.0.0.1:9")
