"""A process of its own that builds, checks and times candidates, one after another, until its parent hangs up.

It runs code that nobody has run before: whatever that does (loop, crash, allocate without end) ends here. The protocol
is a few pickled values each way. In: a `Job`, later GO. Out: STARTED, before which nobody may stop it (see `main`);
PREPARED once the task's data and its default kernel stand, BUILT when the candidate is about to run and wants the
machine for itself, then the `Measurement`; or an LlmcError where the default itself cannot be measured.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from llmc.errors import KernelError, LlmcError
from llmc.runtime.library import permit_tiles
from llmc.schedules.base import Config
from llmc.targets.base import Target
from llmc.tune.subject import Candidate, Rejected, Subject
from llmc.tune.task import Measurement, Status, Task

STARTED, PREPARED, BUILT, GO = "started", "prepared", "built", "go"
_OUT_OF_MEMORY = ("bad_alloc", "out of memory", "Cannot allocate memory")
_KEPT = 4  # tasks whose data stay where nothing limits the process's memory


@dataclass(frozen=True)
class Job:
    """One candidate. `careful` as in `Measurer.measure`; `seed` decides all random data."""

    task: Task
    config: Config
    careful: bool
    seed: int


Subjects = OrderedDict[tuple[str, bool, int], Subject]


def main() -> None:
    """The process's entry: its two arguments are the connection's descriptor and how many bytes it may allocate; 0: as
    many as there are.

    From the first line on it dies with its parent. A process that is stopped before that would stand still for ever
    when its parent is killed: hence STARTED.
    """
    die_with_parent()
    parent, memory = Connection(int(sys.argv[1])), int(sys.argv[2])
    used = _pages(0)  # TVM's libraries, mostly
    if memory:
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    subjects: Subjects = OrderedDict()
    parent.send(STARTED)
    while True:
        try:
            job = parent.recv()
        except EOFError:
            return
        parent.send(_serve(job, subjects, parent))


def out_of_memory(message: str) -> bool:
    """Does this error message, or what a process wrote before it died, speak of memory?"""
    return any(phrase in message for phrase in _OUT_OF_MEMORY)


def _serve(job: Job, subjects: Subjects, parent: Connection) -> Measurement | LlmcError:
    try:
        _permit(job.task.target)
    except KernelError as error:
        return error
    try:
        subject = _subject(job, subjects)
    except Exception as error:
        return KernelError(f"its default configuration cannot be measured: {one_line(error)}", where=job.task.key)
    parent.send(PREPARED)
    start = time.process_time()
    kernel: Candidate | None = None

    def failed(status: Status, detail: str) -> Measurement:
        code = kernel.code if kernel else {}
        return Measurement(job.config, status, {}, detail, time.process_time() - start, job.careful, code)

    try:
        kernel = subject.build(job.config)
        seconds = time.process_time() - start
    except Rejected as rejected:
        return failed(rejected.status, str(rejected))
    except Exception as error:
        return failed("memory" if _is_memory(error) else "build", one_line(error))
    parent.send(BUILT)
    assert parent.recv() == GO
    try:
        with _on_free_core():
            subject.check(kernel)
            return Measurement(job.config, "ok", subject.time(kernel), "", seconds, job.careful, kernel.code)
    except Rejected as rejected:
        return failed(rejected.status, str(rejected))
    except Exception as error:
        return failed("memory" if _is_memory(error) else "crash", one_line(error))


def _permit(target: Target) -> None:
    """Have the system let this process use the target's tiles. Raises KernelError where it refuses."""
    if not target.tiles:
        return
    try:
        permit_tiles()
    except OSError as error:
        raise KernelError(
            f"kernels for it cannot be measured: the system does not let this process use AMX tiles: {error.strerror}",
            where=f"target {target.name}",
            hint="Linux can since 5.16; without tiles: --target x86-avx512",
        ) from error


def _subject(job: Job, subjects: Subjects) -> Subject:
    """The task's data, made on first use; the tasks used last are kept, as long as they fit."""
    key = (f"{job.task.key} {job.task.points}", job.careful, job.seed)
    if key not in subjects:
        while subjects and _is_full(len(subjects)):
            subjects.popitem(last=False)
        subjects[key] = _new_subject(job)
    subjects.move_to_end(key)
    return subjects[key]


def _is_full(tasks: int) -> bool:
    """Is there no room for another task's data?"""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return tasks >= _KEPT if limit == resource.RLIM_INFINITY else 2 * _pages(1) > limit


def _new_subject(job: Job) -> Subject:
    if job.task.target.kind != "cuda":
        return Subject(job.task, job.careful, job.seed)

    from llmc.tune.gpu_subject import GpuSubject  # not for CPUs: what serves GPUs takes its time to load

    return GpuSubject(job.task, job.careful, job.seed)


@contextmanager
def _on_free_core() -> Iterator[None]:
    """Keep this thread off the cores to which TVM's pool has pinned its own: two threads on one core take twice as
    long, and a busy machine leaves them together for whole measurements."""
    before = os.sched_getaffinity(0)
    threads = {int(entry.name) for entry in Path("/proc/self/task").iterdir()} - {threading.get_native_id()}
    masks = [os.sched_getaffinity(thread) for thread in threads]
    free = before.difference(*(mask for mask in masks if len(mask) == 1))
    os.sched_setaffinity(0, free or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _pages(column: int) -> int:
    """Bytes of this process: 0 its address space, 1 its resident set."""
    return int(Path("/proc/self/statm").read_text().split()[column]) * resource.getpagesize()


def _is_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or out_of_memory(str(error))


def one_line(error: Exception) -> str:
    """An error's kind and the last line of its message: TVM puts stack traces before it."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1].strip()}" if lines else type(error).__name__


def die_with_parent() -> None:
    """The kernel kills this process, stopped or running, when its parent is gone, however that ended."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
