"""The package stage: everything that was compiled becomes a manifest, and an artifact that can be saved."""

from __future__ import annotations

import hashlib
import json
import mmap
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmc import __version__
from llmc.fuse import Decoder
from llmc.graph import LLMC, Constant, Dim, Graph, graphs
from llmc.lower import Lowered, Param
from llmc.package.archive import write_artifact
from llmc.package.layout import DEVICE
from llmc.package.manifest import (
    ArraySpec,
    BufferSpec,
    CacheSpec,
    DecoderSpec,
    FunctionSpec,
    KernelSpec,
    Manifest,
    ParamSpec,
    TargetSpec,
    WorkspaceSpec,
)
from llmc.quantize.formats import Format
from llmc.schedules.base import Kernel
from llmc.schedules.formats import PackedCodes, QuantizedWeight
from llmc.select import Plan
from llmc.targets.base import Target
from llmc.tune import Choice
from llmc.tvm_shim import FFI_VERSION, TVM_VERSION
from llmc.workspace import Workspace

_BESIDE = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")  # travel with the model


@dataclass(frozen=True)
class Artifact:
    """A compiled model, not yet written. Weights are packed while they are written, one at a time."""

    manifest: Manifest
    library: Path
    params: Mapping[str, Param]
    extras: Mapping[str, Path]
    folder: tempfile.TemporaryDirectory[str]  # holds `library`; goes with the artifact
    mapped: tuple[mmap.mmap, ...]  # the model's files that weights are still read from

    def save(self, path: str | Path) -> Manifest:
        """Write the `.llmc` file, whole or not at all; returns the manifest with its entries' hashes."""
        tensors = _Packed({_key(name): param for name, param in self.params.items()}, self.mapped)
        return write_artifact(
            path, self.manifest, lib=self.library, tensors=tensors, extras=dict(self.extras), include_runtime=True
        )


class _Packed(Mapping[str, np.ndarray]):
    """Tensors by key. The arrays of the last kernel's weights are kept: their tensors are asked for in a row.

    What was read of the model's files is given back to the system: a model never lies in memory as a whole.
    """

    def __init__(self, params: Mapping[str, Param], mapped: tuple[mmap.mmap, ...]) -> None:
        self.params, self.mapped = params, mapped
        self.last: tuple[Callable[[], list[np.ndarray]] | None, list[np.ndarray]] = (None, [])

    def __getitem__(self, key: str) -> np.ndarray:
        param = self.params[key]
        if self.last[0] is not param.pack:  # tensors of one kernel share it; exporters' names may look as if they did
            self.last = (None, [])  # not both in memory
            self.last = (param.pack, param.pack())
            for file in self.mapped:
                file.madvise(mmap.MADV_DONTNEED)
        return self.last[1][param.index]

    def __iter__(self) -> Iterator[str]:
        return iter(self.params)

    def __len__(self) -> int:
        return len(self.params)


def describe(
    model: Path,
    target: Target,
    format: Format | None,
    plan: Plan,
    choices: Mapping[Kernel, Choice],
    lowered: Lowered,
    decoder: Decoder | None,
    workspaces: Mapping[str, tuple[Workspace, ...]],
    folder: tempfile.TemporaryDirectory[str],
) -> Artifact:
    """Collect what an artifact says about itself; `folder` holds lib.so."""
    calls = plan.calls()
    manifest = Manifest(
        llmc=__version__,
        tvm=TVM_VERSION,
        tvm_ffi=FFI_VERSION,
        target=TargetSpec(target.name, target.mcpu, target.requires),
        functions={
            name: _function(graph, lowered.takes[name], workspaces.get(name, ()))
            for name, graph in plan.functions.items()
        },
        params={name: ParamSpec(_key(name), p.dtype, p.shape) for name, p in lowered.params.items()},
        decoder=_decoder(model, decoder, plan.functions) if decoder else None,
        quantization=_quantization(next(iter(plan.functions.values())), format),
        kernels=tuple(
            KernelSpec(
                name,
                kernel.template.name,
                kernel.template.version,
                dict(vars(kernel.workload)),
                dict(choices[kernel].config),
                choices[kernel].provenance,
                calls[kernel],
            )
            for kernel, name in lowered.kernel_names.items()
        ),
    )
    extras = {name: model.parent / name for name in _BESIDE if (model.parent / name).is_file()}
    extras |= {f"{DEVICE}/{file.name}": file for file in sorted((Path(folder.name) / DEVICE).glob("*"))}
    constants = [c for whole in plan.functions.values() for graph in graphs(whole) for c in graph.constants.values()]
    return Artifact(manifest, Path(folder.name) / "lib.so", lowered.params, extras, folder, _mapped_by(constants))


def _mapped_by(constants: Iterable[Constant]) -> tuple[mmap.mmap, ...]:
    """The file maps that constants are views of, each once."""
    arrays: list[np.ndarray] = []
    for constant in constants:
        if not isinstance(constant, QuantizedWeight):
            arrays.append(constant)
            continue
        arrays += constant.q.parts if isinstance(constant.q, PackedCodes) else (constant.q,)
        arrays.append(constant.scale)
    files: dict[int, mmap.mmap] = {}
    for array in arrays:
        base: object = array
        while isinstance(base, np.ndarray | memoryview):
            base = base.base if isinstance(base, np.ndarray) else base.obj
        if isinstance(base, mmap.mmap):
            files[id(base)] = base
    return tuple(files.values())


def _key(name: str) -> str:
    """A tensor's key in the file: short, whatever the exporter's names were."""
    base, colon, index = name.rpartition(":")
    digest = hashlib.sha256((base or name).encode()).hexdigest()[:16]
    return f"{digest}.{index}" if colon else f"{digest}.{name[-40:]}"


def _function(graph: Graph, params: tuple[str, ...], workspaces: tuple[Workspace, ...]) -> FunctionSpec:
    def spec(name: str) -> ArraySpec:
        type_ = graph.types[name]
        return ArraySpec(name, type_.dtype, _shape(type_.shape))

    inputs, outputs = tuple(map(spec, graph.inputs)), tuple(map(spec, graph.outputs))
    memory = tuple(WorkspaceSpec(w.storage, w.offset, w.shape, w.dtype) for w in workspaces)
    return FunctionSpec(inputs, outputs, params, dict(graph.symbols), memory)


def _shape(shape: tuple[Dim, ...]) -> tuple[int | str, ...]:
    return tuple(d if isinstance(d, int) else str(d) for d in shape)


def _decoder(model: Path, decoder: Decoder, functions: Mapping[str, Graph]) -> DecoderSpec:
    step = functions["step"]
    caches = tuple(
        CacheSpec(*(BufferSpec(_shape(step.types[name].shape), step.types[name].dtype) for name in pair))
        for pair in decoder.caches
    )
    inputs = tuple(step.inputs[: len(step.inputs) - sum(map(len, decoder.caches))])
    length = _max_length(step)
    layers, kind = len(caches), decoder.kv_cache
    return DecoderSpec(decoder.vocab_size, layers, caches, inputs, _eos(model), length, kind, decoder.paged)


def _eos(model: Path) -> tuple[int, ...]:
    """End-of-sequence tokens, from the configuration files that exporters leave beside a model."""
    for name, path in (
        ("generation_config.json", ("eos_token_id",)),
        ("genai_config.json", ("model", "eos_token_id")),
        ("config.json", ("eos_token_id",)),
    ):
        file = model.parent / name
        if not file.is_file():
            continue
        value = json.loads(file.read_text(encoding="utf-8"))
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, int):
            return (value,)
        if isinstance(value, list):
            return tuple(int(v) for v in value)
    return _eos_of_tokenizer(model.parent)


def _eos_of_tokenizer(folder: Path) -> tuple[int, ...]:
    """The token that tokenizer_config.json names as its end, looked up among tokenizer.json's added tokens."""
    config, tokenizer = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if not (config.is_file() and tokenizer.is_file()):
        return ()
    token = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    added = json.loads(tokenizer.read_text(encoding="utf-8")).get("added_tokens", [])
    return tuple(int(t["id"]) for t in added if t.get("content") == token)


def _max_length(graph: Graph) -> int | None:
    """Positions that the model's rotary tables hold; None where it computes them."""
    rows = [
        int(graph.types[node.inputs[0]].shape[0])
        for node in graph.nodes
        if node.op == "Embedding" and "position" in node.inputs[1]
    ]
    return min(rows, default=None)


def _quantization(graph: Graph, format: Format | None) -> dict[str, object]:
    weights = [c for c in graph.constants.values() if isinstance(c, QuantizedWeight)]
    kinds = {
        f"{w.table or f'{w.bits}-bit'}, groups of {w.group_size if w.group_size != w.K else 'K'}"
        f"{', outliers in float32' if w.outliers else ''}"
        for w in weights
    }
    linears = [n for n in graph.nodes if n.op == "Linear" and n.domain == LLMC]
    count = len(weights)
    for activations, kind in (("bf16", "bfloat16"), ("f16", "float16")):  # floats until a kernel packs them
        if rounded := {n.inputs[1] for n in linears if n.attrs["activations"] == activations}:
            kinds.add(kind)
            count += len(rounded)
    return {"format": format.name if format else "none", "weights": sorted(kinds), "quantized_matrices": count}
