"""A machine elsewhere that runs candidates: found through a TVM RPC tracker, used for one session at a time.

All of this runs in a `child.Child`. A session serves one candidate and no other, so that what that one does to the
server's process (which TVM forks for the session) ends with it.
"""

from __future__ import annotations

import itertools
import socket
import struct
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.errors import KernelError, LlmcError, OptionError
from llmc.schedules.base import Config
from llmc.tune.builders import Built
from llmc.tune.gpu_names import FLUSH, LOAD
from llmc.tune.rounds import BURST, Round, alternate
from llmc.tune.subject import Candidate, Case, Rejected, Subject
from llmc.tune.task import Measurement, Status, Task, Timing
from llmc.tune.worker import one_line, out_of_memory
from llmc.tvm_shim import rpc, tvm

PREPARE_S = 300.0  # for uploading and checking a default; our own code, not a candidate's
_TRACKER_S = 5.0  # for the tracker to say who is registered
_RETRY_S = 0.5
_MOST = 0.95  # of a session's limit: an error that comes later means that it is over
_KEPT = 4  # tasks whose data stay in memory
_COLD = "cache_flush_cpu_non_first_arg"  # TVM's function that evicts all arguments but the first


class DeviceError(LlmcError):
    """No device came within the time that there was for it."""


@dataclass(frozen=True)
class Device:
    """Any of the machines that are registered under `key` with the tracker at `host` and `port`.

    `wait_s` is how long to wait for one that is free, `timeout_s` what a candidate may take on it.
    """

    host: str
    port: int
    key: str
    wait_s: float
    timeout_s: float

    @property
    def tracker(self) -> str:
        return f"tracker {self.host}:{self.port}"

    def demand_known(self) -> None:
        """Raises OptionError, within seconds, if there is no tracker or no device of this key, busy or free."""
        try:
            summary = self._ask([rpc.base.TrackerCode.SUMMARY], _TRACKER_S)
        except (OSError, ValueError, struct.error) as error:
            hint = f"start one there: `python -m tvm.exec.rpc_tracker --port {self.port}`"
            raise OptionError(f"no RPC tracker answers: {one_line(error)}", where=self.tracker, hint=hint) from error
        keys = sorted({info["key"].removeprefix("server:") for info in summary["server_info"]})
        if self.key not in keys:
            hint = f"known keys: {', '.join(keys)}" if keys else "start a server on the device (docs/remote.md)"
            raise OptionError(f"no device has the key '{self.key}'", where=self.tracker, hint=hint)

    def session(self, limit_s: float) -> Any:
        """A session with the first device that is free. Its server ends it after `limit_s` seconds; it ends here when
        nothing refers to it any more. Raises DeviceError if none came within `wait_s`."""
        deadline, error = time.monotonic() + self.wait_s, "all are busy"
        while (left := deadline - time.monotonic()) > 0:
            try:
                host, port, key = self._ask([rpc.base.TrackerCode.REQUEST, self.key, "", 1], left)
                return rpc.connect(host, port, key, limit_s)
            except TimeoutError:
                continue
            except (OSError, RuntimeError, ValueError, struct.error, tvm.error.InternalError) as reason:
                error = one_line(reason)  # the tracker or a server has ended: somebody may start it again
                time.sleep(_RETRY_S)
        hint = "`python -m tvm.exec.query_rpc_tracker` shows who is there, and how many are free"
        what = f"no device '{self.key}' answered within {self.wait_s:g} s: {error}"
        raise DeviceError(what, where=self.tracker, hint=hint)

    def _ask(self, question: Sequence[Any], limit_s: float) -> Any:
        """The tracker's answer, by the protocol that tvm.rpc.tracker describes; TVM's own client waits for ever."""
        base = rpc.base
        magic = struct.pack("<i", base.RPC_TRACKER_MAGIC)
        with socket.create_connection((self.host, self.port), timeout=limit_s) as connection:
            connection.sendall(magic)
            if base.recvall(connection, len(magic)) != magic:
                raise OSError("what listens there is no tracker")
            base.sendjson(connection, question)
            code, answer = base.recvjson(connection)
        if code != base.TrackerCode.SUCCESS:
            raise OSError(f"the tracker refuses: {answer}")
        return answer


@dataclass(frozen=True)
class Job:
    """A task's default as it was built, and where candidates are compared with it.

    `careful` as in `RemoteMeasurer.measure`; `seed` decides all random data.
    """

    device: Device
    task: Task
    careful: bool
    seed: int
    default: Built

    @property
    def name(self) -> str:
        return f"{self.task.key} {self.task.points} {self.careful} {self.seed}"


@dataclass(frozen=True)
class _Loaded(Candidate):
    """A kernel on the device; its weights are there once."""

    module: Any


class _RemoteSubject(Subject):
    """A task's data here, its kernels and their arguments on the device of a session."""

    def __init__(self, job: Job, session: Any) -> None:
        self.job, self.session = job, session
        self.arrays: dict[str, list[np.ndarray]] = {}  # packed weights by layout
        super().__init__(job.task, job.careful, job.seed)

    def compare(self, session: Any, config: Config, built: Built) -> dict[str, Timing]:
        """Check and time a candidate. Raises Rejected, and whatever the session does."""
        self.session = session
        self.default = self._build_default()
        candidate = self.load(config, built)
        self.check(candidate)
        return self.time(candidate)

    def leave(self) -> None:
        """Let go of everything on the device, which ends the session."""
        self.packs.clear()
        for name in ("default", "session"):
            vars(self).pop(name, None)  # a device that was lost early has left less

    def load(self, config: Config, built: Built) -> _Loaded:
        """Bring a library and the weights that it reads to the device."""
        name = f"{next(_NUMBERS)}.so"
        self.session.upload(bytearray(built.library), name)
        for i, kernel in enumerate(built.kernels.values()):
            self.session.upload(bytearray(kernel), f"{name}.{i}")
        module = self.session.get_function(LOAD)(name) if built.kernels else self.session.load_module(name)
        return _Loaded(module["kernel"], *self._packed(config), built.code, config, module)

    def _build_default(self) -> _Loaded:
        return self.load(self.kernel.template.default(self.kernel.workload, self.task.target), self.job.default)

    def _pack(self, config: Config) -> tuple[Sequence[tuple[Any, ...]], Iterator[tuple[Any, ...]]]:
        template, workload, target = self.kernel.template, self.kernel.workload, self.task.target
        layout = template.layout(workload, config, target)
        if layout not in self.arrays:
            while len(self.arrays) > 1:  # the default's comes first and stays
                self.arrays.popitem()
            arrays = template.prepack(self.weights, workload, config, target).values()
            self.arrays[layout] = [np.ascontiguousarray(a) for a in arrays]
        packed = [tuple(map(self._there, self.arrays[layout]))]
        return packed, itertools.cycle(packed)

    def _race(self, candidate: Candidate, case: Case) -> Timing:
        """Short rounds of both in turns, timed on the device by TVM's evaluator, which makes one more call before each
        round. A kernel with weights or cold inputs finds them in memory and not in a cache, as locally, since their
        lines are evicted before every call; so are those of all its inputs but the first, and of its outputs, which
        locally stay. A GPU's cache is flushed."""
        inputs, outputs = [self._there(a) for a in case.inputs.values()], self._outputs(case).values()

        cold = any(arg.cold for arg in self.kernel.workload.inputs())
        evict = FLUSH if self.task.target.kind == "cuda" else _COLD

        def timer(racer: Candidate) -> Round:
            assert isinstance(racer, _Loaded)
            weights = racer.packed[0]
            evaluate = racer.module.time_evaluator(
                "kernel", self.device, number=1, repeat=BURST, f_preproc=evict if weights or cold else ""
            )
            return lambda: list(evaluate(*inputs, *weights, *outputs).results)

        return alternate(timer(candidate), timer(self.default), self.careful)

    def _there(self, array: np.ndarray) -> Any:
        return tvm.runtime.tensor(array, self.device)

    @property
    def device(self) -> Any:
        return self.session.device("cuda" if self.task.target.kind == "cuda" else "cpu")


_NUMBERS = itertools.count()
_SUBJECTS: OrderedDict[str, _RemoteSubject] = OrderedDict()


def prepare(job: Job) -> LlmcError | None:
    """Make the task's data, and check its default on a device, unless that was done.

    Returns a DeviceError, or a KernelError if the default is wrong or does not run.
    """
    if job.name in _SUBJECTS:
        _SUBJECTS.move_to_end(job.name)
        return None
    while len(_SUBJECTS) >= _KEPT:
        _SUBJECTS.popitem(last=False)
    try:
        subject = _RemoteSubject(job, job.device.session(PREPARE_S))
    except DeviceError as error:
        return error
    except Exception as error:
        return KernelError(f"its default configuration cannot be measured: {one_line(error)}", where=job.task.key)
    subject.leave()
    _SUBJECTS[job.name] = subject
    return None


def race(job: Job, config: Config, built: Built) -> Measurement | DeviceError:
    """Check and time one candidate of a prepared job in a session of its own."""
    subject, limit = _SUBJECTS[job.name], job.device.timeout_s

    def failed(status: Status, detail: str) -> Measurement:
        return Measurement(config, status, {}, detail, built.seconds, job.careful, built.code)

    try:
        session = job.device.session(limit)
    except DeviceError as error:
        return error
    start = time.monotonic()
    try:
        timings = subject.compare(session, config, built)
        return Measurement(config, "ok", timings, "", built.seconds, job.careful, built.code)
    except Rejected as rejected:
        return failed(rejected.status, str(rejected))
    except Exception as error:
        if time.monotonic() - start > _MOST * limit:  # the server speaks up amid other messages: any error may come
            return failed("timeout", f"took longer than {limit:g} s on the device")
        return failed("memory" if out_of_memory(str(error)) else "crash", f"on the device: {one_line(error)}")
    finally:
        subject.leave()
