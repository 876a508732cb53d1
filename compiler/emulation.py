"""Before an artifact for a GPU runs without one: is it worth the wait? Then an emulated GPU takes its place."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from llmc.emulator import driver
from llmc.emulator.build import BuildError, compiler
from llmc.emulator.emulator import EmulationError
from llmc.errors import ArtifactError, CheckError, OptionError
from llmc.package.layout import DEVICE_KERNELS
from llmc.package.manifest import ArraySpec
from llmc.package.reader import Artifact
from llmc.samples import size

# Multiplications a second on one core. Measured were 3.0e6 (MiniLM in float32, four tokens) and 6.6e6 (two layers in 4
# bits, 37 tokens); slower cores than that one are to keep to it, too.
RATE = 2e6
LONGEST = 1800  # seconds
_BOOKS = 17  # bytes for each byte of memory of the GPU: its own, and what is known of accesses to it
_FLAG = "--emulate"


def rows(inputs: Sequence[ArraySpec], dims: Mapping[str, int]) -> int:
    """How often a call multiplies with each weight, about: tokens, or pixels. `dims` are the symbols' sizes."""
    counts = [1]
    for spec in inputs:
        shape = [size(dim, dims) for dim in spec.shape]
        if spec.name.startswith("past") or not shape:
            continue
        if len(shape) == 4:  # [batch, channels, height, width]
            del shape[1]
        elif "int" not in spec.dtype:
            del shape[-1]
        counts.append(math.prod(shape))
    return max(counts)


def prepare(artifact: Artifact, calls: Sequence[int]) -> None:
    """Makes this process one with the GPU that `artifact` needs, for calls of these numbers of rows.

    Raises ArtifactError if it was not compiled for a GPU; OptionError, before any work, where emulation would take
    longer than anyone waits or more memory than there is, and where it cannot be had: no g++, or a real driver.
    """
    where, target = str(artifact.path), artifact.manifest.target
    if DEVICE_KERNELS not in artifact.entries:
        hint = "leave --emulate out, or compile the model with --target cuda-sm80"
        raise ArtifactError(f"was compiled for {target.name}, which needs no emulation", where=where, hint=hint)
    _demand_small(artifact, calls)
    if compiler() is None:
        what = "needs g++ 12 or later for x86-64, which this machine has not"
        raise OptionError(what, where=_FLAG, hint="install it (Debian: apt install g++)")
    arch = int(target.mcpu.removeprefix("sm_").removesuffix("a"))
    try:
        driver.install((arch // 10, arch % 10))
        driver.register(artifact.path)
    except (BuildError, EmulationError) as error:
        raise OptionError(f"cannot emulate a GPU: {error}", where=_FLAG) from error


@contextmanager
def judged(artifact: Artifact) -> Iterator[None]:
    """Inside, what the emulator finds raises CheckError, and what it does not know OptionError."""
    try:
        with driver.judged():
            yield
    except driver.NotEmulated as error:
        raise OptionError(
            str(error), where=_FLAG, hint="only a GPU can tell: llmc check on a machine with one"
        ) from error
    except EmulationError as error:
        hint = "this is a fault of llmc's: no such artifact should have been made"
        raise CheckError(f"the emulated GPU found: {error}", where=str(artifact.path), hint=hint) from error


def _demand_small(artifact: Artifact, calls: Sequence[int]) -> None:
    stored = sum(tensor.size for tensor in artifact.tensors.values())
    bits = min(map(_bits, artifact.manifest.quantization.get("weights", [])), default=8)
    weights = sum(8 * t.size // bits if "int" in t.dtype else math.prod(t.shape) for t in artifact.tensors.values())
    seconds, room = weights * sum(calls) / RATE, _BOOKS * stored
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    hint = "emulation is for small models: check one of the same architecture with fewer layers and narrower ones"
    if seconds > LONGEST:
        what = f"about {weights * sum(calls):.1e} multiplications would take some {_span(seconds)} here"
        raise OptionError(what, where=_FLAG, hint=f"{hint}, or fewer rows (--dim)")
    if room > memory / 2:
        what = f"{stored / 1e6:.0f} MB of weights would take {room / 1e9:.1f} GB, of {memory / 1e9:.1f} GB here"
        raise OptionError(what, where=_FLAG, hint=hint)


def _bits(kind: str) -> int:
    """Of a weight of a kind that a manifest names, about: those of tables have four."""
    widths = {"8-bit": 8, "e4m3": 8, "float16": 16, "bfloat16": 16}
    return next((bits for name, bits in widths.items() if kind.startswith(name)), 4)


def _span(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600)):
        if seconds > 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 60:.0f} minutes"
