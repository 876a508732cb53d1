"""How llama.cpp's programs are asked and understood, with scripts in their place that print what a release prints."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from llmc import bench
from llmc.engines import open_engine
from llmc.errors import LlmcError, ModelError, OptionError
from llmc.perplexity import perplexity

BENCH = [{"build_commit": "0c1e570", "n_prompt": 128, "n_gen": 0, "avg_ns": 250_000_000, "samples_ns": [250_000_000]}]
BATCHED = {"n_kv_max": 768, "pp": 128, "tg": 64, "pl": 4, "t_pp": 1.5, "t_tg": 0.5, "speed_tg": 512.0}


def script(path: Path, printed: str, complaint: str = "", code: int = 0) -> None:
    """A program that writes down its arguments, a line a run, and prints."""
    path.write_text(
        f"#!{sys.executable}\nimport sys\n"
        f"open({str(path) + '.runs'!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')\n"
        f"print({printed!r})\nprint({complaint!r}, file=sys.stderr)\nsys.exit({code})\n"
    )
    path.chmod(0o755)


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    script(folder / "llama-bench", json.dumps(BENCH, indent=2), "warning: debug build")
    script(folder / "llama-batched-bench", f"\n{json.dumps(BATCHED)}\n\nllama_perf: 3 runs")
    return folder


def runs(programs: Path, name: str) -> list[list[str]]:
    return [line.split() for line in (programs / f"{name}.runs").read_text().splitlines()]


def following(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def test_prompts_have_logits_of_every_position(programs: Path) -> None:
    engine = open_engine("llama.cpp", "q4_0.gguf", 3, programs=programs)
    assert engine.measure(np.zeros((1, 128), np.int64)) == 0.25
    words = runs(programs, "llama-bench")[-1]
    asked = {o: following(words, o) for o in ("-m", "-t", "-p", "-n", "-embd", "-r", "-o")}
    assert asked == {"-m": "q4_0.gguf", "-t": "3", "-p": "128", "-n": "0", "-embd": "1", "-r": "1", "-o": "json"}


def test_steps_follow_a_context_of_the_prompt_s_length(programs: Path) -> None:
    engine = open_engine("llama.cpp", "q4_0.gguf", 3, programs=programs)
    assert engine.measure(np.zeros((1, 2048), np.int64), decode=64) == 0.25
    words = runs(programs, "llama-bench")[-1]
    assert (following(words, "-p"), following(words, "-n"), following(words, "-d")) == ("0", "64", "2048")


def test_batches_have_a_program_of_their_own(programs: Path) -> None:
    engine = open_engine("llama.cpp", "q4_0.gguf", 3, programs=programs)
    assert engine.measure(np.zeros((4, 128), np.int64), decode=64) == 0.5
    (words,) = runs(programs, "llama-batched-bench")
    asked = [following(words, o) for o in ("-npp", "-ntg", "-npl", "-c", "-t")]
    assert asked == ["128", "64", "4", str(4 * (128 + 64)), "3"]


def test_it_takes_part_in_a_comparison(programs: Path) -> None:
    tasks = bench.decoder_tasks([16], 64, contexts=[2048], batches=[4])
    contestant = bench.Contestant("llama.cpp", Path("q4_0.gguf"), options={"programs": programs})
    (result,) = bench.compare([contestant], tasks, threads=1, repeat=1, vocabulary=9).values()
    assert isinstance(result, bench.Result), result
    expected = {"prefill 16": 16 / 0.25, "decode 64": 64 / 0.25, "context 2048": 64 / 0.25, "batch 4": 4 * 64 / 0.5}
    assert {name: figure.median for name, figure in result.figures.items()} == expected


def test_it_has_no_logits(programs: Path) -> None:
    engine = open_engine("llama.cpp", "q4_0.gguf", 1, programs=programs)
    with pytest.raises(OptionError, match="no logits"):
        perplexity(engine, np.zeros(600, np.int64))
    with pytest.raises(OptionError, match="language models only"):
        engine.call({})


def test_absent_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match=f"no llama-bench in {tmp_path}"):
        open_engine("llama.cpp", "q4_0.gguf", 1, programs=tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OptionError, match="the folders of PATH"):
        open_engine("llama.cpp", "q4_0.gguf", 1)


@pytest.mark.parametrize(
    ("complaint", "code", "message"),
    [("llama_bench: error: failed to load model 'x'\n", 1, "failed to load model"), ("", 3, "exit code 3")],
)
def test_a_failing_program_s_last_words_are_shown(programs: Path, complaint: str, code: int, message: str) -> None:
    script(programs / "llama-bench", "[", f"loading\n{complaint}" if complaint else "", code)
    with pytest.raises(ModelError, match=message) as caught:
        open_engine("llama.cpp", "broken.gguf", 1, programs=programs)
    assert "broken.gguf" in str(caught.value)


@pytest.mark.parametrize("printed", ["", "[]", "[{", "| model | t/s |", '[{"speed": 3}]', '["x"]'])
def test_results_of_another_form_are_refused(programs: Path, printed: str) -> None:
    script(programs / "llama-bench", printed)
    with pytest.raises(LlmcError, match="no result"):
        open_engine("llama.cpp", "q4_0.gguf", 1, programs=programs)
