"""A template that doubles numbers, and whose configurations go wrong in every way that a candidate can."""

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmc.schedules.base import Arg, Arrays, Config, Kernel, Space, Template, Work, Workload
from llmc.targets.base import Target
from llmc.targets.detect import native
from llmc.tune.task import Point, Task
from llmc.tvm_shim import IRBuilder, T, tvm_ffi

SLEEPER = "86431"  # seconds that a candidate's child sleeps: its command line says that it is ours
_counter = itertools.count()


@dataclass(frozen=True)
class DoubleWorkload(Workload):
    """x [M, K] -> y = 2 x. With `default_fails` even the default configuration aborts."""

    K: int = 64
    default_fails: bool = False

    def inputs(self) -> tuple[Arg, ...]:
        return (Arg("x", ("M", self.K), "float32"),)

    def outputs(self) -> tuple[Arg, ...]:
        return (Arg("y", ("M", self.K), "float32"),)


class Double(Template):
    name = "double"

    def accepts(self, workload: Workload, target: Target) -> bool:
        return isinstance(workload, DoubleWorkload)

    def space(self, workload: DoubleWorkload, target: Target) -> Space:
        return Space({"fault": ("none", *FAULTS, "wrong", "tail", "build", "build_abort", "build_loop")})

    def default(self, workload: DoubleWorkload, target: Target) -> dict[str, int | str]:
        return {"fault": "abort" if workload.default_fails else "none"}

    def build(self, workload: DoubleWorkload, target: Target, config: Config) -> Any:
        fault = str(config["fault"])
        if fault == "build":
            raise ValueError("such a kernel cannot be")
        if fault == "build_abort":
            os.abort()
        if fault == "build_loop":
            _loop()
        factor = 3.0 if fault == "wrong" else 2.0
        with IRBuilder() as ib:
            with T.prim_func(s_tir=True):
                T.func_name("double")
                T.func_attr({"tirx.is_scheduled": True})
                handles = T.arg("x", T.handle()), T.arg("y", T.handle())
                M = T.int64()
                x, y = (T.match_buffer(h, (M, workload.K), "float32") for h in handles)
                rows = T.bind(T.min(M, T.int64(3))) if fault == "tail" else M
                with T.serial(0, rows) as m, T.serial(0, workload.K) as k:
                    T.buffer_store(y, x[m, k] * T.float32(factor), [m, k])
                if fault in FAULTS:
                    T.evaluate(T.call_packed(f"llmc.tests.{fault}", y.data))
        return ib.get()

    def reference(
        self, workload: DoubleWorkload, inputs: Mapping[str, np.ndarray], weights: Mapping[str, Any]
    ) -> Arrays:
        return {"y": inputs["x"] * 2.0}

    def work(self, workload: DoubleWorkload, dims: Mapping[str, int]) -> Work:
        return Work(ops=dims["M"] * workload.K, bytes=8 * dims["M"] * workload.K)


def task(workload: DoubleWorkload | None = None, M: int = 2) -> Task:
    return Task(Kernel(DOUBLE, workload or DoubleWorkload()), native(), (Point((("M", M),)),))


def processes(word: str) -> list[Path]:
    """Processes, in /proc, whose command line contains `word`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if word in (folder / "cmdline").read_text():
                found.append(folder)
        except OSError:
            continue
    return found


def _loop(*_: Any) -> None:
    while True:
        time.sleep(1e-3)


def _segfault(*_: Any) -> None:
    ctypes.string_at(0)


def _memory(*_: Any) -> None:
    kept = []
    while True:
        kept.append(bytearray(32 << 20))


def _random(y: Any) -> None:
    ctypes.cast(y, ctypes.POINTER(ctypes.c_float))[0] = next(_counter)


def _children(*_: Any) -> None:
    subprocess.Popen(["sleep", SLEEPER])
    _loop()


FAULTS = {
    "loop": _loop,
    "segfault": _segfault,
    "abort": lambda *_: os.abort(),
    "memory": _memory,
    "random": _random,
    "children": _children,
}
for _name, _function in FAULTS.items():
    tvm_ffi.register_global_func(f"llmc.tests.{_name}", _function, override=True)

DOUBLE = Double()
