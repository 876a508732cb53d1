"""A decoder's state between calls: the key and value caches, which the compiled step functions update in place.

Positions beyond the length hold stale or zero data; the kernels mask them by `kv_len`, so rolling back is free.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import tvm_ffi

from llmc.errors import ArtifactError, InputError
from llmc.package.manifest import BufferSpec
from llmc.runtime.arrays import aligned_zeros, numpy_dtype, to_numpy, to_tensor

if TYPE_CHECKING:
    from llmc.runtime.generate import Generation
    from llmc.runtime.model import Function, Model

CHUNK = 512  # tokens per call while reading a prompt: bounds the memory of activations, long enough for full speed
_FIRST_CAPACITY = 512


class _Call(NamedTuple):
    """Arguments of a step function, and the arrays [B, S] among them to be filled in beforehand."""

    ids: np.ndarray
    positions: np.ndarray
    arguments: tuple[Any, ...]


class Session:
    """One or more sequences of equal length (rows of a batch) being read and continued by a decoder.

    `length` counts the tokens that the caches hold, per row. Not to be shared between threads.
    """

    def __init__(self, model: Model, batch: int = 1) -> None:
        decoder = model.manifest.decoder
        if decoder is None:
            raise ArtifactError("is not a decoder: it has no session", where=str(model.artifact.path))
        if batch < 1:
            raise InputError(f"batch is {batch}; it must be at least 1")
        self.model, self.decoder, self.batch = model, decoder, batch
        self.length = 0
        self._block = math.lcm(*(cache.block for cache in decoder.caches))
        self._kv_len = aligned_zeros((batch,), np.int64)
        self._capacity = 0
        self._caches: list[np.ndarray] = []  # k, v (and planes, where they are rounded) of each layer
        self._single_calls: dict[str, _Call] = {}  # by function
        self._resize(self._limit(_FIRST_CAPACITY))

    @property
    def max_length(self) -> int | None:
        """Tokens that the model can see, None without a limit."""
        return self.decoder.max_length

    def append(self, ids: Sequence[int] | np.ndarray, *, all: bool = False) -> np.ndarray:
        """Read tokens [S] (batch 1) or [B, S] of ids; returns the logits that follow the last one, float32 [B, V].

        With `all`, the logits after every token, [B, S, V]. Long inputs are read in chunks of CHUNK tokens.
        Raises InputError if there are no ids, an id is outside the vocabulary, or the model's length is exceeded;
        the session is then as it was.
        """
        tokens = self._check(ids)
        before, count = self.length, tokens.shape[1]
        self.reserve(before + count)
        function = self._function(count, all)
        parts = []
        try:
            for start in range(0, count, CHUNK):
                parts.append(self._step(function, tokens[:, start : start + CHUNK]))
        except BaseException:
            self.length = before
            raise
        if all:
            return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
        return parts[-1][:, -1]

    def generate(self, prompt: Sequence[int] | np.ndarray, max_new_tokens: int, **options: Any) -> Generation:
        """Read a prompt and stream what follows; `options` are those of `llmc.generate` (temperature, top_k, …)."""
        from llmc.runtime.generate import generate  # it needs this module

        return generate(self, prompt, max_new_tokens, **options)

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` in all, so that appending them moves no cache."""
        if tokens > self._capacity:
            self._resize(self._limit(max(tokens, 2 * self._capacity)))

    def truncate(self, length: int) -> None:
        """Forget all tokens after the first `length`."""
        if not 0 <= length <= self.length:
            raise InputError(f"cannot truncate {self.length} tokens to {length}")
        self.length = length

    def reset(self) -> None:
        """Forget everything, as if newly made; the caches keep their room."""
        for cache in self._caches:
            cache[...] = 0
        self.length = 0

    def fork(self) -> Session:
        """An independent session that continues from the same tokens."""
        twin = Session(self.model, self.batch)
        twin._resize(self._capacity)
        for mine, its in zip(self._caches, twin._caches, strict=True):
            its[...] = mine
        twin.length = self.length
        return twin

    def _function(self, count: int, all: bool) -> Function:
        functions = self.model.functions
        if count == self.batch == 1 and "decode" in functions:
            return functions["decode"]
        return functions["step" if all else "step_last"]

    def _step(self, function: Function, tokens: np.ndarray) -> np.ndarray:
        """Logits [B, S, V] (`step`) or [B, 1, V] (`step_last`) of a chunk of ids [B, S]."""
        count = tokens.shape[1]
        call = self._call(function, count)
        call.ids[...] = tokens
        call.positions[...] = np.arange(self.length, self.length + count)
        self._kv_len[...] = self.length + count
        result = function.run(call.arguments)
        self.length += count
        # A function may return the caches after the logits: they are the very same memory.
        logits = to_numpy(result if isinstance(result, tvm_ffi.Tensor) else result[0])
        return logits.copy() if function.spec.workspaces else logits  # the next call writes there again

    def _call(self, function: Function, count: int) -> _Call:
        """A call with `count` tokens. Calls with one are kept: a kernel leaves nothing of Python's in the CPU's caches,
        and touching hundreds of tensors' reference counts anew for every token would cost a tenth of its time."""
        if count == 1 and function.name in self._single_calls:
            return self._single_calls[function.name]
        ids, positions = (aligned_zeros((self.batch, count), np.int64) for _ in range(2))
        small = {"input_ids": ids, "position_ids": positions, "kv_len": self._kv_len}
        inputs = (to_tensor(small[name]) for name in self.decoder.inputs)
        call = _Call(ids, positions, function.arguments((*inputs, *map(to_tensor, self._caches))))
        if count == 1:
            self._single_calls[function.name] = call
        return call

    def _check(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        tokens = np.asarray(ids)
        if tokens.ndim == 1 and self.batch == 1:
            tokens = tokens[None]
        if tokens.ndim != 2 or tokens.shape[0] != self.batch or not tokens.size:
            raise InputError(f"ids have shape {list(tokens.shape)}, expected [{self.batch}, S] with S at least 1")
        if tokens.dtype.kind not in "iu":
            raise InputError(f"ids have dtype {tokens.dtype}, expected integers")
        least, greatest = (tokens[0, 0],) * 2 if tokens.size == 1 else (tokens.min(), tokens.max())
        if least < 0 or greatest >= self.decoder.vocab_size:
            raise InputError(
                f"ids reach from {least} to {greatest}; the vocabulary has {self.decoder.vocab_size}",
                hint="is this the model's own tokenizer?",
            )
        if self.max_length is not None and self.length + tokens.shape[1] > self.max_length:
            raise InputError(
                f"{self.length} tokens and {tokens.shape[1]} more exceed the model's length of {self.max_length}",
                hint="shorten the prompt, generate fewer tokens, or reset the session",
            )
        return tokens

    def _limit(self, tokens: int) -> int:
        """A capacity of at least `tokens` (as far as the model's length allows), in whole blocks."""
        tokens = tokens if self.max_length is None else min(tokens, self.max_length)
        return -(-tokens // self._block) * self._block

    def _resize(self, capacity: int) -> None:
        """Move every cache into a larger one; one after the other, so that only one is held twice."""
        self._single_calls.clear()  # they hold on to the old memory
        for i, (spec, axis2) in enumerate(self._buffers(capacity)):
            new = aligned_zeros(
                (self.batch, int(spec.shape[1]), axis2, *map(int, spec.shape[3:])), numpy_dtype(spec.dtype)
            )
            if i < len(self._caches):
                old = self._caches[i]
                new[:, :, : old.shape[2]] = old
                self._caches[i] = new
            else:
                self._caches.append(new)
        self._capacity = capacity

    def _buffers(self, capacity: int) -> Iterator[tuple[BufferSpec, int]]:
        """Each cache buffer, and the size of its third dimension: blocks, or tokens."""
        for cache in self.decoder.caches:
            for buffer in cache.buffers:
                yield buffer, capacity // (cache.block if buffer.shape[2] == cache.k.shape[2] else 1)
