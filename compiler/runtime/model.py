"""A loaded model: functions with named, checked inputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm_ffi

from llmc.errors import ArtifactError, InputError
from llmc.package.manifest import ArraySpec, FunctionSpec, Manifest
from llmc.package.reader import Artifact
from llmc.runtime.arrays import to_tensor, workspaces
from llmc.runtime.binding import bind, describe
from llmc.runtime.device import memory_of
from llmc.runtime.library import pool_size
from llmc.runtime.memory import HOST, Memory

if TYPE_CHECKING:
    from llmc.runtime.session import Session
    from llmc.runtime.text import Text


class Function:
    """One function of a model, bound to its weights. Call it with arrays by name; outputs come back likewise."""

    def __init__(
        self, name: str, spec: FunctionSpec, code: Any, weights: tuple[Any, ...], memory: Memory = HOST
    ) -> None:
        self.name, self.spec, self.code, self._weights, self.memory = name, spec, code, weights, memory
        self._call = memory.bound(code)

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Raises InputError if `inputs` are not those that the function takes."""
        result = self.run(self.arguments(map(self.memory.put, bind(self.spec, inputs))))
        tensors = [result] if isinstance(result, tvm_ffi.Tensor) else list(result)
        return {spec.name: self.memory.get(t, spec.dtype) for spec, t in zip(self.spec.outputs, tensors, strict=True)}

    def arguments(self, inputs: Iterable[Any]) -> tuple[Any, ...]:
        """What `run` takes: the runtime's tensors of all inputs, then the weights, then workspaces made anew."""
        return (*inputs, *self._weights, *map(to_tensor, workspaces(self.spec.workspaces)))

    def run(self, arguments: tuple[Any, ...]) -> Any:
        """The result, a tensor or an array of them; nothing is checked beforehand."""
        try:
            return self._call(*arguments)
        except Exception as error:
            raise InputError(f"the compiled code refused these inputs: {_reason(error)}", where=self.name) from error


def _reason(error: Exception) -> str:
    """What the compiled code found wrong, in a line."""
    text = str(error).strip()
    sizes = re.search(r"\((-?\d+) vs\. (\d+)\).*match_cast", text, re.DOTALL)
    if sizes is None:
        return (text.splitlines() or [type(error).__name__])[0]
    found, needed = sizes.groups()
    if found == "-1":
        return "they ask for a tensor of sizes that are negative, or more than any memory holds"
    shape = re.search(r"R\.Shape\(\[(.*)\]\).*shape\[(\d+)\]", text, re.DOTALL)
    checked = re.split(r", (?![^(]*\))", shape[1])[int(shape[2])] if shape else ""
    name = re.search(r"\w+_in_\w+", checked)  # of a branch, which has sizes of its own
    if "T.max" in checked:
        needed = f"at {'most' if int(found) > int(needed) else 'least'} {needed}"
    what = f"size {name[0]}" if name else "a size or flag that they decide"
    return f"{what} is {found}, where the model needs {needed}"


class Model:
    """A compiled model, ready to run.

    Call it with its inputs by name, as keywords or one mapping: `model(input_ids=ids)`, `model({"input.1": x})`.
    One output comes back as an array, several as a dict by name. Arrays must have exactly the stated dtype; lists
    and numbers are converted. Calls may come from any thread, each of which gets a pool of its own.
    """

    def __init__(self, artifact: Artifact, machine: Any, weights: Mapping[str, Any]) -> None:
        self.artifact = artifact
        self.manifest: Manifest = artifact.manifest
        self._machine = machine
        self.memory = memory_of(artifact)
        self.observed = False
        self.functions = {
            name: Function(name, spec, machine[name], tuple(weights[param] for param in spec.params), self.memory)
            for name, spec in self.manifest.functions.items()
        }

    @property
    def inputs(self) -> tuple[ArraySpec, ...]:
        """What a call takes."""
        return self.main.spec.inputs

    @property
    def outputs(self) -> tuple[ArraySpec, ...]:
        """What a call returns."""
        return self.main.spec.outputs

    @property
    def threads(self) -> int:
        """Threads that run kernels called from this thread."""
        return pool_size()

    def observe(self, watch: Callable[..., None]) -> None:
        """Have every call that the compiled code makes watched, for profiling.

        `watch(function, symbol, before, result, *arguments)` is called before each (`before` true) and after it.
        """
        self.observed = True  # CUDA graphs make no calls that could be watched
        self._machine["set_instrument"](tvm_ffi.convert(watch))

    @contextmanager
    def watching(self, watch: Callable[..., None]) -> Iterator[None]:
        """`observe`, for a while, of a model that nobody observes."""
        self._machine["set_instrument"](tvm_ffi.convert(watch))
        try:
            yield
        finally:
            self._machine["set_instrument"](None)

    @cached_property
    def text(self) -> Text:
        """Tokenizer and chat template stored with the model. Raises ArtifactError if there are none."""
        from llmc.runtime.text import Text

        return Text(self.artifact)

    def __call__(self, arrays: Mapping[str, Any] | None = None, /, **named: Any) -> np.ndarray | dict[str, np.ndarray]:
        """Run the model once. Raises InputError."""
        if arrays is not None and not isinstance(arrays, Mapping):
            names = ", ".join(spec.name for spec in self.inputs)
            raise InputError("inputs are given by name", hint=f"model({names.split(', ')[0]}=...); its inputs: {names}")
        outputs = self.main({**(arrays or {}), **named})
        return next(iter(outputs.values())) if len(outputs) == 1 else outputs

    def session(
        self, batch: int = 1, pages: int | None = None, *, window: int | None = None, sinks: int = 4
    ) -> Session:
        """A new, empty session of a decoder, with `batch` sequences. Raises ArtifactError if the model is none.

        `pages` bounds the pool that the session and its forks share, where the model was compiled with a paged cache.
        With `window` the session, of one row, has no end: it keeps the first `sinks` tokens and the last `window`. A
        window of at most half the model's length is quick.
        """
        from llmc.runtime.session import Session
        from llmc.runtime.streaming import StreamingSession

        if window is None:
            return Session(self, batch, pages)
        if batch != 1:
            raise InputError(f"a session with a window has one row, not {batch}", hint="open a session for each text")
        return StreamingSession(self, window, sinks, pages)

    @property
    def main(self) -> Function:
        """The model's plain signature. Raises ArtifactError if it has none."""
        if "main" not in self.functions:
            decoder = self.manifest.decoder
            rounded = decoder.kv_cache if decoder and decoder.kv_cache != "float32" else ""
            raise ArtifactError(
                f"no function main{f': sessions alone read its cache in {rounded}' if rounded else ''}",
                where=str(self.artifact.path),
                hint="use a session: model.session(), or llmc generate",
            )
        return self.functions["main"]

    def __repr__(self) -> str:
        def lines(arrays: tuple[ArraySpec, ...]) -> str:
            return ", ".join(f"{a.name}: {describe(a)}" for a in arrays)

        if "main" not in self.functions:
            return f"Model({self.artifact.path}: sessions only)"
        return f"Model({self.artifact.path}: {lines(self.inputs)} -> {lines(self.outputs)})"
