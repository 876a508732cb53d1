"""Measures engines side by side: a process each, rounds interleaved, so that a neighbour's load meets all alike."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from llmc.engines import open_engine
from llmc.errors import LlmcError

PROMPT_BEFORE_DECODE = 128
_SETTLE = 0.05  # seconds for the last engine's threads to stop spinning before the next one is timed


@dataclass(frozen=True)
class Contestant:
    """One engine on one file: an artifact for llmc, a GGUF file for llama.cpp, an ONNX file for the others.

    `options` are those of the engine's class.
    """

    engine: str
    path: Path
    label: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.label or self.engine


@dataclass(frozen=True)
class Spread:
    """A figure of several rounds, in the unit of what it belongs to."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        return Spread(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Result:
    """What one contestant reached. `figures` maps a task's name to tokens per second, or to ms per call."""

    figures: dict[str, Spread]
    load_s: float
    peak_rss_mb: float


@dataclass(frozen=True)
class Task:
    """One thing to time. `work` is how many tokens it computes; 0 for a plain call, which counts in ms.

    `prefill` and `decode` are for language models: a prompt's length, and how many tokens follow it; of each of
    `batch` sequences.
    """

    name: str
    prefill: int = 0
    decode: int = 0
    batch: int = 1
    inputs: Mapping[str, np.ndarray] | None = None

    @property
    def work(self) -> int:
        return (self.decode or self.prefill) * self.batch


def decoder_tasks(
    prefill: Sequence[int], decode: int, contexts: Sequence[int] = (), batches: Sequence[int] = ()
) -> list[Task]:
    """Prompts of the given lengths; `decode` tokens after a prompt of 128, after `contexts`, of `batches` at once."""
    tasks = [Task(f"prefill {n}", prefill=n) for n in prefill]
    if decode:
        tasks.append(Task(f"decode {decode}", PROMPT_BEFORE_DECODE, decode))
        tasks += [Task(f"context {n}", n, decode) for n in contexts]
        tasks += [Task(f"batch {n}", PROMPT_BEFORE_DECODE, decode, n) for n in batches]
    return tasks


def compare(
    contestants: Sequence[Contestant],
    tasks: Sequence[Task],
    *,
    threads: int,
    repeat: int,
    vocabulary: int,
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Result | LlmcError]:
    """Time every task on every contestant, `repeat` times after one round of warming up.

    A contestant that cannot take part (not installed, cannot load the model) gets its error as result.
    """
    spawn = multiprocessing.get_context("spawn")
    workers: dict[str, tuple[Any, Connection]] = {}
    results: dict[str, Result | LlmcError] = {}
    loads: dict[str, float] = {}
    times: dict[str, dict[str, list[float]]] = {}
    try:
        for c in contestants:
            progress(f"loading {c.name}")
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(theirs, c, threads, vocabulary), daemon=True)
            process.start()
            theirs.close()
            workers[c.name] = (process, ours)
            loaded = _receive(ours, c.name)
            if isinstance(loaded, LlmcError):
                results[c.name] = loaded
            else:
                loads[c.name], times[c.name] = loaded, {t.name: [] for t in tasks}
        for i in range(repeat + 1):
            for task in tasks:
                for name in [n for n in times if n not in results]:
                    progress(f"round {i} of {repeat}: {task.name}, {name}")
                    workers[name][1].send(task)
                    seconds = _receive(workers[name][1], name)
                    if isinstance(seconds, LlmcError):
                        results[name] = seconds
                    elif i:
                        times[name][task.name].append(task.work / seconds if task.work else seconds * 1e3)
        for name in [n for n in times if n not in results]:
            workers[name][1].send(None)
            peak = _receive(workers[name][1], name)
            results[name] = Result({t: Spread.of(v) for t, v in times[name].items()}, loads[name], peak)
    finally:
        for process, _ in workers.values():
            process.kill()
            process.join()
    return {c.name: results[c.name] for c in contestants}


def _receive(connection: Connection, name: str) -> Any:
    """The worker's answer; its death becomes an error of this engine alone."""
    try:
        return connection.recv()
    except EOFError:
        return LlmcError(f"the process of {name} died", hint="its own message stands above; out of memory?")


def _serve(connection: Connection, contestant: Contestant, threads: int, vocabulary: int) -> None:
    """A worker: loads its engine, then answers every task with seconds, and None with its peak memory in MB."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    os.dup2(2, 1)  # peers print as they please; standard output is for results
    try:
        started = time.perf_counter()
        engine = open_engine(contestant.engine, contestant.path, threads, **contestant.options)
        connection.send(time.perf_counter() - started)
        rng = np.random.default_rng(0)
        while (task := connection.recv()) is not None:
            prompt = rng.integers(0, vocabulary, (task.batch, task.prefill), np.int64)
            time.sleep(_SETTLE)
            if task.inputs is None:
                connection.send(engine.measure(prompt, task.decode))
            else:
                started = time.perf_counter()
                engine.call(task.inputs)
                connection.send(time.perf_counter() - started)
        connection.send(_peak_rss_mb())
    except LlmcError as error:
        connection.send(error)
    except Exception as error:
        connection.send(LlmcError(str(error) or type(error).__name__, where=contestant.name))


def _peak_rss_mb() -> float:
    """Of this process since it started its program (ru_maxrss would count what its parent was before that), or of the
    largest one that it ran: llama.cpp's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return max(int(line.split()[1]), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) / 1e3
    return 0.0


def as_json(result: Result | LlmcError) -> dict[str, Any]:
    """{"prefill": {"128": tok/s}, "decode": tok/s, "load_s": s, "peak_rss_mb": MB, "spread": the same as [low, high]}.

    Longer contexts and batches have "context": {"2048": tok/s} and "batch": {"4": tok/s of all rows}. A model that is
    no decoder has "call_ms": {sizes: ms} in place of all these.
    """
    if isinstance(result, LlmcError):
        return {"error": str(result)}
    middle: dict[str, Any] = {}
    spread: dict[str, Any] = {}
    for task, figure in result.figures.items():
        kind, _, size = task.partition(" ")
        for into, value in ((middle, figure.median), (spread, [figure.low, figure.high])):
            if kind == "decode":
                into["decode"] = value
            elif kind in ("prefill", "context", "batch"):
                into.setdefault(kind, {})[size] = value
            else:
                into.setdefault("call_ms", {})[task] = value
    return middle | {"load_s": result.load_s, "peak_rss_mb": result.peak_rss_mb, "spread": spread}
