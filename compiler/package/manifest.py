"""What an artifact says about itself: `manifest.json` as frozen dataclasses, validated on the way in and out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from llmc.errors import ArtifactError
from llmc.package import strict
from llmc.package.layout import (
    CARRIED,
    DTYPES,
    LIBRARY,
    MANIFEST,
    MAX_BYTES,
    PIECE,
    TENSOR_ALIGN,
    WEIGHTS,
    array_bytes,
    safe_name,
)

SCHEMA = 1
CACHES = {"float32": "float32", "int8": "int8", "fp8": "int8", "int4": "uint8"}  # what caches hold, and their dtype


@dataclass(frozen=True)
class ArraySpec:
    """An input or output. A dimension is an int, or a symbol bound by the inputs of each call."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class WorkspaceSpec:
    """Memory that a function is handed for an intermediate value: `offset` bytes into storage number `storage`.

    Several may overlap in one storage. The first results of a function with workspaces lie in one of them.
    """

    storage: int
    offset: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class FunctionSpec:
    """A function of the library: its arguments are the inputs, then the weights named by `params`, in order, then the
    `workspaces`; one with workspaces returns its first output only.

    `symbols` gives the closed range of a symbolic dimension (None: no upper bound); one not listed is at least 0.
    """

    inputs: tuple[ArraySpec, ...]
    outputs: tuple[ArraySpec, ...]
    params: tuple[str, ...]
    symbols: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    workspaces: tuple[WorkspaceSpec, ...] = ()


@dataclass(frozen=True)
class ParamSpec:
    """A weight: the key of its data in weights.safetensors (several params may share one), dtype and shape."""

    tensor: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class BufferSpec:
    """A cache buffer: shape with symbols, dtype."""

    shape: tuple[int | str, ...]
    dtype: str


@dataclass(frozen=True)
class CacheSpec:
    """One layer's cache: keys ["batch", KV, "blocks", D, block], values ["batch", KV, "capacity", D].

    capacity = blocks · block; a block holds that many keys side by side. A rounded cache has `planes` of scales
    ["batch", KV, "blocks", rows, block]; its keys are ["batch", KV, "blocks", D, block/n], its values
    ["batch", KV, "blocks", block/n, D], n codes a byte. In a paged one "pages" stands in place of "batch" and "blocks":
    keys ["pages", KV, D, block], values ["pages", KV, block, D], and so on.
    """

    k: BufferSpec
    v: BufferSpec
    planes: BufferSpec | None = None

    @property
    def buffers(self) -> tuple[BufferSpec, ...]:
        """In the order in which functions take them."""
        return (self.k, self.v) if self.planes is None else (self.k, self.v, self.planes)

    @property
    def block(self) -> int:
        """Tokens of a block."""
        return int((self.planes or self.k).shape[-1])

    @property
    def block_bytes(self) -> int:
        """Bytes of a block of one sequence."""
        total = 0
        for buffer in self.buffers:
            rows = 1 if buffer.shape[2] == self.k.shape[2] else self.block
            sizes = buffer.shape[1:] if len(self.k.shape) == 4 else (rows, buffer.shape[1], *buffer.shape[3:])
            total += math.prod(map(int, sizes)) * DTYPES[buffer.dtype][1]
        return total


@dataclass(frozen=True)
class DecoderSpec:
    """What a session needs to drive `step`, `step_last` and, where it exists, `decode` (one token of one sequence):
    their inputs are `inputs`, then the buffers of each cache. Those of `verify`, where it exists, have `tree` between
    them. `kv_cache` names the caches' format; `paged` ones are pools of pages, with a table among the inputs."""

    vocab_size: int
    n_layers: int
    caches: tuple[CacheSpec, ...]
    inputs: tuple[str, ...]
    eos: tuple[int, ...] = ()
    max_length: int | None = None
    kv_cache: str = "float32"
    paged: bool = False

    def cache_bytes(self, tokens: int) -> int:
        """Bytes that the caches of one sequence take, in whole blocks."""
        return sum(cache.block_bytes * -(-tokens // cache.block) for cache in self.caches)


@dataclass(frozen=True)
class TargetSpec:
    """The machine that the code was built for; `requires` are CPU flags as in /proc/cpuinfo."""

    name: str
    mcpu: str
    requires: tuple[str, ...]


@dataclass(frozen=True)
class KernelSpec:
    """One distinct kernel: which template wrote it, for which workload, with which configuration found how."""

    name: str
    template: str
    version: int
    workload: Any
    config: Any
    provenance: Any
    calls: int


@dataclass(frozen=True)
class EntrySpec:
    """Size in bytes and SHA-256 (hex) of each successive 16 MiB of an entry; the last piece may be shorter."""

    size: int
    sha256: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """All that is known of an artifact without loading its code. `entries` is filled in by the writer."""

    llmc: str
    tvm: str
    tvm_ffi: str
    target: TargetSpec
    functions: dict[str, FunctionSpec]
    params: dict[str, ParamSpec]
    decoder: DecoderSpec | None = None
    quantization: dict[str, Any] = field(default_factory=dict)
    kernels: tuple[KernelSpec, ...] = ()
    accuracy: dict[str, Any] | None = None
    entries: dict[str, EntrySpec] = field(default_factory=dict)
    schema: int = SCHEMA

    def to_json(self) -> bytes:
        """Sorted keys: equal manifests give equal bytes. Raises ArtifactError if the manifest contradicts itself."""
        try:
            validate(self)
            return strict.encode(self)
        except (strict.Mismatch, TypeError, ValueError) as error:
            raise ArtifactError(str(error), where=MANIFEST) from None

    @staticmethod
    def from_json(text: bytes) -> Manifest:
        """Raises ArtifactError, naming the field, if anything is missing, unknown, of a wrong type or contradictory."""
        try:
            document = strict.parse(text)
            schema = document.get("schema") if isinstance(document, dict) else None
            if schema != SCHEMA:
                raise ArtifactError(
                    f"schema is {schema!r}, and this llmc reads schema {SCHEMA}",
                    where=MANIFEST,
                    hint="load the artifact with the llmc that wrote it, or compile the model again",
                )
            manifest = strict.decode(Manifest, document)
            validate(manifest)
            return manifest
        except strict.Mismatch as error:
            raise ArtifactError(
                str(error), where=MANIFEST, hint="the file is damaged; compile the model again"
            ) from None

    def tensors(self) -> dict[str, ParamSpec]:
        """Stored tensors by key, in the order of first use: a run reads the file forwards."""
        used = [name for function in self.functions.values() for name in function.params]
        return {self.params[name].tensor: self.params[name] for name in dict.fromkeys([*used, *sorted(self.params)])}


def validate(manifest: Manifest) -> None:
    """Checks what types cannot say: that names resolve, dtypes are known, sizes are possible. Raises Mismatch."""
    for name, param in manifest.params.items():
        _check_array(f"params.{name}", param.dtype, param.shape)
    _check_shared_tensors(manifest.params)
    if not manifest.functions:
        raise strict.Mismatch("functions is empty")
    for name, function in manifest.functions.items():
        _check_function(f"functions.{name}", function, manifest.params)
    if manifest.decoder is not None:
        _check_decoder(manifest.decoder, manifest.functions)
    for name, entry in manifest.entries.items():
        _check_entry(f"entries.{name}", name, entry)
    for required in (LIBRARY, WEIGHTS):
        if manifest.entries and required not in manifest.entries:
            raise strict.Mismatch(f"entries.{required} is missing")


def _check_array(where: str, dtype: str, shape: tuple[int | str, ...]) -> None:
    if dtype not in DTYPES:
        raise strict.Mismatch(f"{where}.dtype {dtype!r} is not a known dtype")
    if "" in shape or array_bytes(tuple(dim for dim in shape if isinstance(dim, int)), dtype) is None:
        raise strict.Mismatch(f"{where}.shape {str(list(shape))[:100]} holds an impossible dimension")


def _check_shared_tensors(params: dict[str, ParamSpec]) -> None:
    stored: dict[str, ParamSpec] = {}
    for name, param in params.items():
        if stored.setdefault(param.tensor, param) != param:
            raise strict.Mismatch(
                f"params.{name} reads tensor {param.tensor!r} with another dtype or shape than others do"
            )


def _check_function(where: str, function: FunctionSpec, params: dict[str, ParamSpec]) -> None:
    for kind, arrays in (("inputs", function.inputs), ("outputs", function.outputs)):
        for i, array in enumerate(arrays):
            dtype = "uint8" if array.dtype in CARRIED else array.dtype
            _check_array(f"{where}.{kind}[{i}]", dtype, array.shape)
        names = [array.name for array in arrays]
        if len(set(names)) != len(names):
            raise strict.Mismatch(f"{where}.{kind} uses a name twice")
    for name in function.params:
        if name not in params:
            raise strict.Mismatch(f"{where}.params names {name!r}, which params does not hold")
    for i, memory in enumerate(function.workspaces):
        _check_array(f"{where}.workspaces[{i}]", memory.dtype, memory.shape)
        offset = memory.offset
        if not 0 <= memory.storage < len(function.workspaces) or offset % TENSOR_ALIGN or not 0 <= offset < MAX_BYTES:
            raise strict.Mismatch(f"{where}.workspaces[{i}] has an impossible storage or offset")
    for symbol, (low, high) in function.symbols.items():
        if low < 0 or (high is not None and high < low):
            raise strict.Mismatch(f"{where}.symbols.{symbol} is an empty range")


def _check_decoder(decoder: DecoderSpec, functions: dict[str, FunctionSpec]) -> None:
    if decoder.vocab_size < 1 or not decoder.caches or decoder.n_layers != len(decoder.caches):
        raise strict.Mismatch("decoder.n_layers and decoder.caches differ, or the vocabulary is empty")
    table = ("block_table", "shared_blocks") if decoder.paged else ()
    if decoder.inputs not in (("input_ids", "kv_len", *table), ("input_ids", "position_ids", "kv_len", *table)):
        needed = "input_ids, position_ids (if the model takes them), kv_len" + ", ".join(("", *table))
        raise strict.Mismatch(f"decoder.inputs must be {needed}")
    for i, cache in enumerate(decoder.caches):
        ranks: tuple[tuple[str, int], ...] = (
            (("k", 5), ("v", 4)) if cache.planes is None else (("k", 5), ("v", 5), ("planes", 5))
        )
        if decoder.paged:
            ranks = (("k", 4), ("v", 4), ("planes", 4))[: len(cache.buffers)]
        for (part, rank), buffer in zip(ranks, cache.buffers, strict=True):
            _check_array(f"decoder.caches[{i}].{part}", buffer.dtype, buffer.shape)
            if len(buffer.shape) != rank:
                raise strict.Mismatch(f"decoder.caches[{i}].{part}.shape must have {rank} dimensions")
        fixed = [cache.k.shape[i] for i in (1, -2, -1)] + [cache.v.shape[i] for i in (1, -1)]
        if not all(isinstance(dim, int) and dim > 0 for dim in fixed) or fixed[:2] != fixed[3:]:
            raise strict.Mismatch(
                f"decoder.caches[{i}] has heads or head_dim that are not fixed, or differ between k and v"
            )
        dtypes = {cache.k.dtype, cache.v.dtype}
        if dtypes != {CACHES.get(decoder.kv_cache)} or (cache.planes is None) != (decoder.kv_cache == "float32"):
            raise strict.Mismatch(f"decoder.kv_cache {decoder.kv_cache!r} is not what decoder.caches[{i}] holds")
        if decoder.paged:
            _check_pages(f"decoder.caches[{i}]", cache, decoder.kv_cache)
        elif cache.planes is not None:
            _check_planes(f"decoder.caches[{i}]", cache, cache.planes)
    buffers = [buffer for cache in decoder.caches for buffer in cache.buffers]
    for name in ("step", "step_last", *(name for name in ("verify",) if name in functions)):
        if name not in functions:
            raise strict.Mismatch(f"functions.{name} is missing, but decoder is not null")
        inputs = functions[name].inputs
        wanted = (*decoder.inputs, "tree") if name == "verify" else decoder.inputs
        split = len(wanted)
        if tuple(spec.name for spec in inputs[:split]) != wanted or len(inputs) != split + len(buffers):
            tree = ", tree" if name == "verify" else ""
            raise strict.Mismatch(
                f"functions.{name}.inputs must be decoder.inputs{tree}, then the buffers of each cache"
            )
        for spec, buffer in zip(inputs[split:], buffers, strict=True):
            if (spec.shape, spec.dtype) != (buffer.shape, buffer.dtype):
                raise strict.Mismatch(
                    f"functions.{name}.inputs: {spec.name} is not the cache that decoder.caches describes"
                )


def _check_pages(where: str, cache: CacheSpec, kv_cache: str) -> None:
    """Of a paged cache: a number of pages that is left to the session, in all buffers the same; and all else fixed."""
    leading = {buffer.shape[0] for buffer in cache.buffers}
    if len(leading) != 1 or not isinstance(cache.k.shape[0], str):
        raise strict.Mismatch(f"{where}: k, v and planes differ in pages, or their number is fixed")
    if not all(isinstance(dim, int) and dim > 0 for buffer in cache.buffers for dim in buffer.shape[1:]):
        raise strict.Mismatch(f"{where} has pages whose sizes are not fixed")
    heads = {buffer.shape[1] for buffer in cache.buffers}
    a_byte = 2 if kv_cache == "int4" else 1
    tokens = {cache.block, a_byte * int(cache.k.shape[3]), a_byte * int(cache.v.shape[2])}
    if len(heads) != 1 or len(tokens) != 1:
        raise strict.Mismatch(f"{where}: k, v and planes differ in heads or tokens of a page")


def _check_planes(where: str, cache: CacheSpec, planes: BufferSpec) -> None:
    heads, blocks, rows, block = planes.shape[1:]
    width, narrow = cache.v.shape[3], cache.k.shape[4]
    if not all(isinstance(dim, int) and dim > 0 for dim in (heads, rows, block, width)):
        raise strict.Mismatch(f"{where} has planes or values whose sizes are not fixed")
    same_blocks = len({blocks, cache.k.shape[2], cache.v.shape[2]}) == 1
    if width != narrow or heads != cache.k.shape[1] or not same_blocks:
        raise strict.Mismatch(f"{where}: k, v and planes differ in heads or blocks")


def _check_entry(where: str, name: str, entry: EntrySpec) -> None:
    if not safe_name(name) or name == MANIFEST:
        raise strict.Mismatch(f"{where} is not a name that an entry may have")
    if entry.size < 0 or len(entry.sha256) != max(1, math.ceil(entry.size / PIECE)):
        raise strict.Mismatch(f"{where} has {len(entry.sha256)} hashes for {entry.size} bytes")
    if any(len(digest) != 64 or set(digest) - set("0123456789abcdef") for digest in entry.sha256):
        raise strict.Mismatch(f"{where}.sha256 is not hexadecimal SHA-256")
