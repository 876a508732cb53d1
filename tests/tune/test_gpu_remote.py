"""A GPU that is measured through TVM RPC, under the emulated driver: the way there and back, not the times."""

from __future__ import annotations

import math
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from tvm.rpc.tracker import Tracker

from llmc.emulator.emulator import available
from llmc.tune.builders import LocalBuilders
from llmc.tune.gpu_build import build_function
from llmc.tune.remote import RemoteMeasurer
from tests.gpu.tools import needs_compiler
from tests.tune.gpu_tasks import SMALL, TASK
from tests.tune.test_remote import KEY, ROOT, free_port, session_of, until

pytestmark = [
    needs_compiler,
    pytest.mark.alone,
    pytest.mark.skipif(not available(), reason="no g++ 12 for x86-64"),
]
CONFIGS = [{"threads": threads, "fault": fault} for threads, fault in ((64, "none"), (64, "wrong"), (32, "outside"))]


@pytest.fixture(scope="module")
def measurer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RemoteMeasurer]:
    known = tmp_path_factory.mktemp("kernels") / "kernels"
    default = TASK.kernel.template.default(TASK.kernel.workload, SMALL)
    functions = [build_function(TASK, config, False)[0] for config in (default, *CONFIGS)]
    kernels = [(k.name, k.source, k.module) for function in functions for k in function.kernels.values()]
    known.write_bytes(pickle.dumps(kernels))
    tracker = Tracker("127.0.0.1", port=free_port(), port_end=65535, silent=True)
    command = [sys.executable, "-m", "tests.tune.gpu_device", f"127.0.0.1:{tracker.port}", KEY, str(known)]
    server = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        until(lambda: bool(session_of(tracker.port).summary()["server_info"]))
        with RemoteMeasurer(
            SMALL, tracker=f"127.0.0.1:{tracker.port}", key=KEY, builders=LocalBuilders(1, limit_s=300), timeout_s=120
        ) as measurer:
            yield measurer
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        tracker.terminate()


def test_candidates_are_measured_there(measurer: RemoteMeasurer) -> None:
    good, wrong, broken, again = measurer.measure(TASK, [*CONFIGS, CONFIGS[0]])
    for m in (good, again):
        assert m.status == "ok" and not m.predicted, m
        assert all(0 < t.seconds < math.inf and 0 < t.default_seconds < math.inf for t in m.timings.values())
        assert set(m.timings) == {"M=1", "M=3"} and m.code["gpu_registers"] > 0
    assert wrong.status == "wrong" and "y is off by" in wrong.detail
    assert broken.status == "crash", broken
