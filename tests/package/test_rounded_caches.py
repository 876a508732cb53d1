"""The manifest of a decoder whose caches are rounded."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from llmc.errors import ArtifactError
from llmc.package.manifest import ArraySpec, BufferSpec, CacheSpec, DecoderSpec, FunctionSpec, Manifest
from tests.package import files

K = BufferSpec(("batch", 2, "blocks", 8, 32), "uint8")
V = BufferSpec(("batch", 2, "blocks", 32, 8), "uint8")
PLANES = BufferSpec(("batch", 2, "blocks", 4, 64), "float16")


def decoder(k: BufferSpec = K, v: BufferSpec = V, planes: BufferSpec = PLANES, kv_cache: Any = "int4") -> Manifest:
    inputs = (
        ArraySpec("input_ids", "int64", ("batch", "seq")),
        ArraySpec("kv_len", "int64", ("batch",)),
        *(ArraySpec(f"cache{i}", buffer.dtype, buffer.shape) for i, buffer in enumerate((k, v, planes))),
    )
    step = FunctionSpec(inputs, (), ())
    spec = DecoderSpec(10, 1, (CacheSpec(k, v, planes),), ("input_ids", "kv_len"), kv_cache=kv_cache)
    return files.manifest(functions={"step": step, "step_last": step}, decoder=spec)


def test_round_trip() -> None:
    manifest = Manifest.from_json(decoder().to_json())
    assert manifest == decoder() and manifest.decoder is not None
    assert manifest.decoder.caches[0].block == 64
    assert manifest.decoder.cache_bytes(1) == 2 * (8 * 32 + 32 * 8 + 2 * 4 * 64)
    assert manifest.decoder.cache_bytes(65) == 2 * manifest.decoder.cache_bytes(64)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"v": dataclasses.replace(V, shape=("batch", 2, "capacity", 8))}, "v.shape must have 5 dimensions"),
        ({"v": dataclasses.replace(V, shape=("batch", 2, "blocks", 16, 8))}, "differ in heads or blocks"),
        ({"v": dataclasses.replace(V, shape=("batch", 2, "capacity", 32, 8))}, "differ in heads or blocks"),
        ({"v": dataclasses.replace(V, shape=("batch", 2, "blocks", 32, 9))}, "differ between k and v"),
        ({"planes": dataclasses.replace(PLANES, shape=("batch", 3, "blocks", 4, 64))}, "differ in heads or blocks"),
        ({"planes": dataclasses.replace(PLANES, shape=("batch", 2, "blocks", 4, "x"))}, "not fixed"),
        ({"planes": dataclasses.replace(PLANES, shape=("batch", 2, "blocks", 4, 0))}, "not fixed"),
        ({"planes": dataclasses.replace(PLANES, dtype="int3")}, "dtype .int3. is not a known"),
        ({"kv_cache": "int3"}, "kv_cache"),
        ({"kv_cache": "float32"}, "kv_cache"),
    ],
)
def test_contradictions_are_named(changes: dict[str, Any], names: str) -> None:
    with pytest.raises(ArtifactError, match=names):
        decoder(**changes).to_json()
