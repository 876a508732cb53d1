"""Where candidates become shared libraries: in processes on this machine, or on the workers of a dask cluster.

What travels is a task, one configuration of it and the library: no weights and no data. Wherever it runs, a build has a
process of its own, so that one that aborts or never ends is a recorded failure.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import Any, Generic, Protocol, TypeVar

from llmc.errors import LlmcError, OptionError
from llmc.schedules.base import Config
from llmc.targets.detect import machine
from llmc.tir_pipeline import build_kernels
from llmc.tune.child import Child, Lost
from llmc.tune.machine_code import count, readable
from llmc.tune.subject import Rejected, function_of
from llmc.tune.task import Measurement, Status, Task
from llmc.tune.worker import one_line, out_of_memory
from llmc.tvm_shim import FFI_VERSION, TVM_VERSION, TvmTarget

BUILD_S, GPU_BUILD_S = 30.0, 120.0  # what one build may take: NVIDIA's compiler takes its time
_CONNECT_S = 10.0
_TICK_S = 0.02


@dataclass(frozen=True)
class Built:
    """A shared library that holds `kernel`, the CPU seconds that TVM took for it, and what its machine code shows.

    For a GPU the library is host code, and `kernels` are modules of TVM's kind "cuda", by name.
    """

    library: bytes
    seconds: float
    code: Mapping[str, float]
    kernels: Mapping[str, bytes] = field(default_factory=dict)


class Builders(Protocol):
    """What the measurer needs of those that build."""

    def build(
        self, task: Task, configs: Iterable[Config], careful: bool
    ) -> Iterator[tuple[Config, Built | Measurement]]:
        """Every configuration with its library, or with the measurement that says why there is none, as they complete.

        `configs` may be lazy: the next is taken when a builder is free. Builders go on while the caller works. Raises
        LlmcError where builds cannot be run at all.
        """
        ...

    def close(self) -> None:
        """End all builds."""
        ...


def build(task: Task, config: Config, careful: bool) -> Built | Measurement:
    """One candidate, as `function_of` has it."""
    start = time.process_time()
    try:
        if task.target.kind == "cuda":
            from llmc.tune.gpu_build import build_library  # not for CPUs: what serves GPUs takes its time to load

            host, kernels, shown = build_library(task, config, careful)
            return Built(host, time.process_time() - start, shown, kernels)
        module = build_kernels({"kernel": function_of(task, config, careful)}, TvmTarget(task.target.tvm()))
        with TemporaryDirectory(prefix="llmc-") as folder:
            library = Path(folder) / "kernel.so"
            module.export_library(str(library))
            code = count(library) if readable() else {}
            return Built(library.read_bytes(), time.process_time() - start, code)
    except Rejected as rejected:
        return Measurement(config, rejected.status, {}, str(rejected), time.process_time() - start, careful)
    except Exception as error:
        status: Status = "memory" if isinstance(error, MemoryError) or out_of_memory(str(error)) else "build"
        return Measurement(config, status, {}, one_line(error), time.process_time() - start, careful)


Made = TypeVar("Made")


class _Pool(ABC, Generic[Made]):
    """Keeps `slots` builds under way on an executor."""

    def __init__(self, executor: Executor, slots: int) -> None:
        self._executor, self._slots = executor, slots

    def build(
        self, task: Task, configs: Iterable[Config], careful: bool
    ) -> Iterator[tuple[Config, Made | Measurement]]:
        """As `Builders` has it."""
        source = iter(configs)
        running: dict[Future[Made | Measurement], Config] = {}

        def fill() -> None:
            while len(running) < self._slots and (config := next(source, None)) is not None:
                running[self._submit(task, config, careful)] = config

        try:
            fill()
            while running:
                future = next(iter(wait(running, return_when=FIRST_COMPLETED).done))
                config = running.pop(future)
                fill()
                yield config, self._result(future)
        finally:
            for future in running:  # the caller stopped in the middle
                future.cancel()

    @abstractmethod
    def _submit(self, task: Task, config: Config, careful: bool) -> Future[Made | Measurement]:
        """Start one build."""

    def _result(self, future: Future[Made | Measurement]) -> Made | Measurement:
        return future.result()


class LocalPool(_Pool[Made]):
    """Processes on this machine, as many as it has cores, unless told, that call `function` with a task, one of its
    configurations, and whether to be careful. Each call may take `limit_s` seconds."""

    def __init__(
        self, function: Callable[[Task, Config, bool], Made | Measurement], workers: int | None, limit_s: float
    ) -> None:
        workers = workers or machine().cores
        super().__init__(ThreadPoolExecutor(workers, "llmc-build"), workers)
        self._function = function
        self._limit_s, self._children = limit_s, [Child() for _ in range(workers)]
        self._idle: SimpleQueue[Child] = SimpleQueue()
        for child in self._children:
            self._idle.put(child)

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)
        while self._idle.qsize() < len(self._children):  # again and again: one may just be starting its process
            for child in self._children:
                child.interrupt()
            time.sleep(_TICK_S)
        for child in self._children:
            child.kill()
        self._executor.shutdown()

    def _submit(self, task: Task, config: Config, careful: bool) -> Future[Made | Measurement]:
        return self._executor.submit(self._run, task, config, careful)

    def _run(self, task: Task, config: Config, careful: bool) -> Made | Measurement:
        child = self._idle.get()
        try:
            return _call_in(child, self._function, task, config, careful, self._limit_s)
        finally:
            self._idle.put(child)


class LocalBuilders(LocalPool[Built]):
    """Builds in processes on this machine, as `LocalPool` has them."""

    def __init__(self, workers: int | None = None, limit_s: float = BUILD_S) -> None:
        super().__init__(build, workers, limit_s)


class ClusterBuilders(_Pool[Built]):
    """The workers of the dask cluster whose scheduler is at `address`, such as tcp://HOST:8786. A worker that is lost
    is dask's concern: it gives the build to another.

    Raises OptionError if dask is not installed, nobody answers, there are no workers, or theirs is another TVM.
    """

    def __init__(self, address: str, limit_s: float = BUILD_S) -> None:
        where = f"builders {address}"
        try:
            distributed: Any = import_module("distributed")
        except ImportError as error:
            hint = 'pip install "llmc[cluster]"'
            raise OptionError(f"dask is not installed: {error}", where=where, hint=hint) from error
        try:
            self._client = distributed.Client(address, timeout=_CONNECT_S, set_as_default=False)
        except (OSError, ValueError) as error:
            hint = "`dask scheduler` prints the address that it listens at"
            raise OptionError(f"no dask scheduler answers: {one_line(error)}", where=where, hint=hint) from error
        try:
            threads = sum(self._client.nthreads().values())
            if not threads:
                hint = f"start some: `dask worker {address}`"
                raise OptionError("the dask cluster has no workers", where=where, hint=hint)
            _demand_same(self._client.run(versions), where)
        except BaseException:
            self._client.close()
            raise
        self._limit_s, self._where = limit_s, where
        super().__init__(self._client.get_executor(pure=False), threads)

    def close(self) -> None:
        self._executor.shutdown(wait=False)
        self._client.close()

    def _submit(self, task: Task, config: Config, careful: bool) -> Future[Built | Measurement]:
        return self._executor.submit(_build_here, task, config, careful, self._limit_s)

    def _result(self, future: Future[Built | Measurement]) -> Built | Measurement:
        try:
            return future.result()
        except Exception as error:  # not the candidate's doing: that would be a measurement
            hint = "the workers must have the same llmc as this machine, and must stay"
            raise LlmcError(f"a build could not be run: {one_line(error)}", where=self._where, hint=hint) from error


def versions() -> tuple[str, str]:
    """What decides the code that is generated here."""
    return TVM_VERSION, FFI_VERSION


def _demand_same(found: Mapping[str, Any], where: str) -> None:
    for worker, theirs in found.items():
        if theirs != versions():
            what = f"the worker {worker} has TVM {', '.join(theirs)}, and this machine {', '.join(versions())}"
            raise OptionError(what, where=where, hint="install the same llmc everywhere")


_own = threading.local()  # a dask worker's threads have a child each


def _build_here(task: Task, config: Config, careful: bool, limit_s: float) -> Built | Measurement:
    """One build on a dask worker."""
    if not hasattr(_own, "child"):
        _own.child = Child()
    return _call_in(_own.child, build, task, config, careful, limit_s)


def _call_in(
    child: Child,
    function: Callable[[Task, Config, bool], Made | Measurement],
    task: Task,
    config: Config,
    careful: bool,
    limit_s: float,
) -> Made | Measurement:
    try:
        return child.call(limit_s, function, task, config, careful)
    except Lost as lost:
        return Measurement(config, lost.status, {}, f"{lost} while building", verified=careful)
