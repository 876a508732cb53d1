"""A process of its own for tests under the emulated driver, which stays in the process that installs it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

from llmc.emulator import driver


@contextmanager
def emulated(capability: tuple[int, int] = (8, 0)) -> Iterator[Callable[..., Any]]:
    """Calls a function of a test's module in a child process that has an emulated GPU: `call(function, *arguments)`.

    What the function raises, assertions among it, is raised here.
    """
    context = multiprocessing.get_context("spawn")  # nothing of this process may be loaded there
    with ProcessPoolExecutor(1, context, driver.install, (capability,)) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()
