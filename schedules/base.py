"""The contract of a kernel template.

A template is a family of kernels for one operator: a *workload* says which member is wanted, a *config* says how it
is to be written, `build` writes it. `reference` says in plain numpy what it must compute. The tuner knows nothing
but this contract.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np

from llmc.targets.base import Target

Config = Mapping[str, int | str]
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Arg:
    """One buffer of a kernel. A dimension is an int, or the name of a symbol that is read from the buffer itself.

    `cold`: an input that models read from memory, since every layer has its own, where others were just written.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str
    cold: bool = False


@dataclass(frozen=True)
class Workload:
    """What a kernel computes: base of the templates' frozen dataclasses; hashable, and the tuning key.

    Subclasses hold shapes (ints, or symbols left to run time), dtypes, formats and the epilogue. `inputs` are the
    buffers known only at run time, `weights` those that `prepack` lays out at compile time, `outputs` what is
    written. A kernel's parameters are inputs, weights, outputs, in that order.
    """

    def inputs(self) -> tuple[Arg, ...]:
        raise NotImplementedError

    def outputs(self) -> tuple[Arg, ...]:
        raise NotImplementedError

    def key(self) -> str:
        """One line that names this workload, stable across versions of Python: the database key."""
        fields = ",".join(f"{k}={v}" for k, v in sorted(vars(self).items()))
        return f"{type(self).__name__}({fields})"


@dataclass(frozen=True)
class Space:
    """Named knobs with their legal values; `valid` drops combinations that cannot be built."""

    knobs: Mapping[str, tuple[int | str, ...]]
    valid: Callable[[Config], bool] = field(default=lambda config: True, compare=False)

    def __iter__(self) -> Iterator[dict[str, int | str]]:
        for values in product(*self.knobs.values()):
            config = dict(zip(self.knobs, values, strict=True))
            if self.valid(config):
                yield config

    def __contains__(self, config: Config) -> bool:
        known = set(config) == set(self.knobs) and all(config[k] in v for k, v in self.knobs.items())
        return known and self.valid(config)


@dataclass(frozen=True)
class Work:
    """The roofline of one call: arithmetic operations, and bytes that must cross the memory bus.

    `unit` does the operations: "fma" (float32) or "dot" (products of 8-bit integers, summed in int32).
    """

    ops: float
    bytes: float
    unit: str = "fma"

    def seconds(self, peaks: Mapping[str, float], bandwidth: float) -> float:
        """The least time for it at `peaks` operations a second, by unit, and `bandwidth` bytes a second."""
        return max(self.ops / peaks[self.unit], self.bytes / bandwidth)


class Template(ABC):
    """One family of kernels. Stateless: the module's single instance serves every call."""

    name: str
    version: int = 1  # counts up whenever the same config would give different code or another packed layout

    @abstractmethod
    def accepts(self, workload: Workload, target: Target) -> bool:
        """Can this template serve that workload on that target?"""

    @abstractmethod
    def space(self, workload: Any, target: Target) -> Space:
        """The configurations that the tuner may try."""

    @abstractmethod
    def default(self, workload: Any, target: Target) -> dict[str, int | str]:
        """The configuration used when nothing was tuned."""

    def prepack(self, weights: Mapping[str, Any], workload: Any, config: Config, target: Target) -> Arrays:
        """Lay the weights out as the kernel reads them; ordered as the kernel's weight parameters."""
        return dict(weights)

    def layout(self, workload: Any, config: Config, target: Target) -> str:
        """Name of the packed layout: what two kernels pack under one name is the same bytes, and is stored once."""
        key = f"{workload.key()} {sorted(config.items())} {target.name}"
        return f"{self.name}.{self.version}.{hashlib.sha256(key.encode()).hexdigest()[:8]}"

    @abstractmethod
    def build(self, workload: Any, target: Target, config: Config) -> Any:
        """The kernel as a TVM PrimFunc; parameters are inputs, packed weights, outputs.

        It divides no negative integers: divisions become the machine's own (`tir_pipeline`).
        """

    @abstractmethod
    def reference(self, workload: Any, inputs: Mapping[str, np.ndarray], weights: Mapping[str, Any]) -> Arrays:
        """What the kernel computes, in numpy: float64 or exact integers, written for clarity."""

    def arithmetic(self, workload: Any, config: Config) -> str:
        """Configurations under one name round alike. Those under "" compute `reference`, others their `expected`."""
        return ""

    def expected(
        self, workload: Any, config: Config, inputs: Mapping[str, np.ndarray], weights: Mapping[str, Any]
    ) -> Arrays:
        """What a kernel of this configuration computes: `reference`, unless it rounds otherwise on purpose."""
        return self.reference(workload, inputs, weights)

    def tolerance(self, workload: Any) -> float:
        """How far an output may be from the reference, relative to its largest element: float32 sums in another order
        differ by 1e-6, 8-bit ties by 1e-5. Overridden where a kernel rounds what the reference does not."""
        return 1e-4

    @abstractmethod
    def work(self, workload: Any, dims: Mapping[str, int]) -> Work:
        """Operations and bytes of one call with the symbols bound to `dims`."""

    def example_weights(self, workload: Any, rng: np.random.Generator) -> dict[str, Any]:
        """Random weights, as `prepack` and `reference` take them."""
        return {}

    def example_inputs(self, workload: Any, dims: Mapping[str, int], rng: np.random.Generator) -> Arrays:
        """Random inputs with the symbols bound to `dims`; floats are normal, integers 0.

        Overridden where values must fit together: ids, lengths, caches.
        """
        return {arg.name: example(arg, dims, rng) for arg in workload.inputs()}

    def corners(self, workload: Any) -> Sequence[Mapping[str, int]]:
        """Small sizes that reach every body, tail and edge of a kernel, whatever its configuration."""
        return [{"M": M} for M in (*range(1, 18), 33)]


@dataclass(frozen=True)
class Kernel:
    """One member of a template's family: what is built once and called wherever it fits."""

    template: Template
    workload: Workload

    def __str__(self) -> str:
        return f"{self.template.name} {self.workload.key()}"

    __repr__ = __str__


def bind_dims(args: Sequence[Arg], arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Values of the symbols in `args`, read from arrays of those names."""
    dims: dict[str, int] = {}
    for arg in args:
        for symbol, size in zip(arg.shape, arrays[arg.name].shape, strict=True):
            if isinstance(symbol, str):
                dims[symbol] = int(size)
    return dims


def example(arg: Arg, dims: Mapping[str, int], rng: np.random.Generator) -> np.ndarray:
    """A random array for `arg`, its symbols bound to `dims`: normal floats; zeros of any other type."""
    shape = tuple(dims[d] if isinstance(d, str) else d for d in arg.shape)
    if arg.dtype.startswith("float"):
        return rng.standard_normal(shape, np.float32).astype(arg.dtype)
    return np.zeros(shape, arg.dtype)
