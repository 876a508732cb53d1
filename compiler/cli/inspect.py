"""`llmc inspect`: what an artifact says about itself. Verifies the file; loads no code."""

from __future__ import annotations

import json as json_
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmc.cli.common import JsonFlag, human_bytes, one_line, print_json, print_pairs, print_table, stdout

if TYPE_CHECKING:
    from llmc.package.manifest import ArraySpec, DecoderSpec, Manifest
    from llmc.package.reader import Artifact

_LENGTH = 8192  # tokens at which the cache of a model without a limit is stated


def command(
    artifact: Annotated[Path, typer.Argument(help="The .llmc file.")],
    kernels: Annotated[
        bool, typer.Option("--kernels", help="What the compiler says of each kernel for a GPU, instead.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Verify an artifact and show what it holds.

    Nothing of it is executed.

    \b
    Example:
      llmc inspect model.llmc
    """
    from llmc.package.reader import open_artifact

    opened = open_artifact(artifact)
    manifest = opened.manifest
    if kernels:
        _show_kernels(opened, json)
        return
    if json:
        print_json(json_.loads(manifest.to_json()))
        return
    print_pairs(_facts(manifest, artifact), stdout())
    rows = [
        (name, direction, a.name, a.dtype, _shape(a))
        for name, function in manifest.functions.items()
        for direction, arrays in (("in", function.inputs), ("out", function.outputs))
        for a in _without_caches(arrays)
    ]
    print_table(("function", "", "name", "dtype", "shape"), rows)
    rows_ = [
        (k.template, k.calls, one_line(k.workload), one_line(k.config), one_line(k.provenance))
        for k in sorted(manifest.kernels, key=lambda k: (k.template, k.name))
    ]
    print_table(("kernel", "calls", "workload", "config", "found by"), rows_)
    print_table(("entry", "bytes"), [(name, entry.size) for name, entry in manifest.entries.items()])


def _show_kernels(artifact: Artifact, json: bool) -> None:
    """The kernels of an artifact for a GPU. Raises ArtifactError where it is none."""
    from llmc.package.device import KERNEL_FACTS, device_kernels

    facts = device_kernels(artifact)
    if json:
        print_json([{"name": name, **{key: known.get(key) for key in KERNEL_FACTS}} for name, known in facts.items()])
        return
    target = artifact.manifest.target
    about = {
        "compiled for": f"{target.mcpu} ({target.name})",
        "run": "not yet, on any GPU",
        "predicted": "by a model, not measured: microseconds of one launch, at the call named beside them",
        "conflicts": "ways of bank conflicts in that launch, of the worst access and in the mean; 1 is none",
    }
    print_pairs(about, stdout())
    rows = [(name, *(_cell(known.get(key)) for key in KERNEL_FACTS)) for name, known in facts.items()]
    print_table(("kernel", *(key.replace("_", " ") for key in KERNEL_FACTS)), rows)


def _cell(value: object) -> object:
    return "" if value is None else round(value, 2) if isinstance(value, float) else value


def _facts(manifest: Manifest, path: Path) -> dict[str, object]:
    decoder = manifest.decoder
    symbols = {s: bounds for f in manifest.functions.values() for s, bounds in f.symbols.items()}
    return {
        "artifact": f"{path}, {human_bytes(path.stat().st_size)}, verified",
        "made by": f"llmc {manifest.llmc}, TVM {manifest.tvm}, tvm-ffi {manifest.tvm_ffi}",
        "target": f"{manifest.target.name} ({manifest.target.mcpu}), needs "
        f"{' '.join(manifest.target.requires) or 'an NVIDIA GPU'}",
        "model": f"decoder, {decoder.n_layers} layers, vocabulary {decoder.vocab_size}"
        if decoder
        else "plain function",
        **({"cache": _cache(decoder)} if decoder else {}),
        "symbols": ", ".join(f"{s} {low}..{'' if high is None else high}" for s, (low, high) in symbols.items())
        or "none",
        "quantised": one_line(manifest.quantization) or "no",
        "accuracy": one_line(manifest.accuracy) or "not checked",
    }


def _cache(decoder: DecoderSpec) -> str:
    """What a session's cache holds, and how much memory it takes."""
    longest = decoder.max_length or _LENGTH
    a_token = decoder.cache_bytes(longest) / longest
    return (
        f"{decoder.kv_cache}{' in pages' if decoder.paged else ''}, {human_bytes(round(a_token))} a token, "
        f"{human_bytes(decoder.cache_bytes(longest))} at {longest} tokens"
    )


def _without_caches(arrays: tuple[ArraySpec, ...]) -> list[ArraySpec]:
    """A decoder's caches are many and alike: those of the first layer stand for all."""
    return [a for a in arrays if len(a.shape) < 4 or not re.search(r"\.[1-9]\d*(\.|$)", a.name)]


def _shape(array: ArraySpec) -> str:
    return " × ".join(map(str, array.shape)) or "scalar"
