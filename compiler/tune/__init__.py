"""The tune stage: which configuration each kernel is built with."""

from __future__ import annotations

from collections.abc import Iterable

from llmc.schedules.base import Config, Kernel
from llmc.targets.base import Target


def choose_configs(kernels: Iterable[Kernel], target: Target) -> dict[Kernel, Config]:
    """The templates' default configurations."""
    return {k: k.template.default(k.workload, target) for k in kernels}
