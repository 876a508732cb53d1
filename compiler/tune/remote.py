"""Measures candidates on machines elsewhere, through TVM RPC: built here or on a cluster, run and timed there.

What is checked is what `measure.Measurer` checks, by the same code; what differs in timing `device.py` says. While one
candidate is timed the next ones are built. A device is asked for anew for every candidate, so that tuners may share it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from llmc.errors import KernelError, OptionError
from llmc.schedules.base import Config
from llmc.targets.base import Target
from llmc.tune.builders import BUILD_S, GPU_BUILD_S, Builders, Built, ClusterBuilders, LocalBuilders
from llmc.tune.child import Child, Lost
from llmc.tune.closing import Closing
from llmc.tune.device import PREPARE_S, Device, Job, prepare, race
from llmc.tune.task import Measurement, Task

_GRACE_S = 10.0  # beyond a device's own limit: then it has fallen silent


def remote_measurer(target: Target, tracker: str, key: str, builders: str = "", *, seed: int = 0) -> RemoteMeasurer:
    """What `llmc tune --tracker HOST:PORT --key KEY --builders tcp://SCHEDULER:PORT` measures with; without a
    scheduler, candidates are built on this machine. Raises OptionError."""
    limit_s = GPU_BUILD_S if target.kind == "cuda" else BUILD_S
    made = ClusterBuilders(builders, limit_s) if builders else LocalBuilders(limit_s=limit_s)
    try:
        return RemoteMeasurer(target, tracker=tracker, key=key, builders=made, seed=seed)
    except BaseException:
        made.close()
        raise


class RemoteMeasurer(Closing):
    """Measures on the devices that an RPC tracker at `tracker` ("host:port") knows by `key`, one at a time. Use it as a
    context manager, from one thread: on leaving it neither a process nor a session is left behind. It closes
    `builders`, too. A device for a GPU's target runs `gpu_server`.

    `timeout_s` is what a candidate may take on the device, uploading included; `wait_s` how long to wait for a device
    that is free. `seed` decides all random data. Raises OptionError if there is no such tracker or device.
    """

    def __init__(
        self,
        target: Target,
        *,
        tracker: str,
        key: str,
        builders: Builders,
        timeout_s: float = 30.0,
        wait_s: float = 120.0,
        seed: int = 0,
    ) -> None:
        self.device = Device(*_address(tracker), key, wait_s, timeout_s)
        self.device.demand_known()
        self.builders, self.seed = builders, seed
        self._child = Child()
        self._jobs: dict[tuple[str, bool], Job] = {}

    def close(self) -> None:
        """End all builds, and the conversation with the device."""
        self._child.kill()
        self.builders.close()

    def measure(self, task: Task, configs: Iterable[Config], *, careful: bool = False) -> Iterator[Measurement]:
        """Yield one measurement for every configuration, as they complete, as `Measurer.measure` does.

        What a candidate does to its device is its measurement: "crash" also if the device itself is lost while it runs.
        Raises KernelError if the task's default configuration cannot be measured, DeviceError if no device is free for
        `wait_s`, and what `Builders.build` raises.
        """
        job = self._job(task, careful)
        for config, built in self.builders.build(task, configs, careful):
            yield built if isinstance(built, Measurement) else self._race(job, config, built)

    def _job(self, task: Task, careful: bool) -> Job:
        """The task's default, built once."""
        name = f"{task.key} {task.points}", careful
        if name not in self._jobs:
            default = task.kernel.template.default(task.kernel.workload, task.target)
            ((_, built),) = self.builders.build(task, [default], careful)
            if isinstance(built, Measurement):
                raise _unmeasurable(task, built.detail)
            self._jobs[name] = Job(self.device, task, careful, self.seed, built)
        return self._jobs[name]

    def _race(self, job: Job, config: Config, built: Built) -> Measurement:
        """One candidate on a device; before, if need be, the default."""
        try:
            error = self._child.call(self.device.wait_s + PREPARE_S + _GRACE_S, prepare, job)
        except Lost as lost:
            raise _unmeasurable(job.task, str(lost)) from lost
        if error is not None:
            raise error
        try:
            answer = self._child.call(self.device.wait_s + self.device.timeout_s + _GRACE_S, race, job, config, built)
        except Lost as lost:
            detail = f"{lost}, the device being silent" if lost.status == "timeout" else f"{lost} at this end"
            return Measurement(config, lost.status, {}, detail, built.seconds, job.careful, built.code)
        if not isinstance(answer, Measurement):
            raise answer
        return answer


def _address(text: str) -> tuple[str, int]:
    """Host and port. Raises OptionError."""
    host, colon, port = text.rpartition(":")
    if not (colon and host and port.isdecimal() and 0 < int(port) < 1 << 16):
        raise OptionError(f"'{text}' is no address", where="tracker", hint="HOST:PORT, as in 192.0.2.7:9190")
    return host.strip("[]"), int(port)


def _unmeasurable(task: Task, why: str) -> KernelError:
    return KernelError(f"its default configuration cannot be measured: {why}", where=task.key)
