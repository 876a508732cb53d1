"""A tracker and a server of TVM on this machine: what is measured through them, and what becomes of what goes wrong."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tvm.rpc import TrackerSession, connect_tracker
from tvm.rpc.tracker import Tracker

from llmc.errors import KernelError, OptionError
from llmc.schedules.base import Kernel
from llmc.schedules.gemm.lowbit import LOWBIT, LowBitLinearWorkload
from llmc.schedules.norm.norm import NORM, NormWorkload
from llmc.targets.detect import native
from llmc.tir_pipeline import build_kernels
from llmc.tune import device
from llmc.tune.builders import LocalBuilders
from llmc.tune.device import DeviceError
from llmc.tune.remote import RemoteMeasurer, remote_measurer
from llmc.tune.task import Point, Task
from llmc.tune.worker import die_with_parent
from llmc.tvm_shim import TvmTarget, tvm

from . import faults

pytestmark = pytest.mark.alone
ROOT = Path(__file__).parents[2]
KEY, CHILD = "boards", "llmc.tune.child"
PREFIX = "import tests.tune.faults, llmc.tune.worker as worker; worker.die_with_parent()"  # of what serves the device
LINEAR = Task(
    Kernel(LOWBIT, LowBitLinearWorkload(96, 64, 4, 32, True, 8.0, bias=True, residual=True)),
    native(),
    (Point((("M", 1),)), Point((("M", 50),), 0.5)),
)
NORMED = Task(Kernel(NORM, NormWorkload(64)), native(), (Point((("M", 3),)),))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def documented_server(tracker_port: int) -> str:
    """The line of docs/remote.md that serves a device, on this machine, with the faults of the tests."""
    (line,) = re.findall(r"^    (while .*; done)$", (ROOT / "docs/remote.md").read_text(encoding="utf8"), re.M)
    for theirs, ours in (
        ("sleep 1", "sleep 0.1"),
        ('python -c "', f'{sys.executable} -c "{PREFIX}; '),
        ("0.0.0.0", "127.0.0.1"),
        ("9090", f"{free_port()}, 65535"),
        ("'HOST', 9190", f"'127.0.0.1', {tracker_port}"),
        ("KEY", KEY),
    ):
        assert theirs in line
        line = line.replace(theirs, ours)
    return line


@pytest.fixture(scope="module")
def tracker() -> Iterator[int]:
    """The port of a tracker that knows one device."""
    tracker = Tracker("127.0.0.1", port=free_port(), port_end=65535, silent=True)
    server = subprocess.Popen(
        ["sh", "-c", documented_server(tracker.port)],
        cwd=ROOT,
        start_new_session=True,
        stderr=subprocess.DEVNULL,
        preexec_fn=die_with_parent,
    )
    try:
        until(lambda: bool(session_of(tracker.port).summary()["server_info"]))
        yield tracker.port
        until(lambda: session_of(tracker.port).summary()["queue_info"][KEY]["free"] == 1)  # no session is left
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        tracker.terminate()


@pytest.fixture(scope="module")
def measurer(tracker: int) -> Iterator[RemoteMeasurer]:
    """Patient: a busy machine builds and checks ten times as slowly."""
    builders = LocalBuilders(1, limit_s=120)
    with RemoteMeasurer(native(), tracker=f"127.0.0.1:{tracker}", key=KEY, builders=builders, timeout_s=60) as measurer:
        yield measurer
    assert not children()


def session_of(port: int) -> TrackerSession:
    return connect_tracker("127.0.0.1", port)


def until(done: Callable[[], bool], limit_s: float = 30) -> None:
    deadline = time.monotonic() + limit_s
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def children() -> list[Path]:
    """Processes that builders and measurers of this one have started."""
    parents = {p: (p / "stat").read_text().rsplit(")", 1)[1].split()[1] for p in faults.processes(CHILD)}
    return [p for p, parent in parents.items() if parent == str(os.getpid())]


@pytest.mark.parametrize("task", [LINEAR, NORMED], ids=["linear", "norm"])
@pytest.mark.parametrize("careful", [False, True])
def test_the_default_is_as_fast_as_itself(measurer: RemoteMeasurer, task: Task, careful: bool) -> None:
    default = task.kernel.template.default(task.kernel.workload, task.target)
    results = list(measurer.measure(task, iter([default] * (1 if careful else 2)), careful=careful))
    assert {r.status for r in results} == {"ok"}, [r.detail for r in results]
    for result in results:
        assert result.config == default and result.verified == careful and result.build_seconds > 0
        assert set(result.timings) == {str(p) for p in task.points}
        assert all(0 < t.seconds < 0.1 and t.spread >= 0 for t in result.timings.values())
        assert 0.3 < result.cost(task.points) < 3.3


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        ("wrong", "wrong"),
        ("random", "unstable"),
        ("abort", "crash"),
        ("segfault", "crash"),
        ("build", "build"),
        ("build_abort", "crash"),
    ],
)
def test_faults_are_recorded_by_kind(measurer: RemoteMeasurer, fault: str, status: str) -> None:
    """The next candidate is measured as if nothing had happened."""
    results = list(measurer.measure(faults.task(), [{"fault": fault}, {"fault": "none"}]))
    got = {str(r.config["fault"]): r for r in results}
    assert {name: r.status for name, r in got.items()} == {fault: status, "none": "ok"}, [r.detail for r in results]
    assert got[fault].detail and not got[fault].timings


def test_a_kernel_that_never_ends_is_ended_with_its_session(tracker: int) -> None:
    builders = LocalBuilders(1)
    with RemoteMeasurer(native(), tracker=f"127.0.0.1:{tracker}", key=KEY, builders=builders, timeout_s=4) as measurer:
        configs = [{"fault": "loop"}, {"fault": "none"}]
        got = [(m.config["fault"], m.status, m.detail) for m in measurer.measure(faults.task(), configs)]
    assert got == [("loop", "timeout", "took longer than 4 s on the device"), ("none", "ok", "")]


def test_corners_are_checked_with_care(measurer: RemoteMeasurer) -> None:
    """Right at the size that is timed, wrong at others."""
    config = {"fault": "tail"}
    assert [m.status for m in measurer.measure(faults.task(), [config])] == ["ok"]
    careful = list(measurer.measure(faults.task(), [config], careful=True))
    assert [m.status for m in careful] == ["wrong"] and "M=4" in careful[0].detail


def test_a_default_that_fails_is_an_error(measurer: RemoteMeasurer) -> None:
    task = faults.task(faults.DoubleWorkload(default_fails=True))
    with pytest.raises(KernelError, match="default configuration cannot be measured"):
        list(measurer.measure(task, [{"fault": "none"}]))
    assert [m.status for m in measurer.measure(faults.task(), [{"fault": "none"}])] == ["ok"]


def test_stopping_in_the_middle_leaves_the_measurer_usable(measurer: RemoteMeasurer) -> None:
    results = measurer.measure(faults.task(), [{"fault": "none"}] * 4)
    assert next(results).status == "ok"
    results.close()
    assert [m.status for m in measurer.measure(faults.task(), [{"fault": "none"}])] == ["ok"]


def test_a_device_that_stays_busy_is_an_error(tracker: int) -> None:
    builders = LocalBuilders(1)
    with RemoteMeasurer(native(), tracker=f"127.0.0.1:{tracker}", key=KEY, builders=builders, wait_s=1) as measurer:
        until(lambda: session_of(tracker).summary()["queue_info"][KEY]["free"] == 1)
        held = session_of(tracker).request(KEY)
        with pytest.raises(DeviceError, match=f"no device '{KEY}' answered within 1 s: all are busy"):
            list(measurer.measure(faults.task(), [{"fault": "none"}]))
        del held


def test_an_unknown_key_is_refused_at_once(tracker: int) -> None:
    start = time.monotonic()
    with pytest.raises(OptionError, match=f"no device has the key 'toasters'\n  hint: known keys: {KEY}"):
        remote_measurer(native(), f"127.0.0.1:{tracker}", "toasters")
    assert time.monotonic() - start < 5


def test_what_is_no_tracker_is_refused_at_once() -> None:
    start = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for address in (f"127.0.0.1:{free_port()}", f"127.0.0.1:{silent.getsockname()[1]}", "nowhere.invalid:9190"):
            with pytest.raises(OptionError, match="no RPC tracker answers"):
                remote_measurer(native(), address, KEY)
    assert time.monotonic() - start < 15


@pytest.mark.parametrize("address", ["localhost", "localhost:", ":9190", "localhost:http", "localhost:0"])
def test_malformed_addresses_are_refused(address: str) -> None:
    with pytest.raises(OptionError, match="HOST:PORT"):
        remote_measurer(native(), address, KEY)


def test_weights_come_from_memory() -> None:
    """With TVM's function that evicts them, calls take clearly longer than without."""
    workload, target = LowBitLinearWorkload(2048, 1024, 4, 32, True, 8.0), native()
    config, rng = LOWBIT.default(workload, target), np.random.default_rng(0)
    module = build_kernels({"kernel": LOWBIT.build(workload, target, config)}, TvmTarget(target.tvm()))
    packed = LOWBIT.prepack(LOWBIT.example_weights(workload, rng), workload, config, target)
    inputs = LOWBIT.example_inputs(workload, {"M": 1}, rng)
    arrays = [*inputs.values(), *packed.values(), np.zeros((1, 2048), np.float32)]
    arguments = [tvm.runtime.tensor(a) for a in arrays]
    warm, cold = (
        min(module.time_evaluator("kernel", tvm.cpu(), number=1, repeat=40, f_preproc=f)(*arguments).results)
        for f in ("", device._COLD)
    )
    assert cold > 1.2 * warm
