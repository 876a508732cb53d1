"""Every verb on artifacts that are made in a second: what it prints, as text and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from llmc.cli import app
from llmc.targets import cuda, x86

from ..runtime.toys import HIDDEN, decoder_reference, mlp_reference
from .conftest import Call

VERBS = ("compile", "tune", "run", "generate", "bench", "check", "inspect", "report", "targets")


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example(verb: str) -> None:
    result = CliRunner().invoke(app, [verb, "--help"])
    assert result.exit_code == 0
    assert f"Example:\n    llmc {verb}" in result.output
    assert "--json" in result.output


def test_top_level_help_lists_every_verb() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert all(f"\n  {verb} " in result.output for verb in (*VERBS, "logs"))
    assert "..." not in result.output.split("Commands:")[1], "a verb's first line is too long to be shown whole"


@pytest.mark.parametrize("verb", ["list", "best", "export", "import", "merge", "prune", "explain"])
def test_help_of_logs(verb: str) -> None:
    group = CliRunner().invoke(app, ["logs", "--help"]).output.split("Commands:")[1]
    assert f"\n  {verb} " in group and "..." not in group
    result = CliRunner().invoke(app, ["logs", verb, "--help"])
    assert result.exit_code == 0 and f"Example:\n    llmc logs {verb}" in result.output
    assert ("--json" in result.output) == (verb in ("list", "best", "explain"))


def test_version(llmc: Call) -> None:
    assert llmc("--version")[1].startswith("llmc 0.")


def test_targets(llmc: Call) -> None:
    code, out, _ = llmc("targets", "--json")
    data = json.loads(out)
    assert code == 0
    names = {*x86.TARGETS, *cuda.TARGETS}
    assert set(data["targets"]) == names
    assert all(t["runs_here"] == (not t["missing"]) for t in data["targets"].values())
    assert data["native"] in {name for name, t in data["targets"].items() if t["runs_here"]} or data["native"] is None
    text = llmc("targets")[1]
    assert all(name in text for name in names)


def mlp_inputs(folder: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    rng = np.random.default_rng(0)
    x, shift = rng.standard_normal((5, HIDDEN), np.float32), rng.standard_normal((5, 3), np.float32)
    words = []
    for name, array in (("x", x), ("shift", shift)):
        np.save(folder / f"{name}.npy", array)
        words += ["--input", f"{name}={folder / name}.npy"]
    return x, shift, words


def test_run(llmc: Call, mlp: Path, tmp_path: Path) -> None:
    x, shift, words = mlp_inputs(tmp_path)
    code, out, err = llmc("run", mlp, *words, "-o", tmp_path / "out.npz", "--json")
    assert code == 0, err
    hidden, result = mlp_reference(x, shift)
    saved = np.load(tmp_path / "out.npz")
    np.testing.assert_allclose(saved["out"], result, rtol=1e-4, atol=1e-4)
    summary = json.loads(out)
    assert summary["out"]["shape"] == [5, 3]
    assert summary["hidden"]["max"] == pytest.approx(hidden.max(), rel=1e-4)
    assert "5 × 3" in llmc("run", mlp, *words)[1]


def greedy(prompt: list[int], n: int) -> list[int]:
    """What the toy decoder answers, by its reference."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(decoder_reference(np.array([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def words(ids: list[int]) -> list[str]:
    return [f"t{i}" for i in ids]


def test_generate(llmc: Call, decoder: Path) -> None:
    code, out, err = llmc("generate", decoder, "t5 t7", "--raw", "--max-new-tokens", 6)
    assert code == 0, err
    assert out.split() == words(greedy([5, 7], 6))
    assert "2 tokens" in err and "answer: 6 tokens" in err and "tokens/s" in err


def test_generate_uses_the_chat_template(llmc: Call, decoder: Path) -> None:
    _, out, _ = llmc("generate", decoder, "t5 t7", "--max-new-tokens", 4, "--json")
    data = json.loads(out)
    assert data["text"].split() == words(greedy([5, 7, 3], 4))
    assert (data["prompt_tokens"], data["new_tokens"], data["finish"]) == (3, 4, "limit")
    assert data["decode_tokens_per_s"] > 0


def test_generate_repeats_with_a_seed(llmc: Call, decoder: Path) -> None:
    line = ("generate", decoder, "t5", "--temperature", 50, "--max-new-tokens", 20, "--json", "--seed")
    texts = [json.loads(llmc(*line, seed)[1])["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_generate_for_several_prompts(llmc: Call, decoder: Path, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("t1 t2 t3\n\nt9\n")
    line = ("generate", decoder, "t5 t7", "--prompts", tmp_path / "more.txt", "--raw", "--max-new-tokens", 5)
    code, out, err = llmc(*line)
    assert code == 0, err
    expected = {"t5 t7": [5, 7], "t1 t2 t3": [1, 2, 3], "t9": [9]}
    texts = [f"{i}. {text}\n{' '.join(words(greedy(ids, 5)))}\n" for i, (text, ids) in enumerate(expected.items(), 1)]
    assert out == "\n".join(texts) + "\n" and "6 tokens" in err and "15 tokens" in err
    data = json.loads(llmc(*line, "--json")[1])
    assert [a["prompt"] for a in data["answers"]] == list(expected) and data["new_tokens"] == 15
    assert data["answers"][2]["text"].split() == words(greedy([9], 5))


def test_bench_of_batches_and_contexts(llmc: Call, decoder: Path) -> None:
    sizes = ("--prefill", "4", "--decode", 3, "--batch", "2,5", "--context", "9")
    code, out, err = llmc("bench", decoder, *sizes, "--repeat", 1, "--threads", 1, "--json")
    assert code == 0, err
    data = json.loads(out)["llmc"]
    assert set(data["batch"]) == {"2", "5"} and set(data["context"]) == {"9"}


def test_inspect(llmc: Call, decoder: Path) -> None:
    code, out, _ = llmc("inspect", decoder)
    assert code == 0
    for part in ("verified", "decoder, 1 layers, vocabulary 50", "step_last", "batch × seq", "weights.safetensors"):
        assert part in out
    assert json.loads(llmc("inspect", decoder, "--json")[1])["decoder"]["vocab_size"] == 50


def test_bench_of_a_decoder(llmc: Call, decoder: Path) -> None:
    line = ("bench", decoder, "--prefill", "4,9", "--decode", 3, "--repeat", 2, "--threads", 1)
    code, out, err = llmc(*line, "--json")
    assert code == 0, err
    (engine, data), *_ = json.loads(out).items()
    assert engine == "llmc"
    assert set(data["prefill"]) == {"4", "9"}
    low, high = data["spread"]["decode"]
    assert 0 < low <= data["decode"] <= high
    assert data["load_s"] > 0 and data["peak_rss_mb"] > 10


def test_bench_of_another_model(llmc: Call, mlp: Path) -> None:
    code, out, err = llmc("bench", mlp, "--dim", "rows=7", "--repeat", 2)
    assert code == 0, err
    assert "rows=7, ms" in out


def test_a_peer_that_cannot_take_part_is_noted(llmc: Call, decoder: Path, relu: Path) -> None:
    line = (
        "bench",
        decoder,
        "--prefill",
        4,
        "--decode",
        0,
        "--repeat",
        1,
        "--against",
        "onnxruntime-genai",
        "--model",
        relu,
    )
    code, out, err = llmc(*line)
    assert code == 0
    assert "llmc" in out and "onnxruntime-genai did not take part" in err


@pytest.fixture(scope="module")
def compiled(relu: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A real compilation through the command line."""
    folder = tmp_path_factory.mktemp("compiled")
    artifact = folder / "relu.llmc"
    line = [
        "compile",
        relu,
        "--target",
        "x86-avx2",
        "--dim",
        "rows=1..64",
        "--dump-ir",
        folder / "dump",
        "-o",
        artifact,
    ]
    result = CliRunner().invoke(app, [*map(str, line), "--json"])
    assert result.exit_code == 0, result.exception or result.output
    return {"artifact": artifact, "folder": folder, "json": json.loads(result.stdout), "log": result.stderr}


def test_compile(compiled: dict[str, Any]) -> None:
    data, log = compiled["json"], compiled["log"]
    assert data["bytes"] == compiled["artifact"].stat().st_size
    assert data["target"] == "x86-avx2"
    assert {"import", "fuse", "build"} <= set(data["stages"])
    for part in ("rows=1..64", "x86-avx2", "quantize", "import"):
        assert part in log
    assert {"0-import.txt", "1-quantize.txt", "2-fuse.txt"} <= {f.name for f in (compiled["folder"] / "dump").iterdir()}


def test_compile_replaces_an_artifact(llmc: Call, compiled: dict[str, Any], relu: Path) -> None:
    before = compiled["artifact"].read_bytes()
    assert llmc("compile", relu, "--target", "x86-avx2", "--dim", "rows=1..64", "-o", compiled["artifact"])[0] == 0
    assert compiled["artifact"].read_bytes() == before


def test_check(llmc: Call, compiled: dict[str, Any], relu: Path) -> None:
    code, out, err = llmc("check", compiled["artifact"], relu, "--json")
    assert code == 0, err
    data = json.loads(out)
    assert data["passed"] and len(data["outputs"]) == 3
    assert all(c["relative"] == 0 for c in data["outputs"])


def test_check_fails_on_another_model(llmc: Call, compiled: dict[str, Any], relu: Path, tmp_path: Path) -> None:
    import onnx

    model = onnx.load(relu)
    model.graph.node[0].op_type = "Sigmoid"
    onnx.save(model, tmp_path / "other.onnx")
    code, out, err = llmc("check", compiled["artifact"], tmp_path / "other.onnx")
    assert code == 9
    assert "output 'y'" in err and "rows" in out
