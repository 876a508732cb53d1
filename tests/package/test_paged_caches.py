"""The manifest of a decoder whose caches lie in pages."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from llmc.errors import ArtifactError
from llmc.package.manifest import ArraySpec, BufferSpec, CacheSpec, DecoderSpec, FunctionSpec, Manifest
from tests.package import files

K = BufferSpec(("pages", 2, 8, 64), "int8")
V = BufferSpec(("pages", 2, 64, 8), "int8")
PLANES = BufferSpec(("pages", 2, 2, 64), "float32")
INPUTS = ("input_ids", "kv_len", "block_table", "shared_blocks")


def decoder(
    k: BufferSpec = K,
    v: BufferSpec = V,
    planes: BufferSpec = PLANES,
    inputs: Any = INPUTS,
    paged: bool = True,
    tree: str | None = None,
) -> Manifest:
    """With `tree` there is a `verify`, which takes its masks where they belong, or first where it is not "tree"."""
    shapes = {"input_ids": ("batch", "seq"), "kv_len": ("batch",), "block_table": ("batch", "blocks")}
    arrays = [ArraySpec(name, "int64", shapes.get(name, (1,))) for name in inputs]
    arrays += [ArraySpec(f"cache{i}", buffer.dtype, buffer.shape) for i, buffer in enumerate((k, v, planes))]
    step = FunctionSpec(tuple(arrays), (), ())
    functions = {"step": step, "step_last": step}
    if tree is not None:
        at = len(inputs) if tree == "tree" else 0
        bits = ArraySpec("tree", "uint64", ("batch", "seq"))
        functions["verify"] = FunctionSpec((*arrays[:at], bits, *arrays[at:]), (), ())
    spec = DecoderSpec(10, 1, (CacheSpec(k, v, planes),), inputs, kv_cache="int8", paged=paged)
    return files.manifest(functions=functions, decoder=spec)


def test_round_trip() -> None:
    manifest = Manifest.from_json(decoder().to_json())
    assert Manifest.from_json(decoder(tree="tree").to_json()) == decoder(tree="tree")
    assert manifest == decoder() and manifest.decoder is not None
    assert manifest.decoder.caches[0].block == 64
    assert manifest.decoder.cache_bytes(1) == 2 * (2 * 8 * 64 + 4 * 2 * 64)
    assert manifest.decoder.cache_bytes(65) == 2 * manifest.decoder.cache_bytes(64)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"paged": False}, "decoder.inputs"),
        ({"tree": "first"}, "functions.verify.inputs must be decoder.inputs, tree, then"),
        ({"inputs": ("input_ids", "kv_len")}, "block_table, shared_blocks"),
        ({"v": dataclasses.replace(V, shape=("pages", 2, "blocks", 64, 8))}, "v.shape must have 4 dimensions"),
        ({"v": dataclasses.replace(V, shape=("others", 2, 64, 8))}, "differ in pages"),
        ({"k": dataclasses.replace(K, shape=(3, 2, 8, 64))}, "differ in pages"),
        ({"v": dataclasses.replace(V, shape=("pages", 2, "x", 8))}, "not fixed"),
        ({"v": dataclasses.replace(V, shape=("pages", 2, 32, 8))}, "differ in heads or tokens"),
        ({"planes": dataclasses.replace(PLANES, shape=("pages", 3, 2, 64))}, "differ in heads or tokens"),
        ({"planes": dataclasses.replace(PLANES, shape=("pages", 2, 2, 0))}, "not fixed"),
        ({"planes": dataclasses.replace(PLANES, shape=("pages", 2, 0, 64))}, "not fixed"),
    ],
)
def test_contradictions_are_named(changes: dict[str, Any], names: str) -> None:
    with pytest.raises(ArtifactError, match=names):
        decoder(**changes).to_json()


@pytest.mark.parametrize("block", [1 << 17, 128])
def test_pages_are_of_one_size(block: int) -> None:
    """A page is a block of every buffer: another number of tokens in its scales would be read beyond their end."""
    planes = dataclasses.replace(PLANES, shape=("pages", 2, 2, block))
    with pytest.raises(ArtifactError, match="differ in heads or tokens of a page"):
        decoder(planes=planes).to_json()
