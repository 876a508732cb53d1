"""Measures candidates in processes of their own: while one is timed, the others build, and stand still for it.

Builds overlap, timings do not: a worker whose candidate is ready asks for the machine; the parent grants it to one at
a time, stops the process groups of the others meanwhile (SIGSTOP), and lets them go on afterwards. Whatever a candidate
does to its worker becomes a `Measurement`; the worker is killed with all that it started, and replaced.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import wait
from typing import Literal

from llmc.errors import KernelError, LlmcError, OptionError
from llmc.schedules.base import Config
from llmc.targets.base import Target
from llmc.targets.detect import machine
from llmc.tune.closing import Closing
from llmc.tune.task import Measurement, Status, Task
from llmc.tune.worker import BUILT, GO, PREPARED, STARTED, Job, out_of_memory

_DEVICE_S = 120.0  # for building or running a GPU's kernel, at least
_PREPARE_S = 300.0  # for starting Python, making weights and computing references; our own code, not a candidate's

Phase = Literal["idle", "preparing", "building", "waiting", "running"]


class Measurer(Closing):
    """A pool of workers. Use it as a context manager, from one thread: on leaving it no process is left behind, and
    if that thread dies the workers die with it.

    `timeout_s` is what building a candidate, and running it, may each take; time in which a worker stands still for
    another does not count. `memory_bytes` is what a worker may allocate; for GPUs nothing limits it, since their driver
    reserves more addresses than any machine has bytes. `seed` decides all random data.
    Raises OptionError where this machine cannot run the target's code.
    """

    def __init__(
        self,
        target: Target,
        *,
        workers: int = 2,
        timeout_s: float = 20.0,
        memory_bytes: int = 8 << 30,
        seed: int = 0,
    ) -> None:
        if missing := machine().missing(target):
            raise OptionError(
                f"this machine lacks {', '.join(missing)}", where=target.name, hint="tune on a machine of that kind"
            )
        self.timeout_s, self.memory_bytes, self.seed = timeout_s, memory_bytes, seed
        if target.kind == "cuda":
            self.timeout_s, self.memory_bytes = max(timeout_s, _DEVICE_S), 0
        self._workers: list[_Worker | None] = [None] * workers

    def close(self) -> None:
        """End all workers."""
        for worker in filter(None, self._workers):
            worker.kill()
        self._workers = [None] * len(self._workers)

    def measure(self, task: Task, configs: Iterable[Config], *, careful: bool = False) -> Iterator[Measurement]:
        """Yield one measurement for every configuration, as they complete; nothing is timed while the caller works.

        `configs` may be lazy: the next is taken when a worker is free. With `careful` a candidate is built as models
        use it, checked at the template's corner sizes with three sets of inputs, and timed for longer: what is kept
        must have gone through that. Raises KernelError if the task's default configuration cannot be measured.
        """
        source = iter(configs)
        results: deque[Measurement] = deque()
        try:
            more = True
            while True:
                if not self._running():
                    while more and (slot := self._free()) is not None:
                        config = next(source, None)
                        more = config is not None
                        if config is not None:
                            self._give(slot, Job(task, config, careful, self.seed))
                    while results:
                        yield results.popleft()
                    if all(w is None or w.phase == "idle" for w in self._workers):
                        return
                    self._grant()
                results += self._collect()
        finally:
            for slot, worker in enumerate(self._workers):  # the caller stopped in the middle, or something failed
                if worker and worker.phase != "idle":
                    worker.kill()
                    self._workers[slot] = None

    def _running(self) -> bool:
        """Is a candidate being timed? Then everything else waits."""
        return any(w and w.phase == "running" for w in self._workers)

    def _free(self) -> int | None:
        return next((i for i, w in enumerate(self._workers) if w is None or w.phase == "idle"), None)

    def _give(self, slot: int, job: Job) -> None:
        worker = self._workers[slot]
        if worker is None or worker.process.poll() is not None:  # none yet, or somebody ended it
            worker = self._workers[slot] = _Worker(self.memory_bytes)
        worker.job = job
        worker.enter("preparing", _PREPARE_S)
        with suppress(OSError):  # it died just now: the next look at it says so
            worker.connection.send(job)

    def _grant(self) -> None:
        """Let a worker that waits run, and the others stand still."""
        waiting = next((w for w in self._workers if w and w.phase == "waiting"), None)
        if waiting is None or any(w and not w.started for w in self._workers):
            return
        for worker in filter(None, self._workers):
            if worker is not waiting:
                worker.stop()
        waiting.enter("running", self.timeout_s)
        with suppress(OSError):
            waiting.connection.send(GO)

    def _collect(self) -> Iterator[Measurement]:
        """Wait until workers report, die or run out of time, and handle that."""
        busy = [w for w in self._workers if w and w.phase != "idle"]
        left = min((w.left() for w in busy), default=0.0)
        ready = wait([w.connection for w in busy], None if left == float("inf") else max(0.0, left))
        for worker in busy:
            ended: Measurement | None = None
            if worker.connection in ready:
                ended = self._hear(worker)
            elif worker.left() <= 0:
                ended = self._lost(worker, "timeout", f"{worker.phase} took longer than {worker.limit:g} s")
            if ended is not None:
                yield ended
        if not self._running():
            for worker in filter(None, self._workers):
                worker.resume()

    def _hear(self, worker: _Worker) -> Measurement | None:
        """Take a worker's message; a measurement, if that is what it was or if the worker is dead."""
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            worker.process.wait()
            code = worker.process.returncode
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            said = worker.last_words()
            status: Status = "memory" if out_of_memory(said) else "crash"
            return self._lost(worker, status, f"{how} while {worker.phase}" + (f": {said}" if said else ""))
        if isinstance(message, LlmcError):
            raise message
        if isinstance(message, Measurement):
            worker.enter("idle", None)
            if message.status == "crash" and worker.on_gpu:
                worker.kill()  # what a kernel did wrong there fails all that its process asks of the GPU from then on
                self._workers[self._workers.index(worker)] = None
            return message
        if message == STARTED:
            worker.started = True
        elif message == PREPARED:
            worker.enter("building", self.timeout_s)
        elif message == BUILT:
            worker.enter("waiting", None)
        return None

    def _lost(self, worker: _Worker, status: Status, detail: str) -> Measurement:
        """End a worker and say what became of its candidate. Raises KernelError if it was not the candidate's doing."""
        worker.kill()
        self._workers[self._workers.index(worker)] = None
        job = worker.job
        assert job is not None
        if worker.phase == "preparing":
            raise KernelError(f"its default configuration cannot be measured: {detail}", where=job.task.key)
        return Measurement(job.config, status, {}, detail, verified=job.careful)


class _Worker:
    """The parent's end of one process. Its clock runs only while the process may run."""

    def __init__(self, memory_bytes: int) -> None:
        self.connection, theirs = Pipe()
        self.words = tempfile.TemporaryFile()  # noqa: SIM115 - what the process prints; closed by kill()
        self.folder = tempfile.TemporaryDirectory(prefix="llmc-worker-")  # for the libraries of candidates
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path),
            "TMPDIR": self.folder.name,
            "TVM_NUM_THREADS": str(machine().cores),
            "TVM_BIND_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",  # references are not timed, and idle threads that spin would be in the way
        }
        command = "from llmc.tune.worker import main; main()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", command, str(theirs.fileno()), str(memory_bytes)],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self.words,
            stderr=self.words,
            env=environment,
            start_new_session=True,  # a process group to stop and to kill; Ctrl-C reaches the parent alone
        )
        theirs.close()
        self.job: Job | None = None
        self.stopped = self.started = False
        self.enter("idle", None)

    @property
    def on_gpu(self) -> bool:
        return self.job is not None and self.job.task.target.kind == "cuda"

    def enter(self, phase: Phase, limit: float | None) -> None:
        """Begin a phase that may take `limit` seconds."""
        self.phase, self.limit = phase, limit
        self.spent, self.since = 0.0, time.monotonic()

    def left(self) -> float:
        """Seconds until this phase has taken too long."""
        if self.limit is None or self.stopped:
            return float("inf")
        return self.limit - self.spent - (time.monotonic() - self.since)

    def stop(self) -> None:
        if not self.stopped:
            self._signal(signal.SIGSTOP)
            self.spent += time.monotonic() - self.since
            self.stopped = True

    def resume(self) -> None:
        if self.stopped:
            self._signal(signal.SIGCONT)
            self.since = time.monotonic()
            self.stopped = False

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        self.process.wait()
        self.connection.close()
        self.words.close()
        self.folder.cleanup()

    def last_words(self) -> str:
        """The last line that the process printed."""
        self.words.seek(0)
        lines = self.words.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip()[:200] if lines else ""

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)
