"""Artifacts for the tests of packaging: their library is no code, for nothing here runs any."""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from llmc.package import archive, strict
from llmc.package.layout import MANIFEST, WEIGHTS
from llmc.package.manifest import ArraySpec, FunctionSpec, KernelSpec, Manifest, ParamSpec, TargetSpec
from llmc.package.reader import Artifact

LIB = b"\x7fELF pretended" * 10


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {
        "odd": rng.standard_normal((3, 5), "float32"),
        "codes": rng.integers(0, 255, (7, 11), np.uint8),
        "none": np.zeros((0, 4), np.float32),
        "scalar": np.array(2.5, np.float64),
        "half": rng.standard_normal(33).astype(np.float16),
    }


def manifest(arrays: Mapping[str, np.ndarray] | None = None, **changes: object) -> Manifest:
    arrays = weights() if arrays is None else arrays
    made = Manifest(
        llmc="0.1.0",
        tvm="1.2.3",
        tvm_ffi="4.5.6",
        target=TargetSpec("x86-avx2", "x86-64-v3", ("avx2",)),
        functions={
            "main": FunctionSpec(
                inputs=(ArraySpec("x", "float32", ("rows", 3)),),
                outputs=(ArraySpec("y", "float32", ("rows", 5)),),
                params=tuple(arrays),
                symbols={"rows": (1, None)},
            )
        },
        params={name: ParamSpec(f"t/{name}", a.dtype.name, a.shape) for name, a in arrays.items()},
        kernels=(KernelSpec("k0", "lowbit", 1, {"N": 5}, {"rows": 4}, "default", 2),),
        quantization={"format": "none"},
    )
    return dataclasses.replace(made, **changes)


def tensors(arrays: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    return {f"t/{name}": a for name, a in (weights() if arrays is None else arrays).items()}


def write(path: Path, **options: object) -> Path:
    archive.write_artifact(path, manifest(), lib=LIB, tensors=tensors(), **options)  # type: ignore[arg-type]
    return path


def array_of(artifact: Artifact, key: str) -> np.ndarray:
    t = artifact.tensors[key]
    return np.frombuffer(artifact.data, np.uint8)[t.offset : t.offset + t.size].view(t.dtype).reshape(t.shape)


def forge(path: Path, source: Path, changes: Mapping[str, bytes], document: Mapping[str, object] | None = None) -> Path:
    """`source` with entries replaced and every hash made right again: what someone with bad intentions would do."""
    with zipfile.ZipFile(source) as old:
        content = {name: old.read(name) for name in old.namelist()}
    content.update(changes)
    told = strict.parse(content.pop(MANIFEST))
    with open(path, "wb") as file, zipfile.ZipFile(file, "w") as new:
        told["entries"] = {
            name: dataclasses.asdict(archive._write_entry(new, name, [memoryview(data)]))
            for name, data in content.items()
        }
        told.update(document or {})
        archive._write_entry(new, MANIFEST, [memoryview(strict.encode(told))])
    return path


def weights_entry(source: Path) -> bytes:
    with zipfile.ZipFile(source) as old:
        return old.read(WEIGHTS)
