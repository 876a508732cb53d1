"""What a user may get wrong: one message with what, where and what to do, a stable exit code, no file left over."""

from __future__ import annotations

import errno
import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from llmc.errors import LlmcError
from llmc.package import replace
from llmc.package.manifest import TargetSpec

from ..runtime.toys import write_mlp
from .conftest import Call


@pytest.fixture
def files(tmp_path: Path, mlp: Path, decoder: Path, relu: Path) -> dict[str, Path]:
    """Names that the cases below stand for."""
    text = tmp_path / "notes.txt"
    text.write_text("not a model")
    (tmp_path / "empty.onnx").touch()
    truncated = tmp_path / "truncated.llmc"
    truncated.write_bytes(mlp.read_bytes()[:-100])
    for name, array in (
        ("x", np.ones((2, 40), np.float32)),
        ("wide", np.ones((2, 41), np.float32)),
        ("ids", np.ones(3)),
    ):
        np.save(tmp_path / f"{name}.npy", array)
    np.savez(tmp_path / "many.npz", a=1)
    write_mlp(tmp_path / "other.llmc", target=TargetSpec("x86-strange", "strange", ("no_such_flag",)))
    onnx.save(_foreign(), tmp_path / "foreign.onnx")
    named = {f.name: f for f in tmp_path.iterdir()}
    return named | {"mlp": mlp, "decoder": decoder, "relu": relu, "absent": tmp_path / "absent", "here": tmp_path}


def _foreign() -> onnx.ModelProto:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 8]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Foo", ["x"], ["y"], domain="my")], "g", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("my", 1)])


CASES: list[tuple[str, int, list[str]]] = [
    # command line, exit code, parts of the message
    ("compile {absent}", 3, ["no such file"]),
    ("compile {here}", 3, ["no such file"]),
    ("compile {notes.txt} -o {here}/o.llmc", 3, ["notes.txt"]),
    ("compile {empty.onnx} -o {here}/o.llmc", 3, ["empty.onnx"]),
    ("compile {relu} --target z80", 2, ["no target 'z80'", "known:", "x86-avx2"]),
    ("compile {relu} --target x86-avx51 -o {here}/o.llmc", 2, ["did you mean x86-avx512"]),
    ("compile {relu} --quantize w3 -o {here}/o.llmc", 2, ["w3", "w4a8-g32"]),
    ("compile {relu} --dim rows -o {here}/o.llmc", 2, ["'rows' is not a dimension", "seq=1..4096"]),
    ("compile {relu} --dim lines=3 -o {here}/o.llmc", 2, ["lines"]),
    ("compile {relu} -o {notes.txt}", 2, ["not an llmc artifact", "another --output"]),
    ("compile {relu} -o {absent}/o.llmc", 2, ["cannot write there", "No such file"]),
    ("compile {relu} -o {notes.txt}/o.llmc", 2, ["cannot write there", "Not a directory"]),
    ("run {absent}", 6, ["absent"]),
    ("run {notes.txt}", 6, ["not an llmc artifact"]),
    ("run {truncated.llmc}", 6, ["truncated"]),
    ("run {mlp}", 7, ["is missing", "the inputs are", "float32"]),
    ("run {mlp} --input x", 2, ["'x' is not an input", "NAME=FILE.npy"]),
    ("run {mlp} --input x={absent}", 7, ["cannot be read as .npy"]),
    ("run {mlp} --input x={notes.txt}", 7, ["cannot be read as .npy"]),
    ("run {mlp} --input x={many.npz}", 7, ["several arrays"]),
    ("run {mlp} --input y={x.npy}", 7, ["no such input"]),
    ("run {mlp} --input x={wide.npy} --input shift={x.npy}", 7, ["is 41, expected 40"]),
    ("run {mlp} --input x={ids.npy} --input shift={x.npy}", 7, ["float64"]),
    ("run {mlp} --input x={x.npy} --input x={x.npy}", 2, ["'x' is given twice"]),
    ("run {decoder}", 6, ["no function main"]),
    ("generate {mlp} hello", 6, ["not a decoder"]),
    ("generate {notes.txt} hello", 6, ["not an llmc artifact"]),
    ("generate {decoder} t1 --temperature -1", 2, ["temperature is -1"]),
    ("generate {decoder} t1 --top-p 2", 2, ["top_p is 2"]),
    ("generate {decoder} t1 --max-new-tokens -1", 2, ["max-new-tokens"]),
    ("generate {decoder} t1 --seed -1", 2, ["seed is -1"]),
    ("generate {decoder}", 2, ["there is no prompt", "--prompts"]),
    ("generate {decoder} t1 --sinks 2", 2, ["--sinks", "give --window"]),
    ("generate {decoder} --prompts {absent}", 2, ["cannot be read: No such file", "--prompts"]),
    ("generate {decoder} t1 --prompts {x.npy}", 2, ["not UTF-8"]),
    ("bench {decoder} --batch 0", 2, ["--batch", "'0' is not a list of positive numbers"]),
    ("inspect {absent}", 6, ["absent"]),
    ("inspect {truncated.llmc}", 6, ["truncated"]),
    ("check {mlp} {absent}", 3, ["no such file"]),
    ("check {notes.txt} {relu}", 6, ["not an llmc artifact"]),
    ("check {mlp} {notes.txt}", 3, ["onnxruntime cannot load it"]),
    ("check {mlp} {relu}", 3, ["its inputs are x; those of", "x, shift", "was compiled from"]),
    ("check {decoder} {relu}", 6, ["no function main"]),
    ("check {mlp} {relu} --text {notes.txt}", 2, ["no language model"]),
    ("check {decoder} {relu} --text {absent}", 2, ["cannot read", "No such file"]),
    ("check {decoder} {relu} --text {x.npy}", 2, ["not UTF-8"]),
    ("check {decoder} {relu} --text {notes.txt}", 7, ["perplexity needs at least 512"]),
    ("bench {other.llmc}", 6, ["needs no_such_flag", "--target native"]),
    ("bench {decoder} --prefill 9999 --decode 0", 7, ["exceed the model's length"]),
    ("bench {mlp} --against rival --model {relu}", 2, ["no engine 'rival'", "onnxruntime"]),
    ("bench {mlp} --against onnxruntime --model {absent}", 3, ["no such file"]),
    ("run {other.llmc}", 6, ["needs no_such_flag", "--target native"]),
    ("compile {relu} --dim rows=0 -o {here}/o.llmc", 2, ["no possible size", "1 or more"]),
    ("compile {relu} --dump-ir {notes.txt}/ir -o {here}/o.llmc", 1, ["notes.txt", "Not a directory", "hint:"]),
    ("compile {foreign.onnx} -o {here}/o.llmc", 4, ["my.Foo", "hint:"]),
    ("bench {notes.txt}", 6, ["not an llmc artifact"]),
    ("bench {decoder} --prefill many", 2, ["'many' is not a list of positive numbers"]),
    ("bench {decoder} --against onnxruntime", 2, ["--model"]),
    ("bench {decoder} --against llama.cpp --model {relu}", 2, ["needs the GGUF file", "--gguf"]),
    ("bench {decoder} --against llama.cpp --gguf {absent}", 3, ["no such file", "GGUF"]),
    ("bench {decoder} --context 0", 2, ["--context", "'0' is not a list of positive numbers"]),
    ("bench {mlp} --dim columns=3", 2, ["no dimension 'columns'", "rows"]),
    ("bench {mlp} --dim rows=1..3", 2, ["must be one size"]),
    ("targets --json extra", 2, ["extra"]),
    ("fly", 2, ["fly"]),
    ("compile", 2, ["model"]),
]


@pytest.mark.parametrize(("line", "code", "parts"), CASES, ids=[line for line, *_ in CASES])
def test_says_what_is_wrong(llmc: Call, files: dict[str, Any], line: str, code: int, parts: list[str]) -> None:
    words = [_fill(word, files) for word in line.split()]
    before = set(files["here"].iterdir())
    got, out, err = llmc(*words)
    assert got == code, err
    assert out == ""
    for part in parts:
        assert part in err
    assert set(files["here"].iterdir()) == before


def _fill(word: str, files: dict[str, Any]) -> str:
    for name, path in files.items():
        word = word.replace("{" + name + "}", str(path))
    return word


def test_an_empty_prompt(llmc: Call, decoder: Path) -> None:
    code, _, err = llmc("generate", decoder, "--raw", "")
    assert code == 7 and "the prompt is empty" in err


@pytest.mark.skipif(not os.access("/dev/full", os.W_OK), reason="needs /dev/full")
def test_outputs_are_written_whole_or_not_at_all(
    llmc: Call, mlp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["run", mlp]
    for name, width in (("x", 40), ("shift", 3)):
        np.save(tmp_path / f"{name}.npy", np.ones((2, width), np.float32))
        words += ["--input", f"{name}={tmp_path / name}.npy"]
    (tmp_path / "old.npz").write_text("old")
    before = set(tmp_path.iterdir())
    full = functools.partial(open, "/dev/full", "wb", buffering=0)
    monkeypatch.setattr(replace, "open", lambda path, mode: full(), raising=False)
    code, out, err = llmc(*words, "-o", tmp_path / "old.npz")
    assert (code, out) == (1, "")
    assert "No space left" in err and "free some space" in err
    assert set(tmp_path.iterdir()) == before and (tmp_path / "old.npz").read_text() == "old"


def test_a_folder_that_refuses_all_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a read-only file system does; it also refuses to remove a file that is not there."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(tmp_path))

    monkeypatch.setattr(replace, "open", refuse, raising=False)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(LlmcError, match=r"x\.npz: cannot be written: Read-only file system"):
        with replace.replacing(tmp_path / "x.npz"):
            pass


def test_interrupting_the_start(tmp_path: Path) -> None:
    """Ctrl-C while the command line itself is imported."""
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-m", "llmc", "targets"], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (130, "llmc: interrupted\n")


def test_debug_shows_the_traceback(files: dict[str, Any]) -> None:
    from llmc.cli import main
    from llmc.errors import ArtifactError

    with pytest.raises(ArtifactError):
        main(["inspect", str(files["absent"]), "--debug"])


def test_a_missing_compiler_is_named(relu: Path, tmp_path: Path) -> None:
    """With the base install only: a fresh interpreter in which TVM cannot be found."""
    script = (
        "import sys; sys.modules['tvm'] = None\n"
        "from llmc.cli import main\n"
        f"sys.exit(main(['compile', {str(relu)!r}, '-o', {str(tmp_path / 'o.llmc')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert "needs the module tvm" in done.stderr and "llmc[compile]" in done.stderr
    assert "Traceback" not in done.stderr


def test_interrupting_leaves_nothing(relu: Path, tmp_path: Path) -> None:
    """Ctrl-C in the middle of a compilation: exit code 130, one line, no file."""
    script = (
        "import os, signal, sys, llmc.pipeline\n"
        "from llmc.cli import main\n"
        "llmc.pipeline.build = lambda *a: os.kill(os.getpid(), signal.SIGINT)\n"
        f"sys.exit(main(['compile', {str(relu)!r}, '-o', {str(tmp_path / 'o.llmc')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr.endswith("llmc: interrupted\n") and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
