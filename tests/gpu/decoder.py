"""A decoder of two layers for an NVIDIA GPU, which several files run under the emulated driver."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmc.pipeline import compile
from tests.once import made_once
from tests.runtime.conftest import DECODER


def gpu_decoder(factory: pytest.TempPathFactory, kv_cache: str = "float32") -> Path:
    """A folder with DECODER as m.onnx, and for cuda-sm80, with that cache and trees, as m.llmc."""

    def make(folder: Path) -> None:
        DECODER.std23(folder / "m.onnx")
        compiled = compile(folder / "m.onnx", target="cuda-sm80", kv_cache=kv_cache, draft_trees=True)
        compiled.save(folder / "m.llmc")

    return made_once(factory, f"gpu-decoder-{kv_cache}", make)
