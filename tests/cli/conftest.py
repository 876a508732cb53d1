"""Artifacts for the command line, small enough to make in a second, and a way to call it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from llmc.cli import main
from llmc.tune import stage

from ..runtime.toys import V, write_decoder, write_mlp
from .pretender import Pretender

TEMPLATE = b"{% for m in messages %}{{ m.content }} {% endfor %}t3"


@pytest.fixture(scope="session")
def mlp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs x [rows, 40] and shift [rows, 3], outputs hidden and out."""
    return write_mlp(tmp_path_factory.mktemp("cli") / "mlp.llmc")


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of 50 words, t0 to t49."""
    words = {"type": "WordLevel", "vocab": {f"t{i}": i for i in range(V)}, "unk_token": "t0"}
    tokenizer = json.dumps({"version": "1.0", "pre_tokenizer": {"type": "Whitespace"}, "model": words}).encode()
    path = tmp_path_factory.mktemp("cli") / "decoder.llmc"
    return write_decoder(path, tokenizer__json=tokenizer, chat_template__jinja=TEMPLATE)


@pytest.fixture(scope="session")
def relu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest model worth compiling: y = relu(x), x [rows, 8]."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 8]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    path = tmp_path_factory.mktemp("cli") / "relu.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def llmc(capfd: pytest.CaptureFixture[str]) -> Call:
    """Runs one command line in this process: (exit code, standard output, standard error)."""

    def call(*words: Any) -> tuple[int, str, str]:
        code = main([str(w) for w in words])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return call


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> type[Pretender]:
    """Kernels are tuned without being measured; nothing is known, and there is nothing to learn from."""
    monkeypatch.setattr(stage, "Measurer", Pretender)
    monkeypatch.setattr(stage, "shipped", lambda target: ())
    return Pretender
