"""Compiled decoders that several files test: each is made once, when somebody asks for it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

import llmc
from llmc.pipeline import compile
from llmc.runtime import Model
from llmc.targets.detect import machine
from llmc.targets.x86 import TARGETS
from tests.graphs import Decoder, Shape

DECODER = Decoder(Shape(heads=4, kv_heads=2, head_dim=32, context=640))
WIDEST = "x86-avx512" if not machine().missing(TARGETS["x86-avx512"]) else "x86-avx2"
# What caches can be. One of them is compiled by default: the others differ in what has tests of its own.
CACHES = ("paged", *(pytest.param(name, marks=pytest.mark.slow) for name in ("float32", "int8", "int4", "int8,paged")))

Models = Callable[[str], Model]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """DECODER with a cache of that kind, and trees."""
    folder = tmp_path_factory.mktemp("decoders")
    DECODER.std23(folder / "m.onnx")

    @functools.cache
    def compiled(kv_cache: str) -> Model:
        path = folder / f"{kv_cache}.llmc"
        compile(folder / "m.onnx", target=WIDEST, kv_cache=kv_cache, draft_trees=True).save(path)
        return llmc.load(path)

    return compiled
